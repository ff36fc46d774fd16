"""Log lines: one a line, and nothing of a client's that a terminal would obey."""

import json

import pytest
import structlog

from keepwarm.telemetry import configure

EVIL = "x\u001b[2K\u001b[31mRED\u001b]0;title\u0007\u202e\nforged"


@pytest.fixture(autouse=True)
def as_before():
    yield
    structlog.reset_defaults()


def test_on_a_console_what_does_not_print_is_escaped(capsys):
    configure("console").info("request", model=EVIL, tenant="größe", n=3)
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert "\u202e" not in line and "\u0007" not in line and "\u001b[31mRED" not in line and "\u001b]0;" not in line
    assert "x\\x1b[2K\\x1b[31mRED\\x1b]0;title\\x07\\u202e\\nforged" in line
    assert "größe" in line


def test_as_json_it_is_what_json_makes_of_it(capfdbinary):
    configure("json").info("request", model=EVIL)
    line = capfdbinary.readouterr().err
    assert line.count(b"\n") == 1 and b"\x1b" not in line
    assert json.loads(line)["model"] == EVIL
