import pytest
from msgspec.structs import replace

from keepwarm.bench.agent_report import Caching, Samples, TurnSample, flat_medians, ratios


def turn(number: int, caching: Caching, n_prompt: int, n_read: int, ttft_ms: float) -> TurnSample:
    return TurnSample(
        number=number,
        caching=caching,
        n_prompt=n_prompt,
        n_new=100,
        n_read=n_read,
        n_written=90,
        n_fresh=n_prompt - n_read - 90,
        ttft_ms=ttft_ms,
        phases={},
        outcome="hit",
        tier="host",
        cause=None,
        answer=f"answer {number}",
    )


def samples(*read: int) -> Samples:
    """Prompts of 1,000 tokens."""
    on = [turn(number, "on", 1000, n_read, 50.0) for number, n_read in enumerate(read, 1)]
    off = [turn(number, "off", 1000, 0, 1000.0 * number) for number in range(1, len(read) + 1)]
    return Samples([*on, *off])


def judged(found: Samples) -> list[tuple[float | None, bool | None]]:
    return [(one.value, one.reached) for one in ratios(found)]


def test_the_first_two_turns_do_not_count() -> None:
    assert judged(samples(0, 0, 960, 950)) == [(95.5, True), (95.0, True), (1.25, True), (100.0, True)]


def test_one_low_turn_shows_beside_a_share_that_is_reached() -> None:
    assert judged(samples(0, 900, 940, 990))[:2] == [(96.5, True), (94.0, False)]


def test_an_answer_that_differs_is_counted() -> None:
    found = samples(0, 900, 960, 960)
    found.turns[1] = replace(found.turns[1], answer="another")
    assert judged(found)[-1] == (75.0, False)


def test_sides_of_unequal_length_are_no_result() -> None:
    found = samples(0, 900, 960)
    del found.turns[-1]
    with pytest.raises(ValueError):
        ratios(found)


def test_sums_and_ends() -> None:
    at = flat_medians(samples(0, 900, 960))
    assert (at["on.prompt_tokens"], at["on.read_tokens"], at["on.evaluated_tokens"]) == (3000, 1860, 1140)
    assert (at["off.first_ttft_ms"], at["off.last_ttft_ms"], at["off.all_ttft_ms"]) == (1000, 3000, 6000)
    assert at["on.evaluated_beyond_new_tokens"] == 1000 - 960 - 100
