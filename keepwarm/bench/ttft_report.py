"""`bench ttft`: its samples, and what they come to against the targets. Pure."""

from collections.abc import Sequence
from statistics import median
from typing import Literal

from msgspec import Struct

from keepwarm.bench.raw_frames import Took
from keepwarm.bench.report import Ratio, percent, quotient, ratio
from keepwarm.bench.stats import medians

Way = Literal["object", "automatic", "displaced"]
WAYS: tuple[Way, ...] = ("object", "automatic", "displaced")
WARM_PERCENT_MAX = 2.0  # of cold
WARM_EXTRA_MS_MAX = 20.0  # beside raw restore and evaluation of the same new tokens
COLD_PERCENT_MAX = 105.0
DECODE_PERCENT_MIN = 95.0
CROWD_PERCENT_MIN = 90.0
CROWD_TTFT_MAX = 10.0  # times the single user's
NEW_CONTEXT_MAX = 1.05  # evaluated tokens, of context once and every question
RESTORE_GB_PER_S_MIN = 4.0


class ColdSample(Struct, frozen=True):
    """A prompt nobody asked before. `raw_ms` None: there is no baseline."""

    n_prompt: int
    n_cached: int
    ttft_ms: float
    phases: dict[str, float]
    raw_ms: float | None


class WarmSample(Struct, frozen=True):
    """A question behind a context that is stored. `n_new` tokens are behind the context, question and template.

    `raw`: the same restore and the same ubatches; `raw_at_once`: the new tokens in one ubatch, as a program that keeps no
    bits equal would evaluate them.
    """

    way: Way
    n_prompt: int
    n_cached: int
    n_evaluated: int
    n_new: int
    ttft_ms: float
    phases: dict[str, float]
    restore_gb_per_s: float | None
    raw: Took | None
    raw_at_once: Took | None


class DecodeSample(Struct, frozen=True):
    """One user's tokens behind the first."""

    n_output: int
    tokens_per_s: float | None
    raw_tokens_per_s: float | None


class CrowdSample(Struct, frozen=True):
    """Users at once over one stored context. Decoding is counted from the latest first token to the latest last one.

    `n_decoded` are each user's tokens in that time; raw decodes as many in as many streams.
    """

    ttft_ms: list[float]
    n_output: list[int]
    n_decoded: list[int]
    tokens_per_s: float | None
    raw_tokens_per_s: float | None


class NewContextSample(Struct, frozen=True):
    """Users at once over a context that is not stored: tokens evaluated by the engine's counters, and by arithmetic."""

    n_users: int
    n_context: int
    n_questions: int
    n_evaluated: int
    ttft_ms: list[float]


class Samples(Struct):
    """Everything measured."""

    cold: list[ColdSample] = []
    warm: list[WarmSample] = []
    decode: list[DecodeSample] = []
    crowd: list[CrowdSample] = []
    new_context: list[NewContextSample] = []


def middle(values: Sequence[float | None]) -> float | None:
    """The median of the known ones."""
    known = [value for value in values if value is not None]
    return median(known) if known else None


def flat_medians(samples: Samples) -> dict[str, float]:
    """Medians by dotted name; what was not measured is absent."""
    found: dict[str, float | None] = {
        "cold.ttft_ms": middle([one.ttft_ms for one in samples.cold]),
        "cold.raw_ms": middle([one.raw_ms for one in samples.cold]),
        **_prefixed("cold", medians([one.phases for one in samples.cold])),
    }
    for way in WAYS:
        warm = [one for one in samples.warm if one.way == way]
        found |= {
            f"{way}.ttft_ms": middle([one.ttft_ms for one in warm]),
            f"{way}.raw_ms": middle([one.raw.ms for one in warm if one.raw is not None]),
            f"{way}.raw_at_once_ms": middle([one.raw_at_once.ms for one in warm if one.raw_at_once is not None]),
            f"{way}.n_evaluated": middle([one.n_evaluated for one in warm]),
            f"{way}.restore_gb_per_s": middle([one.restore_gb_per_s for one in warm]),
            f"{way}.raw_restore_ms": middle([one.raw.restore_ms for one in warm if one.raw is not None]),
            f"{way}.raw_evaluate_ms": middle([one.raw.evaluate_ms for one in warm if one.raw is not None]),
            **_prefixed(way, medians([one.phases for one in warm])),
        }
    found |= {
        "decode.tokens_per_s": middle([one.tokens_per_s for one in samples.decode]),
        "decode.raw_tokens_per_s": middle([one.raw_tokens_per_s for one in samples.decode]),
        "crowd.ttft_p50_ms": middle([ms for one in samples.crowd for ms in one.ttft_ms]),
        "crowd.ttft_max_ms": middle([max(one.ttft_ms) for one in samples.crowd]),
        "crowd.tokens_per_s": middle([one.tokens_per_s for one in samples.crowd]),
        "crowd.raw_tokens_per_s": middle([one.raw_tokens_per_s for one in samples.crowd]),
        "new_context.ttft_p50_ms": middle([ms for one in samples.new_context for ms in one.ttft_ms]),
    }
    return {name: round(value, 3) for name, value in found.items() if value is not None}


