"""What use costs: the one place that computes money. Pure and in integers.

Each class of a charge is tokens times rate, rounded once, half up, to a nano. Tokens are counted by the engine; a class
that was not used costs 0.
"""

from fractions import Fraction

from msgspec import Struct

from keepwarm.billing.sheet import TOKENS_PER_RATE, ModelPrices
from keepwarm.core.event import Usage


class Charge(Struct, frozen=True):
    """A cost by class, in nano. `write` holds writes of both lifetimes, `call` the fee for reading a cache object."""

    fresh: int = 0
    read: int = 0
    write: int = 0
    output: int = 0
    call: int = 0
    creation: int = 0
    storage: int = 0

    @property
    def total(self) -> int:
        return self.fresh + self.read + self.write + self.output + self.call + self.creation + self.storage


def turn_charge(prices: ModelPrices, usage: Usage, *, n_object: int = 0, is_batch: bool = False) -> Charge:
    """A turn. `n_object` of `usage.cache_read` tokens were read from a cache object, and pay its prices."""
    assert 0 <= n_object <= usage.cache_read, f"{n_object} of {usage.cache_read} tokens read cannot be an object's"
    rates, objects = prices.rates(usage.prompt), prices.objects
    times = prices.batch_multiple if is_batch else Fraction(1)
    object_read = rates.read if objects.read is None else objects.read
    short = usage.cache_write - usage.cache_write_long
    return Charge(
        fresh=_nano(usage.fresh * rates.input, times),
        read=_nano((usage.cache_read - n_object) * rates.read + n_object * object_read, times),
        write=_nano(short * rates.write + usage.cache_write_long * rates.write_long, times),
        output=_nano(usage.output * rates.output, times),
        call=_rounded(objects.call_nano * times) if n_object else 0,
    )


def uncached_nano(prices: ModelPrices, usage: Usage, *, is_batch: bool = False) -> int:
    """What the same turn costs without any caching: all of the prompt at the input price."""
    return turn_charge(prices, Usage(usage.prompt, 0, 0, usage.output), is_batch=is_batch).total


def ceiling_nano(
    prices: ModelPrices, n_prompt: int, n_output_max: int, *, n_object: int = 0, is_batch: bool = False
) -> int:  # fmt: skip
    """The most a turn can cost before it is known what is read and written.

    A turn that is broken off may have come only to a shorter prompt's tier, so each rate is the dearest up to this one's.
    """
    objects, times = prices.objects, prices.batch_multiple if is_batch else Fraction(1)
    tiers = prices.tiers[: prices.tiers.index(prices.rates(n_prompt)) + 1]
    dearest = max(max(tier.input, tier.read, tier.write, tier.write_long) for tier in tiers)
    dearest = max(dearest, objects.read or 0)
    output = max(tier.output for tier in tiers)
    call = _rounded(objects.call_nano * times) if n_object else 0
    # Fresh, read and write are rounded one by one: together at most 3/2 above the exact sum, which is less than 1/2 above
    # its own rounding; so at most one whole nano above that.
    return _nano(n_prompt * dearest, times) + 1 + _nano(n_output_max * output, times) + call


def creation_nano(prices: ModelPrices, n_tokens: int) -> int:
    """Making a cache object of `n_tokens`."""
    objects = prices.objects
    rate = prices.rates(n_tokens).input if objects.creation_is_input else objects.creation
    return _nano(n_tokens * rate, Fraction(1))


def storage_nano(prices: ModelPrices, n_tokens: int, lived_s: float) -> int:
    """Keeping a cache object of `n_tokens` for the first `lived_s` seconds of its life, all together.

    What a part of a life costs is the difference of two of these, so that parts add up to the whole.
    """
    rate = prices.objects.storage
    if rate is None or lived_s <= 0:
        return 0
    units = Fraction(lived_s) / rate.unit_s
    if rate.begun_counts:
        units = Fraction(-(-units.numerator // units.denominator))
    return _nano(n_tokens * rate.nano_per_unit, units)


def _nano(tokens_times_rate: int, times: Fraction) -> int:
    return _rounded(Fraction(tokens_times_rate, TOKENS_PER_RATE) * times)


def _rounded(amount: Fraction) -> int:
    """To the nearest integer, a half up."""
    return (2 * amount.numerator + amount.denominator) // (2 * amount.denominator)
