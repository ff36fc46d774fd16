"""The build filter: what it shows of a build's output, and that the log and the exit status survive it."""

import sys
from pathlib import Path

import pytest

from scripts.build_progress import TAIL_LINES, milestones, percent, run, tail


@pytest.mark.parametrize(
    "line, expected",
    [
        ("  [1/193] /usr/bin/g++ -DGGML_BUILD", 0),
        ("[97/194] Building CXX object", 50),
        ("[193/193]", 100),
        ("[  6%] Building C object", 6),
        ("[100%] Built target llama", 100),
        ("Collecting llama-cpp-python", None),
        ("note: array[3/4] is unused", None),
        ("[0/0] Re-running CMake", None),
    ],
)
def test_percent(line: str, expected: int | None) -> None:
    assert percent(line) == expected


def test_milestones_rise_by_at_least_the_step_and_reach_the_end() -> None:
    lines = ["configuring", *(f"[{n}/193] g++" for n in range(1, 194)), "done"]
    shown = [now for now in milestones(lines, 10) if now is not None]
    assert shown == [0, 10, 20, 30, 40, 50, 60, 70, 80, 90, 100]


def test_tail_cuts_lines_and_their_number() -> None:
    lines = tail(f"{n} {'x' * 5_000}" for n in range(500)).split("\n")
    assert len(lines) == TAIL_LINES
    assert lines[-1].startswith("499 xxx")
    assert len(lines[-1]) < 300


BUILD = """
print("Building wheel for llama-cpp-python (pyproject.toml): started")
for n in range(1, 21):
    print(f"  [{n}/20] g++ file{n}.cpp")
print("error: no such register")
raise SystemExit(7)
"""


def test_a_failed_build_shows_its_end_and_passes_its_status_on(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "build" / "llama.log"
    assert run(log, [sys.executable, "-c", BUILD]) == 7
    out, err = capfd.readouterr()
    assert "compiled once" in out
    assert "55 %" in out
    assert "[11/20]" not in out
    assert "error: no such register" in err
    assert str(log) in err
    assert "[11/20] g++ file11.cpp" in log.read_text()


def test_nothing_is_said_of_compiling_when_nothing_is_compiled(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path / "log", [sys.executable, "-c", "print('Requirement already satisfied')"]) == 0
    out, err = capfd.readouterr()
    assert "compiled" not in out
    assert not err
