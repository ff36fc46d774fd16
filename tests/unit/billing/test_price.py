"""The arithmetic of money, and that a ceiling is one. The vendors' worked examples are in test_sheets.py."""

from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keepwarm.billing.price import ceiling_nano, creation_nano, storage_nano, turn_charge, uncached_nano
from keepwarm.billing.sheet import NANO, ModelPrices, ObjectRates, Rates, StorageRate
from keepwarm.core.event import Usage

PLAIN = ModelPrices((Rates(input=10 * NANO, output=40 * NANO, read=1 * NANO, write=12 * NANO, write_long=20 * NANO),))
TIERED = ModelPrices(
    (
        Rates(1 * NANO, 4 * NANO, 1 * NANO, 1 * NANO, 1 * NANO, prompt_tokens_max=100),
        Rates(2 * NANO, 8 * NANO, 2 * NANO, 2 * NANO, 2 * NANO),
    )
)

amounts = st.integers(0, 100 * NANO)


@st.composite
def prices(draw: st.DrawFn) -> ModelPrices:
    bounds = sorted(draw(st.sets(st.integers(1, 300), max_size=2)))
    tiers = tuple(Rates(*(draw(amounts) for _ in range(5)), bound) for bound in (*bounds, None))
    objects = ObjectRates(call_nano=draw(amounts), read=draw(st.none() | amounts))
    return ModelPrices(tiers, objects, draw(st.fractions(0, 1, max_denominator=20)))


@st.composite
def usages(draw: st.DrawFn) -> tuple[Usage, int]:
    """A use, and how many of its tokens were read from an object."""
    fresh, read, write, output = (draw(st.integers(0, 200)) for _ in range(4))
    usage = Usage(fresh, read, write, output, cache_write_long=draw(st.integers(0, write)))
    return usage, draw(st.integers(0, read))


def test_each_class_is_paid_at_its_own_rate() -> None:
    usage = Usage(fresh=7, cache_read=5, cache_write=9, output=3, cache_write_long=4)
    charge = turn_charge(PLAIN, usage)
    assert (charge.fresh, charge.read, charge.write, charge.output) == (70_000, 5_000, 5 * 12_000 + 4 * 20_000, 120_000)
    assert (charge.call, charge.creation, charge.storage) == (0, 0, 0)
    assert charge.total == 335_000
    assert uncached_nano(PLAIN, usage) == 21 * 10_000 + 120_000


def test_a_class_is_rounded_once_and_a_half_goes_up() -> None:
    half = ModelPrices((Rates(500_000, 499_999, 500_001, 1_500_000, 1_500_000),))
    charge = turn_charge(half, Usage(1, 1, 1, 1))
    assert (charge.fresh, charge.output, charge.read, charge.write) == (1, 0, 1, 2)
    assert turn_charge(half, Usage(3, 0, 0, 0)).fresh == 2  # 1.5 rounded once; three roundings of 0.5 would be 3


@pytest.mark.parametrize("n_prompt, per_token, per_output", [(100, 1_000, 4_000), (101, 2_000, 8_000)])
def test_the_length_of_the_whole_prompt_chooses_the_tier(n_prompt: int, per_token: int, per_output: int) -> None:
    charge = turn_charge(TIERED, Usage(10, n_prompt - 10, 0, 2))
    assert (charge.fresh, charge.output) == (10 * per_token, 2 * per_output)


def test_a_batch_multiplies_everything_of_a_turn() -> None:
    halved = ModelPrices(PLAIN.tiers, ObjectRates(call_nano=20, read=0), Fraction(1, 2))
    usage = Usage(10, 10, 10, 10)
    full, batch = turn_charge(halved, usage, n_object=5), turn_charge(halved, usage, n_object=5, is_batch=True)
    assert (batch.fresh, batch.read, batch.write, batch.output, batch.call) == (
        full.fresh // 2,
        full.read // 2,
        full.write // 2,
        full.output // 2,
        10,
    )
    assert uncached_nano(halved, usage, is_batch=True) == uncached_nano(halved, usage) // 2


def test_tokens_of_an_object_have_its_price_and_others_that_were_read_have_theirs() -> None:
    objects = ModelPrices(PLAIN.tiers, ObjectRates(call_nano=20, read=0))
    charge = turn_charge(objects, Usage(0, 10, 0, 0), n_object=6)
    assert (charge.read, charge.call) == (4 * 1_000, 20)


def test_without_a_price_of_their_own_an_objects_tokens_cost_what_others_do() -> None:
    objects = ModelPrices(PLAIN.tiers, ObjectRates(call_nano=20))
    assert turn_charge(objects, Usage(0, 10, 0, 0), n_object=6).read == 10 * 1_000


