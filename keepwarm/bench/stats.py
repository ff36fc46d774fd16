"""Medians and percentiles of samples. Pure."""

from collections.abc import Sequence
from statistics import median

from msgspec import Struct


class Summary(Struct, frozen=True):
    """What is told of samples beside the samples themselves."""

    n: int
    median: float
    p99: float
    low: float
    high: float


def percentile(samples: Sequence[float], share: float) -> float:
    """The nearest-rank percentile: the smallest sample that `share` (0..1) of all samples do not exceed."""
    assert samples and 0 < share <= 1
    rank = max(1, -int(-share * len(samples) // 1))  # ceiling
    return sorted(samples)[rank - 1]


def summary(samples: Sequence[float]) -> Summary:
    """The summary of one sample or more."""
    return Summary(len(samples), median(samples), percentile(samples, 0.99), min(samples), max(samples))


def medians(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """The median of each key over the rows that have it, in order of first appearance."""
    keys = dict.fromkeys(key for row in rows for key in row)
    return {key: round(median(row[key] for row in rows if key in row), 3) for key in keys}
