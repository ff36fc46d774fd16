"""`bench gateway`: its samples, and what they come to against the targets. Pure."""

from collections.abc import Sequence
from statistics import median
from typing import Literal

from msgspec import Struct

from keepwarm.bench.report import Ratio, percent, ratio
from keepwarm.bench.stats import percentile, summary

Form = Literal["whole", "stream"]
Side = Literal["off", "on"]
FORMS: tuple[Form, ...] = ("whole", "stream")
OVERHEAD_MS_MAX = 3.0
REQUESTS_PER_S_MIN = 400.0
MEMORY_PERCENT_MAX = 105.0  # at the end, of halfway
ADDED_MS_MAX = 2.0


class Latency(Struct):
    """One request after another: the whole time, and the part that was the engine's."""

    total_ms: list[float] = []
    engine_ms: list[float] = []

    @property
    def overhead_ms(self) -> list[float]:
        """Everything but the engine: HTTP on both sides, the gateway, the way between the processes."""
        return [total - engine for total, engine in zip(self.total_ms, self.engine_ms, strict=True)]


class Throughput(Struct):
    """Many connections at once. `rss_bytes` is the gateway's memory before, and after each `n_between` requests."""

    n_connections: int
    n_requests: int
    spent_s: float
    n_between: int
    rss_bytes: list[int]

    @property
    def requests_per_s(self) -> float:
        return self.n_requests / self.spent_s

    @property
    def rss_halfway_bytes(self) -> int:
        """The gateway remembers its last 10,000 turns, some 8 MB, so the first half of many requests grows by that."""
        return self.rss_bytes[len(self.rss_bytes) // 2]


class Turns(Struct):
    """Short turns, one after another: the whole time at the client by block, and two phases of the server's."""

    total_ms: list[list[float]] = []
    auth_ms: list[float] = []  # the key looked up
    reserve_ms: list[float] = []  # tokens of limits taken, a hold written

    @property
    def all_ms(self) -> list[float]:
        return [ms for block in self.total_ms for ms in block]

    def add(self, turns: Sequence[tuple[float, dict[str, float]]]) -> None:
        """A block of turns: milliseconds, and those of each phase."""
        self.total_ms.append([round(ms, 3) for ms, _ in turns])
        self.auth_ms += [round(phases["auth_ms"], 3) for _, phases in turns]
        self.reserve_ms += [round(phases["reserve_ms"], 3) for _, phases in turns]


class Billed(Struct):
    """The same turns on a server without and on one with keys, limits and ledger; blocks took turns."""

    off: Turns
    on: Turns

    def of(self, side: Side) -> Turns:
        return self.off if side == "off" else self.on

    @property
    def added_p50_ms(self) -> float:
        return median(self.on.all_ms) - median(self.off.all_ms)


class Samples(Struct):
    """Everything measured: by form of the answer, and without and with billing."""

    latency: dict[Form, Latency]
    throughput: dict[Form, Throughput]
    billing: Billed


def flat_medians(samples: Samples) -> dict[str, float]:
    """Medians and rates by dotted name."""
    found: dict[str, float] = {}
    for form, latency in samples.latency.items():
        total, overhead = summary(latency.total_ms), summary(latency.overhead_ms)
        found |= {
            f"{form}.latency_p50_ms": total.median,
            f"{form}.latency_p99_ms": total.p99,
            f"{form}.overhead_p50_ms": overhead.median,
            f"{form}.overhead_p99_ms": overhead.p99,
        }
    for form, throughput in samples.throughput.items():
        found[f"{form}.requests_per_s"] = throughput.requests_per_s
        found[f"{form}.rss_growth_bytes"] = throughput.rss_bytes[-1] - throughput.rss_halfway_bytes
    for side, turns in (("off", samples.billing.off), ("on", samples.billing.on)):
        found |= {
            f"billing.{side}.latency_p50_ms": median(turns.all_ms),
            f"billing.{side}.latency_p90_ms": percentile(turns.all_ms, 0.9),
            f"billing.{side}.auth_p50_ms": median(turns.auth_ms),
            f"billing.{side}.reserve_p50_ms": median(turns.reserve_ms),
        }
    found["billing.added_p50_ms"] = samples.billing.added_p50_ms
    found["billing.added_p90_ms"] = found["billing.on.latency_p90_ms"] - found["billing.off.latency_p90_ms"]
    return {name: round(value, 3) for name, value in found.items()}


def ratios(samples: Samples) -> list[Ratio]:
    """All targets."""
    at = flat_medians(samples)
    memory = samples.throughput["whole"]
    overhead = [
        ratio(f"gateway overhead p50, {form}", at[f"{form}.overhead_p50_ms"], "ms", "≤", OVERHEAD_MS_MAX)
        for form in FORMS
    ]
    rate = [
        ratio(f"requests on one core, {form}", at[f"{form}.requests_per_s"], "/s", "≥", REQUESTS_PER_S_MIN)
        for form in FORMS
    ]
    grown = percent(memory.rss_bytes[-1], memory.rss_halfway_bytes)
    return [
        *overhead,
        *rate,
        ratio("gateway's memory at the end, of halfway", grown, "%", "≤", MEMORY_PERCENT_MAX),
        ratio("keys, limits and ledger, added to p50", at["billing.added_p50_ms"], "ms", "≤", ADDED_MS_MAX),
    ]
