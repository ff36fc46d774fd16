"""keepwarm plan on a log and a trace made here: the tables, the files, and what is refused."""

import csv
import json

import pytest
from typer.testing import CliRunner

from keepwarm.cli.root import build
from keepwarm.planner.plan import SCHEMES

SYSTEM = "You answer in one word. " * 100


def plan(*args):
    return CliRunner().invoke(build(), ["plan", *map(str, args)])


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "keepwarm.toml"
    path.write_text('[model]\nengine = "scripted"\n')
    return path


@pytest.fixture
def log(tmp_path):
    """Four users, two turns each, over one system text; every answer is of 10 tokens."""
    lines = []
    for user in range(4):
        messages = [{"role": "system", "content": SYSTEM}]
        for turn in range(2):
            messages.append({"role": "user", "content": f"Question {turn} of user {user}? " * 30})
            usage = {"completion_tokens": 10}
            request = {"model": "m", "messages": list(messages)}
            lines.append({"at": 1_780_000_000 + 60 * len(lines), "request": request, "response": {"usage": usage}})
            messages.append({"role": "assistant", "content": "Yes."})
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def trace(tmp_path):
    path = tmp_path / "made.jsonl"
    lines = [{"timestamp": 1000 * k, "input_length": 2048, "hash_ids": [0, 1, 2, 9 + k]} for k in range(5)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_a_trace_of_texts_is_planned_by_the_models_tokens(config, tmp_path):
    texts = [{"timestamp": 10**15 + k, "input": SYSTEM + f"Question {k}?", "output": "Yes."} for k in range(3)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    found = plan(tmp_path / "a.jsonl", "--config", config, "--json", tmp_path / "p.json")
    assert found.exit_code == 0, found.output
    made = json.loads((tmp_path / "p.json").read_bytes())
    assert made["n_requests"] == 3
    assert all(row["output_nano"] > 0 for row in made["rows"])
    assert max(row["hit_rate"] for row in made["rows"]) > 0.6


def test_every_scheme_is_a_row_whose_classes_are_its_total(log, config, tmp_path):
    out, table, plot = tmp_path / "new" / "p.json", tmp_path / "p.csv", tmp_path / "p.html"
    found = plan(log, "--config", config, "--json", out, "--csv", table, "--plot", plot)
    assert found.exit_code == 0, found.output
    made = json.loads(out.read_bytes())
    assert (made["kind"], made["n_requests"]) == ("plan", 8)
    rows = made["rows"]
    assert list(dict.fromkeys(row["scheme"] for row in rows)) == [scheme.name for scheme in SCHEMES]
    classes = ("fresh", "read", "write", "creation", "storage", "call", "output")
    for row in rows:
        assert sum(row[f"{name}_nano"] for name in classes) == row["total_nano"]
        assert row["none_nano"] - row["total_nano"] == row["saving_nano"]
        assert row["hit_rate"] == round(row["n_read_tokens"] / row["n_prompt_tokens"], 5)
        assert row["n_prompt_tokens"] == made["n_tokens"]
        if row["ttl"] == "none":
            assert (row["saving_nano"], row["n_read_tokens"]) == (0, 0)
    anthropic = {row["ttl"]: row for row in rows if row["scheme"] == "anthropic"}
    assert set(anthropic["5m"]["places"]) == {"system", "message 1"}  # nobody reads behind a second turn
    assert anthropic["5m"]["saving_nano"] > 0 and anthropic["5m"]["hit_rate"] > 0.5
    assert anthropic["1h"]["places"] == ["system"]  # a write at twice the price and one read at a tenth do not pay
    assert {mark["place"] for mark in made["marks"]} >= {"system", "message 1", "last message"}
    written = list(csv.DictReader(table.read_text().splitlines()))
    assert [int(row["total_nano"]) for row in written] == [row["total_nano"] for row in rows]
    assert plot.read_text().count("%</text>") == len(rows)
    assert "anthropic" in found.output and "system" in found.output


def test_a_trace_has_no_answers_and_says_so(trace, tmp_path):
    out = tmp_path / "p.json"
    found = plan(trace, "--json", out, "--scheme", "minimax")
    assert found.exit_code == 0, found.output
    assert "without answers" in found.output
    rows = json.loads(out.read_bytes())["rows"]
    assert [(row["scheme"], row["ttl"], row["n_read_tokens"], row["output_nano"]) for row in rows] == [
        ("minimax", "none", 0, None),
        ("minimax", "5m", 4 * 1536, None),
        ("minimax", "1h", 4 * 1536, None),
    ]


def test_prices_are_chosen_for_one_scheme_and_for_all(trace, tmp_path):
    out = tmp_path / "p.json"
    options = ("--prices", "kimi=kimi/moonshot-v1-8k", "--prices", "minimax/MiniMax-M2.1", "--json", out)
    assert plan(trace, *options).exit_code == 0
    shown = {row["scheme"]: (row["prices"], row["currency"]) for row in json.loads(out.read_bytes())["rows"]}
    assert shown.pop("kimi") == ("kimi@2024-08-07/moonshot-v1-8k", "CNY")
    assert set(shown.values()) == {("minimax@2026/MiniMax-M2.1", "CNY")}


def test_bad_lines_are_told_on_stderr_or_end_it(log, config):
    log.write_text(log.read_text() + "{bad\n")
    found = plan(log, "--config", config)
    assert found.exit_code == 0
    assert "1 lines of" in found.stderr and "line 9: not an object" in found.stderr
    strict = plan(log, "--config", config, "--strict")
    assert (strict.exit_code, strict.stdout) == (1, "")
    assert "line 9: not an object" in strict.stderr


@pytest.mark.parametrize(
    "args, words",
    [
        (("--scheme", "latin"), "there is no scheme 'latin'"),
        (("--prices", "latin=kimi/moonshot-v1-8k"), "'latin' is no scheme"),
        (("--prices", "kimi/none"), "no model and no terms 'none'"),
        (("--base", "anthropic/standard"), "no model 'standard' to be the base"),
    ],
)
def test_what_cannot_be_planned_is_one_line(trace, args, words):
    found = plan(trace, *args)
    assert (found.exit_code, found.stdout) == (1, "")
    assert words in found.stderr and found.stderr.count("\n") == 1


def test_a_log_that_is_not_there_is_one_line(tmp_path):
    found = plan(tmp_path / "none.jsonl")
    assert found.exit_code == 1
    assert "cannot read" in found.stderr
