"""Places of a trace against brute force over all pairs of prompts."""

from hypothesis import given

from keepwarm.planner.traffic import COMMON, END, SHARED
from tests.unit.planner.letters import BLOCK, WORDS, common_blocks, traffic_of


@given(WORDS)
def test_shared_is_the_longest_prefix_that_another_request_begins_with(words):
    for i, prompt in enumerate(traffic_of(words).prompts):
        others = [word for j, (_, word, _) in enumerate(words) if j != i]
        longest = max((common_blocks(words[i][1], other) for other in others), default=0)
        spot = prompt.spot(SHARED)
        assert (spot.end if spot else 0) == longest * BLOCK
        assert prompt.spot(END).end == len(words[i][1]) * BLOCK


@given(WORDS)
def test_common_is_where_requests_that_begin_alike_first_part(words):
    for i, prompt in enumerate(traffic_of(words).prompts):
        word = words[i][1]
        forks = (
            k
            for k in range(1, len(word) + 1)
            if len({other[k] for _, other, _ in words if other[:k] == word[:k] and len(other) > k}) > 1
        )
        n = next(forks, len(word))
        is_shared = sum(other[:n] == word[:n] for _, other, _ in words) > 1
        spot = prompt.spot(COMMON)
        assert (spot.end if spot else 0) == (n * BLOCK if is_shared else 0)


def test_a_last_block_that_is_not_whole_is_no_place():
    prompt = traffic_of([(0, "abc", 0)]).prompts[0]
    assert prompt.spot(END).end == 30
    cut = traffic_of([(0, "abc", -1)]).prompts[0]
    assert (cut.spot(END).end, cut.n_tokens, len(cut.blocks)) == (20, 29, 2)
