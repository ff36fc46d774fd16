"""What the calls took, cost and saved: numbers and a table. Pure.

A call's cost "with" is what it cost as it was made, "without" what it would have without a cache, both by the same price
sheet. Making and keeping the object is not in the calls' costs; it is told beside them.
"""

from collections.abc import Sequence
from statistics import median

from msgspec import Struct
from rich.markup import escape
from rich.table import Table

from keepwarm.billing.price import creation_nano, storage_nano, turn_charge, uncached_nano
from keepwarm.billing.price_book import shipped_prices
from keepwarm.billing.sheet import NANO
from keepwarm.core.event import Usage
from keepwarm.demo.client import Answer

PRICES = shipped_prices("kimi@2024-07-01", "moonshot-v1-8k")


class Call(Struct, frozen=True):
    """One call, and the tokens of the cache object it named (0: it named none).

    `is_equal` tells whether the answer is the uncached one; None where there is nothing to compare with.
    """

    what: str
    answer: Answer
    n_object: int = 0
    is_equal: bool | None = None

    @property
    def uses_cache(self) -> bool:
        return self.n_object > 0

    @property
    def without_nano(self) -> int:
        return uncached_nano(PRICES, Usage(self.answer.n_prompt, 0, 0, self.answer.n_output))

    @property
    def with_nano(self) -> int:
        answer = self.answer
        n_cached = min(answer.n_cached, self.n_object)  # what was reused beyond the object is not free on this sheet
        usage = Usage(answer.n_prompt - n_cached, n_cached, 0, answer.n_output)
        return turn_charge(PRICES, usage, n_object=n_cached).total


class Keeping(Struct, frozen=True):
    """The object behind the calls: its tokens, and how long it was kept for them."""

    n_tokens: int
    lived_s: int

    @property
    def creation_nano(self) -> int:
        return creation_nano(PRICES, self.n_tokens)

    @property
    def storage_nano(self) -> int:
        return storage_nano(PRICES, self.n_tokens, self.lived_s)


def table(calls: Sequence[Call]) -> Table:
    """A row per call."""
    found = Table(title="Costs in CNY by Kimi's price sheet of July 2024 (8k model)", title_justify="left")
    found.add_column("call", no_wrap=True)
    for heading in ("prompt tokens", "cached tokens", "TTFT ms", "with cache", "without"):
        found.add_column(heading, justify="right")
    found.add_column("answer equal?", justify="center")
    for call in calls:
        answer = call.answer
        equal = {None: "", True: "[green]yes[/]", False: "[bold red]NO[/]"}[call.is_equal]
        cost_with = shown_cny(call.with_nano) if call.uses_cache else ""
        counts = (f"{answer.n_prompt:,}", f"{answer.n_cached:,}", f"{answer.ttft_ms:,.0f}")
        found.add_row(escape(call.what), *counts, cost_with, shown_cny(call.without_nano), equal)
    return found


def keeping_line(calls: Sequence[Call], keeping: Keeping) -> str:
    """What the object itself cost in this run, and the run as a whole."""
    cached = [call for call in calls if call.uses_cache]
    calls_with, calls_without = sum(call.with_nano for call in cached), sum(call.without_nano for call in cached)
    everything = calls_with + keeping.creation_nano + keeping.storage_nano
    return (
        f"On top: creation ¥{shown_cny(keeping.creation_nano)} once, storage ¥{shown_cny(keeping.storage_nano)} "
        f"for the {keeping.lived_s} s the object was kept (begun minutes count in full). "
        f"The {len(cached)} calls with all of it: ¥{shown_cny(everything)}, without a cache: ¥{shown_cny(calls_without)}."
    )


def last_line(calls: Sequence[Call]) -> str:
    """The two reductions: time to first token (median of the cached calls) and cost of a call, against uncached."""
    [uncached, *_] = [call for call in calls if not call.uses_cache]
    cached = [call for call in calls if call.uses_cache]
    cold_ms, warm_ms = uncached.answer.ttft_ms, median(call.answer.ttft_ms for call in cached)
    cost_with, cost_without = sum(call.with_nano for call in cached), sum(call.without_nano for call in cached)
    return (
        f"Warm calls against uncached: time to first token {reduction(cold_ms, warm_ms)} "
        f"({cold_ms:,.0f} → {warm_ms:,.0f} ms), cost of a call {reduction(cost_without, cost_with)} "
        f"(¥{shown_cny(cost_without // len(cached))} → ¥{shown_cny(cost_with // len(cached))})"
    )


def reduction(before: float, after: float) -> str:
    """The change with its sign: −98.7 % when `after` is 1.3 % of `before`."""
    change = (after - before) / before * 100
    return f"{'+' if change > 0 else '−'}{abs(change):.1f} %"


def shown_cny(nano: int) -> str:
    """An amount in yuan, to a hundredth of a fen."""
    return f"{nano / NANO:.4f}"
