"""Logs of requests: the forms of a line, what is skipped, and the bounds."""

import json

import pytest

from keepwarm.config import Limits
from keepwarm.core.errors import ApiError, ErrorKind
from keepwarm.engine.scripted import ScriptedVocab
from keepwarm.planner import PlanError
from keepwarm.planner.bodies import Bodies, Rendered
from keepwarm.planner.log import Bounds, is_trace, log_traffic, trace_traffic
from keepwarm.planner.traffic import END

BODY = {"model": "m", "messages": [{"role": "user", "content": "Hello there."}]}


def written(tmp_path, *lines):
    path = tmp_path / "log.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def read(path, *, strict=False, bounds=None, render=None):
    render = render or Bodies(ScriptedVocab(), Limits()).rendered
    return log_traffic(path, render, bounds or Bounds(), strict=strict)


class Noted:
    """Renders nothing and keeps what it was asked for; a body with "refused" in it is."""

    def __init__(self):
        self.asked = []

    def __call__(self, dialect, body):
        if b"refused" in body:
            raise ApiError(ErrorKind.INVALID_REQUEST, "it is refused")
        self.asked.append((dialect, json.loads(body)))
        return Rendered(10, (1, 2, 3), (), {})


def test_all_forms_of_a_line_are_the_same_request_in_the_order_of_their_times(tmp_path):
    path = written(
        tmp_path,
        {"at": "2026-01-01T01:00:00+01:00", "request": BODY, "response": {"usage": {"completion_tokens": 7}}},
        {"at": 1767225599.5, "request": BODY, "response": {"usage": {"output_tokens": 8}}},
        {"timestamp": 1767225601, **BODY},
        "",
        {"at": 1767225602, "request": BODY, "response": {"id": "no usage"}},
    )
    traffic, skipped = read(path, strict=True)
    assert [prompt.at_s for prompt in traffic.prompts] == [1767225599.5, 1767225600, 1767225601, 1767225602]
    assert [prompt.n_output for prompt in traffic.prompts] == [8, 7, None, None]
    assert len({(prompt.n_tokens, prompt.spots) for prompt in traffic.prompts}) == 1
    assert skipped.n_lines == 0


@pytest.mark.parametrize(
    "body, dialect",
    [
        (BODY, "openai"),
        ({**BODY, "system": "s"}, "anthropic"),
        ({**BODY, "thinking": {"type": "disabled"}}, "anthropic"),
        ({**BODY, "tools": [{"name": "f", "input_schema": {}}]}, "anthropic"),
        ({**BODY, "tools": [{"type": "function", "function": {"name": "f"}}]}, "openai"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]}, "anthropic"),
        ({"messages": [{"role": "system", "content": "s"}]}, "openai"),
    ],
)
def test_the_dialect_is_told_by_what_only_one_of_them_has(tmp_path, body, dialect):
    noted = Noted()
    read(written(tmp_path, {"at": 1, "request": body}, {"timestamp": 2, **body}), render=noted, strict=True)
    assert noted.asked == [(dialect, body), (dialect, body)]


def test_a_named_dialect_counts(tmp_path):
    noted = Noted()
    read(written(tmp_path, {"at": 1, "request": BODY, "dialect": "anthropic"}), render=noted, strict=True)
    assert noted.asked == [("anthropic", BODY)]


BAD = [
    ("{bad", "not an object in JSON"),
    ("[1]", "not an object in JSON"),
    ({"request": BODY}, "no time"),
    ({"at": "yesterday", "request": BODY}, "neither Unix seconds nor RFC 3339"),
    ({"at": "2026-01-01T00:00:00", "request": BODY}, "has no zone"),
    ({"at": 1767225600000, "request": BODY}, "not in Unix seconds"),
    ({"at": -1, "request": BODY}, "not in Unix seconds"),
    ({"at": 1, "request": {"refused": 1}}, "no request of openai's: it is refused"),
    ({"at": 1, "request": [BODY]}, "not a request"),
    ({"at": 1, "request": BODY, "dialect": "latin"}, "not a request"),
    ({"at": 1, "request": BODY, "response": 5}, "its response cannot be read"),
    ({"at": 1, "request": BODY, "response": {"usage": {"output_tokens": -5}}}, "-5 output tokens"),
]


@pytest.mark.parametrize("line, words", BAD)
def test_a_line_that_cannot_be_read_is_skipped_and_told_or_ends_it(tmp_path, line, words):
    path = written(tmp_path, {"at": 1, "request": BODY}, line, line)
    traffic, skipped = read(path, render=Noted())
    assert (len(traffic.prompts), skipped.n_lines) == (1, 2)
    assert skipped.first.startswith("line 2: ") and words in skipped.first
    with pytest.raises(PlanError, match="line 2: "):
        read(path, render=Noted(), strict=True)


def test_a_log_without_any_request_is_refused_with_the_first_reason(tmp_path):
    with pytest.raises(PlanError, match="no request that can be read; line 1: not an object"):
        read(written(tmp_path, "{bad"), render=Noted())
    with pytest.raises(PlanError, match=r"no request that can be read$"):
        read(written(tmp_path), render=Noted())


@pytest.mark.parametrize(
    "bounds, words",
    [
        (Bounds(line_bytes_max=150), "line 3: longer than 150 bytes"),
        (Bounds(requests_max=2), "line 3: more than 2 requests"),
        (Bounds(blocks_max=8), "line 3: the prompts up to here have more than 8 blocks"),
    ],
)
def test_bounds_end_it_at_the_line_that_passes_them(tmp_path, bounds, words):
    path = written(tmp_path, *[{"at": 1, "request": BODY}] * 2, {"at": 1, "request": BODY, "more": "x" * 100})
    with pytest.raises(PlanError, match=words):
        read(path, bounds=bounds, render=Noted())


def test_traces_are_known_by_their_content_and_read(tmp_path):
    trace = written(
        tmp_path,
        *[
            {"timestamp": 1000 * k, "input_length": 1030, "hash_ids": [0, 1, k + 5], "output_length": 7}
            for k in range(3)
        ],
    )
    assert is_trace(trace) and is_trace(tmp_path)
    traffic = trace_traffic(trace, Bounds())
    assert (traffic.block_tokens, [prompt.at_s for prompt in traffic.prompts]) == (512, [0, 1, 2])
    assert {(prompt.spot(END).end, prompt.n_output) for prompt in traffic.prompts} == {(1024, 7)}
    with pytest.raises(PlanError, match="more than 2 requests"):
        trace_traffic(trace, Bounds(requests_max=2))
    with pytest.raises(PlanError, match="10 are read at most"):
        trace_traffic(trace, Bounds(trace_bytes_max=10))


def test_a_log_is_no_trace_and_a_file_that_is_not_there_is_told(tmp_path):
    assert not is_trace(written(tmp_path, {"at": 1, "request": BODY}))
    assert not is_trace(written(tmp_path, "{bad"))
    with pytest.raises(PlanError, match=r"cannot read .*none\.jsonl: No such file"):
        is_trace(tmp_path / "none.jsonl")
