"""Traces read back, the simulator's accounting by hand, and the optimum above every policy."""

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keepwarm.engine.eviction import POLICIES, policy
from keepwarm.replay import ReplayError
from keepwarm.replay.belady import belady
from keepwarm.replay.plot import Point, page, shown_tokens
from keepwarm.replay.simulate import simulate
from keepwarm.replay.trace import Request, Trace, read


def traced(*prompts, block_tokens=10):
    """A trace from prompts as block numbers, one a second, all blocks full."""
    requests = [Request(float(i), block_tokens * len(blocks), tuple(blocks)) for i, blocks in enumerate(prompts)]
    return Trace("made", block_tokens, tuple(requests))


def optimum(trace, n_max):
    """By trying everything: after a request, any set of seen blocks that fits may be kept."""
    states = {frozenset(): 0}
    for request in trace.requests:
        following = {}
        for kept, n_read in states.items():
            n_hit = len(list(itertools.takewhile(kept.__contains__, request.blocks)))
            known = kept | set(request.blocks)
            for size in range(min(n_max, len(known)) + 1):
                for chosen in itertools.combinations(sorted(known), size):
                    state = frozenset(chosen)
                    following[state] = max(following.get(state, 0), n_read + n_hit)
        states = following
    return max(states.values()) * trace.block_tokens


def write_mooncake(path, *lines):
    rows = [{"timestamp": t, "input_length": n, "output_length": 1, "hash_ids": ids} for t, n, ids in lines]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_session(path, *requests, block_size=64):
    rows = [{"t": t, "type": "n", "in": n, "hash_ids": ids} for t, n, ids in requests]
    path.write_text(json.dumps({"id": path.stem, "block_size": block_size, "requests": rows}))
    return path


def test_mooncake_lines_become_requests_in_seconds(tmp_path):
    trace = read(write_mooncake(tmp_path / "a.jsonl", (2000, 600, [7, 9]), (500, 512, [7])))
    assert trace.block_tokens == 512
    assert [(r.time_s, r.n_tokens, len(r.blocks)) for r in trace.requests] == [(0.5, 512, 1), (2.0, 600, 2)]
    assert trace.requests[1].blocks[0] == trace.requests[0].blocks[0]


def test_sessions_are_laid_over_each_other_and_share_nothing(tmp_path):
    write_session(tmp_path / "a.json", (0.0, 130, [1, 2]), (9.0, 200, [1, 2, 3]))
    write_session(tmp_path / "b.json", (5.0, 64, [1]))
    trace = read(tmp_path)
    assert [r.time_s for r in trace.requests] == [0.0, 5.0, 9.0]
    first, other, later = (r.blocks for r in trace.requests)
    assert later[:2] == first
    assert not set(other) & set(later)
    assert read(tmp_path / "a.json").n_tokens == 330


def test_lengths_of_answers_are_read_where_a_trace_has_them(tmp_path):
    assert [r.n_output for r in read(write_mooncake(tmp_path / "a.jsonl", (0, 600, [7, 9]))).requests] == [1]
    rows = [{"t": 0.0, "in": 64, "out": 30, "hash_ids": [1]}, {"t": 1.0, "in": 64, "hash_ids": [1]}]
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"block_size": 64, "requests": rows}))
    assert [r.n_output for r in read(path).requests] == [30, None]
    rows[0]["out"] = -1
    path.write_text(json.dumps({"block_size": 64, "requests": rows}))
    with pytest.raises(ReplayError, match="is in no known format"):
        read(path)


def test_a_subagents_requests_count_and_it_does_not(tmp_path):
    inner = [{"t": 1.0, "in": 64, "hash_ids": [1]}]
    rows = [{"t": 0.0, "in": 64, "hash_ids": [1]}, {"t": 0.5, "type": "subagent", "requests": inner}]
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"block_size": 64, "requests": rows}))
    assert [r.time_s for r in read(path).requests] == [0.0, 1.0]


def test_one_block_number_names_one_chain(tmp_path):
    trace = read(write_mooncake(tmp_path / "a.jsonl", (0, 1024, [1, 2]), (1, 1024, [3, 2])))
    assert trace.requests[0].blocks[1] != trace.requests[1].blocks[1]


@pytest.mark.parametrize("content", ["", "hello", '{"a": 1}', "[1, 2]", '{"block_size": 0, "requests": []}'])
def test_an_unknown_format_is_said_in_one_line(tmp_path, content):
    path = tmp_path / "a.txt"
    path.write_text(content)
    with pytest.raises(ReplayError, match=r"a\.txt") as caught:
        read(path)
    assert "\n" not in str(caught.value)


