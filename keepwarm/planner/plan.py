"""Every scheme and lifetime over one log, as rows."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal

from msgspec import Struct

from keepwarm.billing.sheet import ModelPrices
from keepwarm.core.event import Usage
from keepwarm.planner.cost import Spent, spent, spent_with_objects
from keepwarm.planner.marks import Best, Marking, best_marks
from keepwarm.planner.prices import Shown
from keepwarm.planner.schemes import automatic, lives, uncached
from keepwarm.planner.traffic import END, LAST, Traffic

Kind = Literal["automatic", "marks", "implicit", "objects"]
MIXED_S = (3600, 300)  # an hour for what comes first, five minutes for the last message
PLACES_MAX = 12  # tools, system, the last message and as many messages from the start as there is room for


class Scheme(Struct, frozen=True):
    """How one vendor caches, and the prices it is shown with unless others are asked for.

    `kind`: "automatic" reads what was there, "implicit" sets one mark at the end by itself, "marks" is told where, "objects"
    keeps prefixes for a price of their own. `mixed` adds a row with two lifetimes.
    """

    name: str
    kind: Kind
    ttls_s: tuple[int, ...]
    prices: str
    tokens_min: int
    lookback: int | None = None
    mixed: bool = False


# Lifetimes, least lengths and look-backs are the vendors' published ones. Where a vendor promises no lifetime (MiniMax's
# automatic caching) or leaves it to the client (objects), five minutes and an hour show what it makes.
SCHEMES = (
    Scheme("minimax", "automatic", (300, 3600), "minimax-international/MiniMax-M2.1", 512),
    Scheme("minimax-marks", "marks", (300,), "minimax-international/MiniMax-M2.1", 512, lookback=20),
    Scheme("anthropic", "marks", (300, 3600), "anthropic/standard", 1024, lookback=20, mixed=True),
    Scheme("openai", "implicit", (1800,), "openai/gpt-5.6", 1024),
    Scheme("kimi", "objects", (300, 3600), "kimi-international/moonshot-v1-32k", 1),
    Scheme("gemini", "objects", (300, 3600), "gemini/2.5-flash", 1024),
)


class Row(Struct, frozen=True):
    """One scheme with one lifetime. Amounts in nano of `currency`; None where the log does not say how long answers were.

    `places` are the marks it was replayed with, or where its objects end. `none_nano` is the same traffic at the same
    prices without caching; it, `total_nano` and so the saving leave answers out when `output_nano` is None.
    """

    scheme: str
    ttl: str
    prices: str
    currency: str
    places: tuple[str, ...]
    n_prompt_tokens: int
    n_read_tokens: int
    n_written_tokens: int
    n_objects: int
    hit_rate: float
    fresh_nano: int
    read_nano: int
    write_nano: int
    creation_nano: int
    storage_nano: int
    call_nano: int
    output_nano: int | None
    total_nano: int
    none_nano: int

    @property
    def saving_nano(self) -> int:
        return self.none_nano - self.total_nano

    @property
    def saving(self) -> float:
        """As a share of what it costs without caching; negative when caching costs more."""
        return self.saving_nano / self.none_nano if self.none_nano else 0.0


class MarkRow(Struct, frozen=True):
    """What one place is worth to a scheme. `gain_nano` None: not among the marks to set; else what it adds to the others."""

    scheme: str
    ttl: str
    place: str
    n_prompts: int
    n_tokens_mean: int
    saving_alone_nano: int
    gain_nano: int | None
    currency: str


class Plan(Struct, frozen=True):
    """The whole result."""

    log: str
    n_requests: int
    n_tokens: int
    rows: tuple[Row, ...]
    marks: tuple[MarkRow, ...]


def planned(
    traffic: Traffic,
    schemes: Sequence[Scheme],
    shown: Mapping[str, Shown],
    on_replay: Callable[[str], None] = lambda _scheme: None,
) -> Plan:
    """All rows, `shown` holding each scheme's prices by its name. `on_replay` is called with a scheme's name before each pass."""
    is_answered = all(prompt.n_output is not None for prompt in traffic.prompts)
    base = uncached(traffic.prompts)
    rows: list[Row] = []
    marks: list[MarkRow] = []
    for scheme in schemes:
        own = shown[scheme.name]
        none = spent(own.prices, base)
        rows.append(_row(scheme.name, "none", own, (), none, none, is_answered=is_answered))
        for ttl, places, found, best in _replayed(traffic, scheme, own.prices, base, on_replay):
            rows.append(_row(scheme.name, ttl, own, places, found, none, is_answered=is_answered))
            if best is not None:
                marks += _mark_rows(scheme.name, ttl, own.currency, best)
    return Plan(traffic.name, len(traffic.prompts), traffic.n_tokens, tuple(rows), tuple(marks))


def shown_ttl(ttl_s: int) -> str:
    """5m, 1h, 90s."""
    for unit_s, letter in ((3600, "h"), (60, "m")):
        if ttl_s % unit_s == 0:
            return f"{ttl_s // unit_s}{letter}"
    return f"{ttl_s}s"


def marked_places(traffic: Traffic) -> tuple[str, ...]:
    """The places that are tried: the first ones that come up, and the end of the request."""
    ends = tuple(place for place in traffic.places if place in (END, LAST))
    rest = tuple(place for place in traffic.places if place not in ends)
    return (*rest[: PLACES_MAX - len(ends)], *ends)


def _replayed(
    traffic: Traffic, scheme: Scheme, prices: ModelPrices, base: list[Usage], on_replay: Callable[[str], None]
) -> Iterator[tuple[str, tuple[str, ...], Spent, Best | None]]:
    """(lifetime, places, what it comes to, how the places were found) for each lifetime."""
    prompts, places = traffic.prompts, marked_places(traffic)
    last = tuple(place for place in places if place in (END, LAST))
    for ttl_s in scheme.ttls_s:
        marking = Marking(ttl_s, scheme.tokens_min, scheme.lookback)
        if scheme.kind == "automatic":
            on_replay(scheme.name)
            usages = automatic(prompts, traffic.block_tokens, ttl_s, tokens_min=scheme.tokens_min)
            yield shown_ttl(ttl_s), (), spent(prices, usages), None
        elif scheme.kind == "implicit":
            on_replay(scheme.name)
            yield shown_ttl(ttl_s), last, marking.replayed(prompts, prices, last), None
        elif scheme.kind == "marks":
            best = best_marks(prompts, prices, places, marking, lambda: on_replay(scheme.name))
            yield shown_ttl(ttl_s), best.places, best.spent, best
        else:
            found: list[tuple[Spent, tuple[str, ...]]] = []
            for place in places:
                on_replay(scheme.name)
                made = lives(prompts, place, ttl_s, tokens_min=scheme.tokens_min)
                found.append((spent_with_objects(prices, base, made), (place,)))
            cheapest, at = min(found, key=lambda one: one[0].charge.total, default=(spent(prices, base), ()))
            yield shown_ttl(ttl_s), at if cheapest.n_objects else (), cheapest, None
    if scheme.mixed:
        long_s, short_s = MIXED_S
        marking = Marking(long_s, scheme.tokens_min, scheme.lookback, short=last, short_s=short_s)
        best = best_marks(prompts, prices, places, marking, lambda: on_replay(scheme.name))
        yield f"{shown_ttl(long_s)}, last {shown_ttl(short_s)}", best.places, best.spent, best


def _row(
    scheme: str, ttl: str, shown: Shown, places: tuple[str, ...], found: Spent, none: Spent, *, is_answered: bool
) -> Row:  # fmt: skip
    charge = found.charge
    return Row(
        scheme=scheme,
        ttl=ttl,
        prices=shown.label,
        currency=shown.currency,
        places=places,
        n_prompt_tokens=found.n_prompt,
        n_read_tokens=found.n_read,
        n_written_tokens=found.n_written,
        n_objects=found.n_objects,
        hit_rate=round(found.n_read / found.n_prompt, 5) if found.n_prompt else 0.0,
        fresh_nano=charge.fresh,
        read_nano=charge.read,
        write_nano=charge.write,
        creation_nano=charge.creation,
        storage_nano=charge.storage,
        call_nano=charge.call,
        output_nano=charge.output if is_answered else None,
        total_nano=charge.total if is_answered else charge.total - charge.output,
        none_nano=none.charge.total if is_answered else none.charge.total - none.charge.output,
    )


def _mark_rows(scheme: str, ttl: str, currency: str, best: Best) -> Iterator[MarkRow]:
    gains = dict(zip(best.places, best.gains_nano, strict=True))
    for one in best.tried:
        yield MarkRow(
            scheme, ttl, one.place, one.n_prompts, one.n_tokens_mean, one.saving_nano, gains.get(one.place), currency
        )
