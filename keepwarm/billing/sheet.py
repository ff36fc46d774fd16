"""Price sheets. Rates are integers: nano per million tokens, 1 nano being 10⁻⁹ of the sheet's currency."""

from datetime import date
from decimal import Decimal
from fractions import Fraction
from typing import Literal

from msgspec import Struct

NANO = 10**9
TOKENS_PER_RATE = 10**6


def decimal_text(nano: int) -> str:
    """An amount exactly and without trailing zeros: "0.0015"."""
    return format(Decimal(nano).scaleb(-9).normalize(), "f")


class Rates(Struct, frozen=True):
    """Prices of tokens, in nano per million, for prompts of at most `prompt_tokens_max` tokens (None: of any length)."""

    input: int
    output: int
    read: int  # restored, by a breakpoint or automatically
    write: int  # stored because a breakpoint asked for it, to stay for minutes
    write_long: int  # the same, to stay for an hour
    prompt_tokens_max: int | None = None


class StorageRate(Struct, frozen=True):
    """Keeping a cache object: nano per million tokens and unit of time; a begun unit is paid in full if `begun_counts`."""

    nano_per_unit: int
    unit_s: Literal[60, 3600]
    begun_counts: bool


class ObjectRates(Struct, frozen=True):
    """Cache objects, where a vendor sells them. `read` None: tokens read from an object cost what other reads do."""

    creation: int = 0  # nano per million tokens, once. 0 where the making is paid as the input it is
    creation_is_input: bool = False  # Gemini: making an object costs its tokens at the input price
    storage: StorageRate | None = None
    call_nano: int = 0  # for each call that reads from an object
    read: int | None = None


class ModelPrices(Struct, frozen=True):
    """What one model costs. `tiers` by length of prompt, shortest first; the last one has no bound."""

    tiers: tuple[Rates, ...]
    objects: ObjectRates = ObjectRates()
    batch_multiple: Fraction = Fraction(1)  # of everything but storage, for work that can wait

    def rates(self, n_prompt: int) -> Rates:
        """The tier of a prompt of this length; all of the prompt and its answer are paid by it."""
        for tier in self.tiers:
            if tier.prompt_tokens_max is None or n_prompt <= tier.prompt_tokens_max:
                return tier
        raise AssertionError("the last tier has no bound")


class PriceSheet(Struct, frozen=True):
    """A vendor's prices, or the operator's, from one day on. Models by the names that the sheet gives them."""

    name: str
    version: str
    currency: str
    effective_from: date
    source: str
    models: dict[str, ModelPrices]

    @property
    def id(self) -> str:
        """What ledger rows carry: "kimi@2024-07-01"."""
        return f"{self.name}@{self.version}"
