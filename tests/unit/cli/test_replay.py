"""keepwarm replay on a trace made here: the table, the JSON, the plot, and what is refused."""

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from keepwarm.cli.root import build


def replayed(*args):
    return CliRunner().invoke(build(), ["replay", *map(str, args)])


@pytest.fixture
def trace(tmp_path):
    prompts = [[0, 1, 2], [0, 1, 2, 3], [0, 4], [0, 1, 2, 3, 5]] * 5
    lines = [
        {"timestamp": 1000 * i, "input_length": 512 * len(ids), "output_length": 1, "hash_ids": ids}
        for i, ids in enumerate(prompts)
    ]
    path = tmp_path / "made.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_all_policies_at_all_capacities_in_json_and_plot(trace, tmp_path):
    out, plot = tmp_path / "new" / "r.json", tmp_path / "r.html"
    found = replayed(trace, "--capacity", "1.024k", "--capacity", "2M", "--json", out, "--plot", plot)
    assert found.exit_code == 0, found.output
    rows = json.loads(out.read_bytes())["rows"]
    assert [(row["policy"], row["capacity_tokens"]) for row in rows] == [
        (name, size) for size in (1024, 2_000_000) for name in ("lru", "s3fifo", "cost", "belady")
    ]
    n_tokens = 5 * 14 * 512
    assert {row["n_tokens"] for row in rows} == {n_tokens}
    assert {row["n_tokens_read"] for row in rows[4:]} == {n_tokens - 6 * 512}  # all but the first sight of each block
    assert all(row["hit_rate"] <= rows[3]["hit_rate"] for row in rows[:4])
    assert "lru" in found.output and "1.024k" in found.output and "2M" in found.output
    assert plot.read_text().count("<polyline") == 4


def test_half_and_policy_choose(trace, tmp_path):
    out = tmp_path / "r.json"
    found = replayed(trace, "--policy", "lru", "--capacity", "64k", "--half", "second", "--json", out)
    assert found.exit_code == 0, found.output
    (row,) = json.loads(out.read_bytes())["rows"]
    assert (row["trace"], row["policy"], row["n_requests"]) == ("made, second half", "lru", 10)


@pytest.mark.parametrize("capacity", ["lots", "-5", "0", "5G", ""])
def test_a_capacity_that_is_none_is_refused(trace, capacity):
    found = replayed(trace, f"--capacity={capacity}")
    assert found.exit_code == 1
    assert "is no number of tokens; give one like 64k or 5.1M" in found.output


def test_less_than_a_block_is_refused(trace):
    found = replayed(trace, "--capacity", "500")
    assert found.exit_code == 1
    assert "less than one block of made (512 tokens)" in found.output


def test_an_unknown_format_is_refused(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("hello")
    found = replayed(path)
    assert found.exit_code == 1
    assert "notes.txt is in no known format" in found.output
    assert found.output.count("\n") == 1


def test_a_file_that_cannot_be_written_is_said(trace, tmp_path):
    found = replayed(trace, "--policy", "lru", "--json", tmp_path)
    assert found.exit_code == 1
    assert "cannot write" in found.output


def test_replay_loads_neither_the_server_nor_llama():
    code = "import sys, keepwarm.cli.replay as _; sys.exit(any(m in sys.modules for m in ('llama_cpp', 'starlette')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
