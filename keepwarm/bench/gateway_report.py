"""`bench gateway`: its samples, and what they come to against the targets. Pure."""

from typing import Literal

from msgspec import Struct

from keepwarm.bench.report import Ratio, percent, ratio
from keepwarm.bench.stats import summary

Form = Literal["whole", "stream"]
FORMS: tuple[Form, ...] = ("whole", "stream")
OVERHEAD_MS_MAX = 3.0
REQUESTS_PER_S_MIN = 400.0
MEMORY_PERCENT_MAX = 105.0  # at the end, of after the first tenth


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


class Samples(Struct):
    """Everything measured, by form of the answer."""

    latency: dict[Form, Latency]
    throughput: dict[Form, Throughput]


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
        found[f"{form}.rss_growth_bytes"] = throughput.rss_bytes[-1] - throughput.rss_bytes[1]
    return {name: round(value, 3) for name, value in found.items()}


def ratios(samples: Samples) -> list[Ratio]:
    """All targets."""
    at = flat_medians(samples)
    memory = samples.throughput["whole"].rss_bytes
    overhead = [
        ratio(f"gateway overhead p50, {form}", at[f"{form}.overhead_p50_ms"], "ms", "≤", OVERHEAD_MS_MAX)
        for form in FORMS
    ]
    rate = [
        ratio(f"requests on one core, {form}", at[f"{form}.requests_per_s"], "/s", "≥", REQUESTS_PER_S_MIN)
        for form in FORMS
    ]
    grown = percent(memory[-1], memory[1])
    return [*overhead, *rate, ratio("gateway's memory at the end, of early on", grown, "%", "≤", MEMORY_PERCENT_MAX)]
