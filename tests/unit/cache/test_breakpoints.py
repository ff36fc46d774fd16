"""Anthropic's rules one by one, in their own examples; tests/property/test_breakpoints.py has the twin."""

import numpy as np

from keepwarm.cache.breakpoints import Chosen, Entry, choose
from keepwarm.core.prompt import Breakpoint, Tokens

PROMPT: Tokens = np.arange(10_000, dtype=np.int32)
MIN = 512


def ask(
    known: list[Entry],
    *breakpoints: tuple[int, int | None, int],
    tokens: Tokens = PROMPT,
    now: float = 0.0,
    root: bytes = b"r",
) -> Chosen:
    """Each breakpoint as (end, ttl_s, position)."""
    by_length: dict[int, dict[bytes, Entry]] = {}
    for entry in known:
        by_length.setdefault(entry.n_tokens, {})[entry.digest] = entry
    marks = [Breakpoint(*one) for one in breakpoints]
    return choose(marks, tokens, by_length, root=root, tokens_min=MIN, now=now)


def wrote(*breakpoints: tuple[int, int | None, int], now: float = 0.0) -> list[Entry]:
    """The entries that a first request leaves."""
    return list(ask([], *breakpoints, now=now).kept)


def ends(chosen: Chosen) -> tuple[int, int, int]:
    return chosen.read_end, chosen.write_long_end, chosen.write_end


def test_the_first_request_writes_up_to_its_last_breakpoint_and_the_second_reads_it() -> None:
    first = ask([], (6702, 300, 3))
    assert ends(first) == (0, 0, 6702)
    assert [(e.n_tokens, e.position, e.ttl_s, e.expires_at) for e in first.kept] == [(6702, 3, 300, 300.0)]
    assert ends(ask(list(first.kept), (6702, 300, 3), now=10.0)) == (6702, 0, 6702)


def test_with_mixed_lifetimes_the_long_ones_end_where_the_short_ones_begin() -> None:
    assert ends(ask(wrote((1000, 3600, 1)), (1000, 3600, 1), (3000, 3600, 5), (4000, 300, 9))) == (1000, 3000, 4000)
    assert ends(ask(wrote((3000, 3600, 5)), (1000, 3600, 1), (3000, 3600, 5), (4000, 300, 9))) == (3000, 3000, 4000)


def test_too_short_a_prefix_is_ignored_and_an_exact_one_is_not() -> None:
    assert ask([], (511, 300, 1)) == Chosen(0, 0, 0)
    assert ask([], (511, 3600, 1), (512, 300, 2)).write_end == 512


def test_a_breakpoint_without_a_lifetime_neither_reads_nor_writes() -> None:
    assert ask(wrote((1000, 300, 1)), (1000, None, 1)) == Chosen(0, 0, 0)


def test_the_look_back_counts_the_breakpoint_itself() -> None:
    known = wrote((1000, 300, 1))
    assert ask(known, (4000, 300, 20)).read_end == 1000
    far = ask(known, (4000, 300, 21))
    assert (far.read_end, far.n_too_far) == (0, 1000)


def test_each_earlier_breakpoint_looks_back_on_its_own() -> None:
    known = wrote((1000, 300, 1))
    assert ask(known, (1500, 300, 2), (9000, 300, 90)).read_end == 1000


def test_an_entry_behind_the_last_breakpoint_is_neither_read_nor_too_far() -> None:
    known = wrote((5000, 300, 4))
    chosen = ask(known, (4000, 300, 3))
    assert (chosen.read_end, chosen.n_too_far) == (0, 0)


def test_an_entry_is_dead_from_its_last_moment_on() -> None:
    known = wrote((1000, 300, 1), (2000, 300, 2))
    assert ask(known, (2000, 300, 2), now=299.9).read_end == 2000
    dead = ask(known, (2000, 300, 2), now=300.0)
    assert (dead.read_end, dead.n_expired, dead.write_end) == (0, 2000, 2000)


def test_what_is_read_lives_on_and_so_does_what_is_marked_again() -> None:
    known = wrote((1000, 3600, 1), (2000, 300, 2))
    later = ask(known, (1000, 3600, 1), (3000, 300, 3), now=200.0)
    assert [(e.n_tokens, e.ttl_s, e.expires_at) for e in sorted(later.kept, key=lambda e: e.n_tokens)] == [
        (1000, 3600, 3800.0),
        (2000, 300, 500.0),
        (3000, 300, 500.0),
    ]


def test_a_longer_mark_lengthens_a_lifetime_and_a_shorter_one_does_not_shorten_it() -> None:
    assert [e.ttl_s for e in ask(wrote((1000, 300, 1)), (1000, 3600, 1)).kept] == [3600]
    assert [(e.ttl_s, e.expires_at) for e in ask(wrote((1000, 3600, 1)), (1000, 300, 1), now=9.0).kept] == [
        (3600, 3609)
    ]
    assert [e.ttl_s for e in ask(wrote((1000, 3600, 1)), (1000, 300, 1), now=4000.0).kept] == [300]


def test_two_breakpoints_at_one_end_are_one_entry_with_the_longer_lifetime() -> None:
    chosen = ask([], (1000, 3600, 1), (1000, 300, 2))
    assert [(e.n_tokens, e.ttl_s, e.position) for e in chosen.kept] == [(1000, 3600, 2)]


def test_another_prompt_or_another_model_reads_nothing() -> None:
    known = wrote((1000, 300, 1))
    other = PROMPT.copy()
    other[999] += 1
    assert ask(known, (2000, 300, 2), tokens=other).read_end == 0
    assert ask(known, (2000, 300, 2), root=b"other").read_end == 0