def _prefixed(prefix: str, values: dict[str, float]) -> dict[str, float | None]:
    return {f"{prefix}.{name}": value for name, value in values.items()}


def ratios(samples: Samples, granularity: int | None) -> list[Ratio]:
    """All targets; those without a sample or a baseline are neither reached nor missed."""
    at = flat_medians(samples)
    found = [
        ratio(
            f"warm TTFT of cold, {way}",
            percent(at.get(f"{way}.ttft_ms"), at.get("cold.ttft_ms")),
            "%",
            "≤",
            WARM_PERCENT_MAX,
        )
        for way in WAYS
    ]
    found += [
        ratio(f"warm TTFT beyond raw, {way}", _warm_extra_ms(samples, way), "ms", "≤", WARM_EXTRA_MS_MAX)
        for way in WAYS
    ]
    g = granularity or 1
    found += [
        ratio(f"tokens evaluated beyond the new ones, {way}", _beyond_new(samples, way), "tokens", "≤", g)
        for way in WAYS
    ]
    crowd_raw = percent(at.get("crowd.tokens_per_s"), at.get("crowd.raw_tokens_per_s"))
    decode_raw = percent(at.get("decode.tokens_per_s"), at.get("decode.raw_tokens_per_s"))
    cold_raw = percent(at.get("cold.ttft_ms"), at.get("cold.raw_ms"))
    crowd_ttft = quotient(at.get("crowd.ttft_p50_ms"), at.get("object.ttft_ms"))
    once = middle([quotient(one.n_evaluated, one.n_context + one.n_questions) for one in samples.new_context])
    restore = middle([one.restore_gb_per_s for one in samples.warm])
    return [
        *found,
        ratio("cold TTFT of raw", cold_raw, "%", "≤", COLD_PERCENT_MAX),
        ratio("decode tokens/s of raw, 1 user", decode_raw, "%", "≥", DECODE_PERCENT_MIN),
        ratio("decode tokens/s of raw, users at once", crowd_raw, "%", "≥", CROWD_PERCENT_MIN),
        ratio("TTFT p50 of users at once, of 1 user", crowd_ttft, "×", "≤", CROWD_TTFT_MAX),
        ratio(
            "tokens evaluated, users at once over a new context, of computing it once", once, "×", "≤", NEW_CONTEXT_MAX
        ),
        ratio("restore", restore, "GB/s", "≥", RESTORE_GB_PER_S_MIN),
    ]


def _warm_extra_ms(samples: Samples, way: Way) -> float | None:
    """The median over samples of TTFT minus raw, each with its own raw; the faster of the two raw ways counts."""
    return middle(
        [
            one.ttft_ms - min(one.raw.ms, one.raw_at_once.ms)
            for one in samples.warm
            if one.way == way and one.raw is not None and one.raw_at_once is not None
        ]
    )


def _beyond_new(samples: Samples, way: Way) -> float | None:
    """The worst sample's."""
    beyond = [one.n_evaluated - one.n_new for one in samples.warm if one.way == way]
    return float(max(beyond)) if beyond else None