def test_a_call_that_read_nothing_from_an_object_pays_no_fee() -> None:
    assert turn_charge(ModelPrices(PLAIN.tiers, ObjectRates(call_nano=20)), Usage(0, 10, 0, 0)).call == 0


def test_more_of_an_object_than_was_read_is_our_bug() -> None:
    with pytest.raises(AssertionError, match="11 of 10"):
        turn_charge(PLAIN, Usage(0, 10, 0, 0), n_object=11)


@given(prices(), usages(), st.booleans(), st.integers(0, 50), st.integers(0, 50))
def test_no_turn_costs_more_than_its_ceiling(
    model: ModelPrices, use: tuple[Usage, int], is_batch: bool, n_not_evaluated: int, n_not_produced: int
) -> None:
    usage, n_object = use
    n_prompt, n_output_max = usage.prompt + n_not_evaluated, usage.output + n_not_produced
    ceiling = ceiling_nano(model, n_prompt, n_output_max, n_object=n_object, is_batch=is_batch)
    assert turn_charge(model, usage, n_object=n_object, is_batch=is_batch).total <= ceiling


def test_a_ceiling_allows_for_classes_that_are_rounded_one_by_one() -> None:
    half = ModelPrices((Rates(500_000, 0, 500_000, 500_000, 500_000),))
    usage = Usage(1, 1, 1, 0)
    assert turn_charge(half, usage).total == ceiling_nano(half, usage.prompt, 0) == 3


def test_a_ceiling_holds_for_a_turn_broken_off_in_a_dearer_tier_of_shorter_prompts() -> None:
    cheaper_when_long = ModelPrices((Rates(*[2 * NANO] * 5, prompt_tokens_max=100), Rates(*[1 * NANO] * 5)))
    assert turn_charge(cheaper_when_long, Usage(100, 0, 0, 50)).total == 300_000
    assert ceiling_nano(cheaper_when_long, 101, 50) >= 300_000


def test_a_ceiling_holds_where_an_objects_tokens_are_the_dearest() -> None:
    dear = ModelPrices(PLAIN.tiers, ObjectRates(read=50 * NANO))
    assert turn_charge(dear, Usage(0, 100, 0, 0), n_object=100).total == 5_000_000
    assert ceiling_nano(dear, 100, 0, n_object=100) >= 5_000_000


def test_a_ceiling_is_no_more_than_the_dearest_turn_and_the_rounding() -> None:
    all_written_for_an_hour = Usage(0, 0, 1000, 50, cache_write_long=1000)
    assert ceiling_nano(PLAIN, 1000, 50) == turn_charge(PLAIN, all_written_for_an_hour).total + 1


def test_making_an_object_costs_its_own_price_or_its_tokens_as_input() -> None:
    assert creation_nano(ModelPrices(PLAIN.tiers, ObjectRates(creation=24 * NANO)), 1000) == 24_000_000
    as_input = ModelPrices(TIERED.tiers, ObjectRates(creation_is_input=True))
    assert (creation_nano(as_input, 100), creation_nano(as_input, 101)) == (100 * 1_000, 101 * 2_000)


@pytest.mark.parametrize("lived_s, minutes", [(-1, 0), (0, 0), (1, 1), (59, 1), (60, 1), (60.5, 2), (61, 2), (600, 10)])
def test_a_begun_minute_counts_in_full(lived_s: float, minutes: int) -> None:
    begun = ModelPrices(PLAIN.tiers, ObjectRates(storage=StorageRate(10 * NANO, 60, begun_counts=True)))
    assert storage_nano(begun, 1_000_000, lived_s) == minutes * 10 * NANO


def test_exact_storage_is_paid_by_the_second() -> None:
    exact = ModelPrices(PLAIN.tiers, ObjectRates(storage=StorageRate(3600, 3600, begun_counts=False)))
    assert [storage_nano(exact, 1_000_000, lived_s) for lived_s in (0, 1, 1.25, 1.5, 3600)] == [0, 1, 1, 2, 3600]


def test_without_a_price_storage_costs_nothing() -> None:
    assert storage_nano(PLAIN, 1_000_000, 3600) == 0


@given(st.lists(st.integers(0, 10_000), min_size=1, max_size=8), st.sampled_from([60, 3600]), st.booleans(), amounts)
def test_parts_of_a_life_add_up_to_the_whole(parts_s: list[int], unit_s: int, begun: bool, rate: int) -> None:
    model = ModelPrices(PLAIN.tiers, ObjectRates(storage=StorageRate(rate, unit_s, begun_counts=begun)))
    ends_s = [sum(parts_s[:number]) for number in range(len(parts_s) + 1)]
    costs = [storage_nano(model, 777, end_s) for end_s in ends_s]
    parts = [after - before for before, after in pairwise(costs)]
    assert sum(parts) == costs[-1]
    assert min(parts) >= 0