def test_what_is_not_there_or_does_not_fit_is_refused(tmp_path):
    with pytest.raises(ReplayError, match="cannot read"):
        read(tmp_path / "none.jsonl")
    with pytest.raises(ReplayError, match=r"no \*\.json session"):
        read(tmp_path)
    with pytest.raises(ReplayError, match="2 blocks for 100 tokens"):
        read(write_mooncake(tmp_path / "a.jsonl", (0, 100, [1, 2])))
    write_session(tmp_path / "a.json", (0.0, 64, [1]))
    write_session(tmp_path / "b.json", (0.0, 64, [1]), block_size=32)
    with pytest.raises(ReplayError, match=r"\[32, 64\]"):
        read(tmp_path)


def test_halves_are_the_whole():
    trace = traced([1], [2], [3])
    assert trace.half("first").requests + trace.half("second").requests == trace.requests
    assert trace.half("whole").requests == trace.requests


def test_tokens_read_are_the_stored_prefix():
    trace = traced([1, 2, 3], [1, 2, 4], [5], [1, 2, 3, 6])
    outcome = simulate(trace, policy("lru", 100), 100)
    assert (outcome.n_tokens_read, outcome.n_tokens, outcome.n_evicted) == (20 + 30, 110, 0)


def test_a_short_last_block_counts_its_tokens_only():
    trace = Trace("made", 10, (Request(0.0, 15, (1, 2)), Request(1.0, 15, (1, 2))))
    assert simulate(trace, policy("lru", 4), 4).n_tokens_read == belady(trace, 4).n_tokens_read == 15


@pytest.mark.parametrize("name", POLICIES)
def test_a_prompt_longer_than_the_store_keeps_its_beginning(name):
    trace = traced(range(10), range(10))
    assert simulate(trace, policy(name, 4), 4).n_tokens_read == 40


def test_least_recently_used_leaves_go_tail_first():
    trace = traced([1, 2], [3, 4], [5], [1, 2], [3, 4])
    outcome = simulate(trace, policy("lru", 4), 4)
    assert outcome.n_tokens_read == 10 + 10  # 5 took 2's place, 2 then 4's, and 4 comes in for 5
    assert outcome.n_evicted == 3


def chains_of(ways):
    """A number for each way from the root, so that a number has one parent."""
    numbers = {}
    return [[numbers.setdefault(tuple(way[: i + 1]), len(numbers)) for i in range(len(way))] for way in ways]


def ways(n_choices, n_blocks_max, n_prompts_max):
    way = st.lists(st.integers(1, n_choices), min_size=1, max_size=n_blocks_max)
    return st.lists(way, min_size=1, max_size=n_prompts_max)


@given(ways(2, 2, 6), st.integers(1, 3))
def test_the_optimum_is_what_trying_everything_finds(taken, n_max):
    trace = traced(*chains_of(taken))
    assert belady(trace, n_max).n_tokens_read == optimum(trace, n_max)


@pytest.mark.parametrize("name", POLICIES)
@given(taken=ways(3, 6, 40), n_max=st.integers(1, 12))
def test_no_policy_reads_more_than_the_optimum(name, taken, n_max):
    trace = traced(*chains_of(taken))
    outcome = simulate(trace, policy(name, n_max), n_max)
    assert outcome.n_tokens_read <= belady(trace, n_max).n_tokens_read
    assert outcome.n_tokens == sum(r.n_tokens for r in trace.requests)


def test_progress_adds_up_to_the_requests():
    trace, simulated, optimal = traced(*[[1]] * 700), [], []
    simulate(trace, policy("lru", 2), 2, simulated.append)
    belady(trace, 2, optimal.append)
    assert sum(simulated) == sum(optimal) == 700


def test_the_page_needs_nothing_else_and_escapes_names():
    points = [Point("<a>", name, size, size / 1e8) for name in ("lru", "cost") for size in (1_000_000, 5_100_000)]
    html = page(points)
    assert "<h2>&lt;a&gt;</h2>" in html
    assert html.count("<polyline") == 2
    assert html.count("<circle") == 4
    assert "http" not in html
    assert "5.1M" in html
    assert page(points[:1]).count("<circle") == 1


@pytest.mark.parametrize(
    "n_tokens, shown", [(999, "999"), (64_000, "64k"), (5_100_000, "5.1M"), (10_240_000, "10.24M")]
)
def test_sizes_are_shown_as_they_are_given(n_tokens, shown):
    assert shown_tokens(n_tokens) == shown
