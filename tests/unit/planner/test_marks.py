"""The recommended marks against brute force over all sets of places."""

from itertools import combinations

from hypothesis import given
from hypothesis import strategies as st

from keepwarm.billing.price_book import shipped_prices
from keepwarm.planner.marks import MARKS_MAX, Marking, best_marks
from keepwarm.planner.traffic import Prompt, Spot
from tests.unit.planner.letters import WORDS, traffic_of

PRICES = shipped_prices("minimax-international@2026", "MiniMax-M2.1")


@given(WORDS, st.integers(1, 60))
def test_what_each_mark_gains_adds_up_and_no_single_one_is_better(words, ttl_s):
    traffic = traffic_of(words)
    marking = Marking(ttl_s, tokens_min=1, lookback=None)
    best = best_marks(traffic.prompts, PRICES, traffic.places, marking)
    none = marking.replayed(traffic.prompts, PRICES, ()).charge.total
    assert none - sum(best.gains_nano) == best.spent.charge.total
    assert best.spent == marking.replayed(traffic.prompts, PRICES, best.places)
    assert all(gain > 0 for gain in best.gains_nano)
    for place in traffic.places:
        alone = marking.replayed(traffic.prompts, PRICES, (place,)).charge.total
        assert best.spent.charge.total <= alone
        [tried] = [one for one in best.tried if one.place == place]
        assert tried.saving_nano == none - alone


def system_and_questions(n_users: int) -> list[Prompt]:
    """All begin with 1,000 tokens of system text and go on alone with 1,000 more, two turns each."""
    prompts = []
    for user in range(n_users):
        for turn in range(2):
            ends = (1000, 2000, 3000)[: 2 + turn]
            spots = tuple(Spot(-1 if end == 1000 else 10 * user + end, end) for end in ends)
            prompts.append(
                Prompt(float(len(prompts)), ends[-1], (), spots, {"system": 0, "last message": len(ends) - 1})
            )
    return prompts


def test_conversations_over_one_system_text_want_both_marks_and_that_is_the_best_set():
    prompts, marking = system_and_questions(10), Marking(300, tokens_min=1, lookback=20)
    best = best_marks(prompts, PRICES, ("system", "last message"), marking)
    assert set(best.places) == {"system", "last message"}
    sets = [places for n in range(3) for places in combinations(("system", "last message"), n)]
    assert best.spent.charge.total == min(marking.replayed(prompts, PRICES, places).charge.total for places in sets)


def test_prompts_that_share_nothing_want_no_marks():
    prompts = [Prompt(float(k), 5000, (), (Spot(k, 5000),), {"last message": 0}) for k in range(5)]
    best = best_marks(prompts, PRICES, ("last message",), Marking(300, tokens_min=1, lookback=20))
    assert best.places == ()
    assert best.tried[0].saving_nano < 0


def test_no_more_marks_than_a_request_may_have():
    places = {f"message {k}": k for k in range(6)}  # each is shared by two requests that have nothing more in common
    prompts = [
        Prompt(
            float(k),
            7000,
            (),
            tuple(Spot(m if m <= k // 2 else 100 + 10 * k + m, 1000 * (m + 1)) for m in range(6)),
            places,
        )
        for k in range(12)
    ]
    best = best_marks(prompts, PRICES, tuple(places), Marking(300, tokens_min=1, lookback=None))
    assert 1 < len(best.places) <= MARKS_MAX
