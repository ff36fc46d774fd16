"""Costs of replays: the vendors' worked examples, and objects that do not pay are not made."""

from keepwarm.billing.price import turn_charge
from keepwarm.billing.price_book import shipped_prices
from keepwarm.core.event import Usage
from keepwarm.planner.cost import spent, spent_with_objects
from keepwarm.planner.schemes import Life, lives, uncached
from keepwarm.planner.traffic import Prompt, Spot

KIMI = shipped_prices("kimi@2024-07-01", "moonshot-v1-128k")
MINIMAX = shipped_prices("minimax@2026", "worked-example")


def test_minimaxs_worked_example_comes_out():
    with_cache = spent(MINIMAX, [Usage(5_000, 45_000, 0, 1_000)])
    without = spent(MINIMAX, [Usage(50_000, 0, 0, 1_000)])
    assert (with_cache.charge.total, without.charge.total) == (135_000_000, 540_000_000)
    assert (with_cache.n_read, with_cache.n_prompt) == (45_000, 50_000)


def test_kimis_worked_example_comes_out_of_a_replay():
    prompts = [Prompt(60.0 * k, 100_000, (), (Spot(0, 100_000),), {"system": 0}, n_output=0) for k in range(5)]
    found = spent_with_objects(KIMI, uncached(prompts), lives(prompts, "system", 360, tokens_min=1))
    charge = found.charge
    assert (charge.creation, charge.storage, charge.call) == (2_400_000_000, 10_000_000_000, 100_000_000)
    assert charge.total == 12_500_000_000
    assert (found.n_read, found.n_objects) == (500_000, 1)


def test_an_object_that_does_not_pay_is_not_made():
    usages = [Usage(100_000, 0, 0, 0)] * 2
    once = Life(100_000, 300.0, (0,))  # 6 uncached; 2.4 to make it and 5 to keep it
    found = spent_with_objects(KIMI, usages, [once])
    assert found == spent(KIMI, usages)
    twice = Life(100_000, 300.0, (0, 1))
    assert spent_with_objects(KIMI, usages, [twice]).n_objects == 1


def test_prompts_outside_of_objects_are_paid_as_they_are():
    usages = [Usage(100_000, 0, 0, 0)] * 2 + [Usage(70, 0, 0, 9)]
    found = spent_with_objects(KIMI, usages, [Life(90_000, 60.0, (0, 1))])
    assert (
        found.charge.fresh == 2 * turn_charge(KIMI, Usage(10_000, 0, 0, 0)).fresh + turn_charge(KIMI, usages[2]).fresh
    )
    assert found.charge.output == turn_charge(KIMI, usages[2]).output
    assert found.n_prompt == 200_070
