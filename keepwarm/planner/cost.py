"""Replayed tokens at a sheet's prices. The amounts themselves come from `billing.price`; here they are only added up."""

from collections.abc import Iterable, Sequence

from msgspec import Struct

from keepwarm.billing.price import Charge, creation_nano, storage_nano, turn_charge
from keepwarm.billing.sheet import ModelPrices
from keepwarm.core.event import Usage
from keepwarm.planner.schemes import Life


class Spent(Struct, frozen=True):
    """What all turns come to. `n_prompt` and `n_read` in tokens; `n_objects` cache objects were made."""

    charge: Charge
    n_prompt: int
    n_read: int
    n_written: int
    n_objects: int = 0


def spent(prices: ModelPrices, usages: Iterable[Usage]) -> Spent:
    """Turns without cache objects."""
    counted = list(usages)
    return Spent(
        total(turn_charge(prices, usage) for usage in counted),
        n_prompt=sum(usage.prompt for usage in counted),
        n_read=sum(usage.cache_read for usage in counted),
        n_written=sum(usage.cache_write for usage in counted),
    )


def spent_with_objects(prices: ModelPrices, usages: Sequence[Usage], lives: Iterable[Life]) -> Spent:
    """Turns of `usages`, which read nothing, with those of the objects that pay for themselves. No prompt is in two lives."""
    charges = [turn_charge(prices, usage) for usage in usages]
    kept: list[Charge] = []
    n_read = n_written = n_objects = 0
    for life in lives:
        n = life.n_tokens
        own = Charge(creation=creation_nano(prices, n), storage=storage_nano(prices, n, life.lived_s))
        read = {i: turn_charge(prices, _reading(usages[i], n), n_object=n) for i in life.uses}
        if own.total + sum(charge.total for charge in read.values()) >= sum(charges[i].total for i in life.uses):
            continue
        kept.append(own)
        for i, charge in read.items():
            charges[i] = charge
        n_read += n * len(read)
        n_written += n
        n_objects += 1
    n_prompt = sum(usage.prompt for usage in usages)
    return Spent(total((*charges, *kept)), n_prompt, n_read, n_written, n_objects)


def total(charges: Iterable[Charge]) -> Charge:
    """The sum, class by class."""
    sums = dict.fromkeys(Charge.__struct_fields__, 0)
    for charge in charges:
        for name in sums:
            sums[name] += getattr(charge, name)
    return Charge(**sums)


def _reading(usage: Usage, n_tokens: int) -> Usage:
    return Usage(usage.prompt - n_tokens, n_tokens, 0, usage.output)
