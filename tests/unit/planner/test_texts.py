"""Traces of texts: shared beginnings are found by tokens, and what cannot be read ends it with its line."""

import json

import pytest

from keepwarm.engine.scripted import ScriptedVocab
from keepwarm.planner import PlanError
from keepwarm.planner.log import Bounds
from keepwarm.planner.numbers import BLOCK_TOKENS
from keepwarm.planner.texts import is_text_trace, text_traffic
from keepwarm.planner.traffic import SHARED

ENCODE = ScriptedVocab().encode_plain
SYSTEM = "You answer in one word. " * 20


def line(at_s, text, output="Yes.", **more):
    return {"timestamp": round(at_s * 1e6), "input": text, "output": output, "session_id": "s", **more}


def written(path, *lines):
    path.write_text("".join(json.dumps(one) + "\n" for one in lines))
    return path


def read(path, bounds=None, on_bytes=lambda _n: None):
    return text_traffic(path, ENCODE, bounds or Bounds(), on_bytes)


def test_prompts_share_what_their_tokens_share(tmp_path):
    path = written(tmp_path / "a.jsonl", line(9.5, SYSTEM + "B?"), line(1, SYSTEM + "A? Yes. B?"), line(20, "Other"))
    traffic = read(path)
    assert [prompt.at_s for prompt in traffic.prompts] == [1, 9.5, 20]
    first, second, other = traffic.prompts
    n_blocks = len(ENCODE(SYSTEM)) // BLOCK_TOKENS
    assert first.blocks[:n_blocks] == second.blocks[:n_blocks]
    assert first.spot(SHARED) == second.spot(SHARED) and first.spot(SHARED).end == n_blocks * BLOCK_TOKENS
    assert not set(other.blocks) & set(first.blocks) and other.spot(SHARED) is None
    assert [prompt.n_tokens for prompt in traffic.prompts] == [
        len(ENCODE(text)) for text in (SYSTEM + "A? Yes. B?", SYSTEM + "B?", "Other")
    ]
    assert {prompt.n_output for prompt in traffic.prompts} == {len(ENCODE("Yes."))}


def test_a_directory_is_one_traffic_with_every_byte_told(tmp_path):
    written(tmp_path / "b.jsonl", line(1, SYSTEM))
    written(tmp_path / "a.jsonl", line(2, SYSTEM), line(3, ""))  # an agent's first turn may be empty: no prompt
    told = []
    assert is_text_trace(tmp_path)
    assert [prompt.at_s for prompt in read(tmp_path, on_bytes=told.append).prompts] == [1, 2]
    assert sum(told) == sum(file.stat().st_size for file in tmp_path.iterdir())


@pytest.mark.parametrize(
    "first, is_one",
    [
        (line(1, "Hi"), True),
        ({"timestamp": 0, "input_length": 6, "output_length": 5, "hash_ids": [0]}, False),
        ({"at": 1, "input": "Hi", "output": "Yes"}, False),
        ({"timestamp": 1, "messages": [{"role": "user", "content": "Hi"}]}, False),
    ],
)
def test_it_is_known_by_its_first_line(tmp_path, first, is_one):
    assert is_text_trace(written(tmp_path / "a.jsonl", first)) is is_one


@pytest.mark.parametrize(
    "second, bounds, words",
    [
        ({"timestamp": 1, "input": "Hi"}, Bounds(), r"a\.jsonl, line 2: .*missing required field `output`"),
        (line(-1, "Hi"), Bounds(), r"line 2: .*`int` >= 0"),
        (line(1, "Hi " * 99), Bounds(line_bytes_max=200), "line 2: longer than 200 bytes"),
        (line(1, "Hi"), Bounds(requests_max=1), "line 2: more than 1 requests"),
        (line(1, SYSTEM), Bounds(blocks_max=3), "line 2: .* more than 3 blocks"),
    ],
)
def test_what_cannot_be_read_ends_it_at_its_line(tmp_path, second, bounds, words):
    with pytest.raises(PlanError, match=words):
        read(written(tmp_path / "a.jsonl", line(0, "Hi"), second), bounds)


def test_a_trace_without_prompts_is_refused(tmp_path):
    with pytest.raises(PlanError, match="no prompt with a token"):
        read(written(tmp_path / "a.jsonl", line(0, "")))
