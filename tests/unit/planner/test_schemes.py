"""Schemes against naive twins: every pair of prompts compared from the start, block by block."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from keepwarm.planner.schemes import automatic, lives, marked, uncached
from keepwarm.planner.traffic import END, Prompt, Spot
from tests.unit.planner.letters import BLOCK, WORDS, common_blocks, traffic_of


def times_of(words: list[tuple[float, str, int]]) -> list[float]:
    now, times = 0.0, []
    for wait_s, _, _ in words:
        now += wait_s
        times.append(now)
    return times


@given(WORDS, st.integers(0, 10), st.integers(0, 35), st.sampled_from([1, 4, 20]))
def test_automatic_reads_what_brute_force_finds(words, ttl_s, tokens_min, step):
    prompts, times = traffic_of(words).prompts, times_of(words)
    for i, usage in enumerate(automatic(prompts, BLOCK, ttl_s, tokens_min=tokens_min, step_tokens=step)):
        recent = [j for j in range(i) if times[i] - times[j] <= ttl_s]
        longest = max((common_blocks(words[i][1], words[j][1]) for j in recent), default=0) * BLOCK
        expected = longest // step * step
        assert usage.cache_read == (expected if expected >= tokens_min else 0)
        assert usage.prompt == prompts[i].n_tokens
        assert usage.cache_write == 0


def test_automatic_leaves_a_token_to_compute():
    prompts = traffic_of([(0, "ab", 0), (1, "ab", 0)]).prompts
    assert [usage.cache_read for usage in automatic(prompts, BLOCK, 60, tokens_min=0)] == [0, 19]


@given(WORDS, st.integers(0, 10), st.integers(0, 35))
def test_a_mark_at_the_end_reads_what_brute_force_finds(words, ttl_s, tokens_min):
    prompts, times = traffic_of(words).prompts, times_of(words)
    found = marked(prompts, {END: ttl_s}, tokens_min=tokens_min, lookback=None)
    alive_until: dict[str, float] = {}
    for i, usage in enumerate(found):
        word = words[i][1]
        live = [one for one, until_s in alive_until.items() if word.startswith(one) and until_s >= times[i]]
        if len(word) * BLOCK < tokens_min:
            assert (usage.cache_read, usage.cache_write, usage.fresh) == (0, 0, prompts[i].n_tokens)
            continue
        longest = max(live, key=len, default="")
        assert usage.cache_read == len(longest) * BLOCK
        assert usage.cache_write == (len(word) - len(longest)) * BLOCK
        assert usage.prompt == prompts[i].n_tokens
        for one in (word, longest):
            if one:
                alive_until[one] = times[i] + ttl_s


@given(WORDS, st.integers(1, 60))
def test_classes_add_up_whatever_is_marked(words, ttl_s):
    traffic = traffic_of(words)
    marks = {place: ttl_s * 100 if i % 2 else ttl_s for i, place in enumerate(traffic.places)}
    for prompt, usage in zip(traffic.prompts, marked(traffic.prompts, marks, tokens_min=1, lookback=20), strict=True):
        assert usage.prompt == prompt.n_tokens
        assert min(usage.fresh, usage.cache_read, usage.cache_write, usage.cache_write_long) >= 0
        assert usage.cache_write_long <= usage.cache_write


def test_an_hour_is_paid_up_to_the_last_mark_for_an_hour_and_a_use_renews_it():
    prompt = traffic_of([(0, "abc", 5)]).prompts[0]
    first = prompt.__class__(0.0, 35, (), prompt.spots, {"system": 0, "last message": 2})
    later = [first.__class__(at, 35, (), first.spots, first.places) for at in (200.0, 3700.0, 7400.0)]
    usages = marked((first, *later), {"system": 3600, "last message": 300}, tokens_min=1, lookback=20)
    assert [(u.cache_read, u.cache_write, u.cache_write_long, u.fresh) for u in usages] == [
        (0, 30, 10, 5),
        (30, 0, 0, 5),
        (10, 20, 0, 5),  # the system text lives: its hour began anew at 200 s; the end does not
        (0, 30, 10, 5),  # 3,700 s later its hour is over too
    ]


def test_an_entry_keeps_its_longest_lifetime_until_it_is_over():
    spots = (Spot(0, 10), Spot(1, 20))

    def at(at_s: float, *places: tuple[str, int]) -> Prompt:
        return Prompt(at_s, 25, (), spots, dict(places))

    prompts = [
        at(0, ("long", 0)),
        at(10, ("short", 0), ("end", 1)),
        at(20, ("short", 0), ("end", 1)),  # the read is of the end; the entry in it keeps its hour
        at(3000, ("short", 0)),
        at(6500, ("short", 0)),
        at(20000, ("short", 0)),  # its hour is over: from now on it has five minutes
        at(20100, ("short", 0)),
        at(21000, ("short", 0)),
    ]
    usages = marked(prompts, {"long": 3600, "short": 300, "end": 300}, tokens_min=1, lookback=20)
    assert [usage.cache_read for usage in usages] == [0, 10, 20, 10, 10, 0, 10, 0]


def test_a_mark_looks_back_a_bounded_number_of_blocks_of_the_request():
    def prompt(at_s: float, n_blocks: int):
        spots = tuple(Spot(k, 10 * (k + 1), position=k + 1) for k in range(n_blocks))
        return (
            traffic_of([(0, "a", 1)])
            .prompts[0]
            .__class__(at_s, 10 * n_blocks + 1, (), spots, {"last message": n_blocks - 1})
        )

    for n_more, n_read in ((19, 50), (20, 0)):
        usages = marked((prompt(0, 5), prompt(1, 5 + n_more)), {"last message": 300}, tokens_min=1, lookback=20)
        assert usages[1].cache_read == n_read


@given(WORDS, st.integers(0, 10), st.integers(1, 35))
def test_objects_live_until_nobody_came_for_their_time(words, ttl_s, tokens_min):
    prompts, times = traffic_of(words).prompts, times_of(words)
    found = lives(prompts, END, ttl_s, tokens_min=tokens_min)
    used = sorted(i for life in found for i in life.uses)
    assert used == [i for i, (_, word, _) in enumerate(words) if len(word) * BLOCK >= tokens_min]
    for life in found:
        assert {words[i][1] for i in life.uses} == {words[life.uses[0]][1]}
        assert life.n_tokens == len(words[life.uses[0]][1]) * BLOCK
        moments = [times[i] for i in life.uses]
        assert all(later - earlier <= ttl_s for earlier, later in itertools.pairwise(moments))
        assert life.lived_s == moments[-1] - moments[0] + ttl_s
    of_word: dict[str, list[tuple[float, float]]] = {}
    for life in found:
        of_word.setdefault(words[life.uses[0]][1], []).append((times[life.uses[0]], times[life.uses[-1]]))
    for spans in of_word.values():
        assert all(
            after[0] - before[1] > ttl_s for before, after in zip(sorted(spans), sorted(spans)[1:], strict=False)
        )


@given(WORDS)
def test_without_caching_all_is_fresh(words):
    prompts = traffic_of(words).prompts
    assert [(u.fresh, u.prompt) for u in uncached(prompts)] == [(p.n_tokens, p.n_tokens) for p in prompts]
