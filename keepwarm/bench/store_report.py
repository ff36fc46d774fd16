"""`bench store`: its samples, and what they come to against the targets. Pure.

Two servers that are compared did the same work one right after the other, so a pair is one sample and a ratio is the
median of the pairs' own: what else the machine did meanwhile hits both. A restart whose question was not answered from
the disk is kept among the samples and counts for no ratio. What restoring is compared with is the faster of two ways to
read a file in order.
"""

from collections.abc import Sequence
from typing import Literal

from msgspec import Struct

from keepwarm.bench.report import Ratio, percent, ratio
from keepwarm.bench.stats import medians
from keepwarm.bench.ttft_report import middle
from keepwarm.engine import StoreStatus

Read = Literal["disk", "host", "nothing"]
Way = Literal["sequential", "sequential_direct", "read", "read_untouched", "restore"]
WAYS: tuple[Way, ...] = ("sequential", "sequential_direct", "read", "read_untouched", "restore")

DISK_HIT_PERCENT_MAX = 5.0
RESTORE_PERCENT_MIN = 70.0
DURABLE_PERCENT_MAX = 10.0
NO_REUSE_PERCENT_MIN = 98.0
INDEX_BYTES_MAX = 400.0
LOOK_UP_MS_MAX = 10.0
SCAN_MS_MAX = 2000.0


class ColdSample(Struct, frozen=True):
    """A prompt nobody asked before."""

    n_prompt: int
    n_cached: int
    ttft_ms: float
    phases: dict[str, float]


class ObjectPair(Struct, frozen=True):
    """The same cache object made on two servers, until it was `ready`: with a disk tier, and in host RAM alone."""

    n_tokens: int
    disk_ms: float
    host_ms: float


class RestartSample(Struct, frozen=True):
    """A question behind the object, asked of a server that was killed and started again over a cold page cache.

    `is_first`: nothing was asked before it since the start. `start_ms` is until the server was ready; `scan_ms` the part
    of it in which the heads of all stored blocks were read, None where the server does not say.
    """

    is_first: bool
    read: Read
    n_prompt: int
    n_cached: int
    ttft_ms: float
    phases: dict[str, float]
    start_ms: float
    scan_ms: float | None


class RestoreSample(Struct, frozen=True):
    """Bytes read from a cold disk.

    sequential         one file of the blocks' size, 1 MiB after another into one buffer, as `dd bs=1M` does
    sequential_direct  the same past the page cache, as `dd iflag=direct` and `fio` do; absent where that is not possible
    read               the blocks, verified, into host slots whose pages are ready, as the server keeps them
    read_untouched     the same into slots whose pages the system has yet to give
    restore            as `read`, and put together and loaded into the model
    """

    way: Way
    n_bytes: int
    ms: float

    @property
    def gb_per_s(self) -> float:
        return self.n_bytes / self.ms / 1e6


class NoReusePair(Struct, frozen=True):
    """The same different prompts on two servers one after another: caching as by default, and off."""

    n_prompts: int
    n_tokens: int
    on_ms: float
    off_ms: float


class IndexSample(Struct, frozen=True):
    """Memory of an index whose blocks lie in both tiers; finding one long prompt, and locking and touching its blocks."""

    n_blocks: int
    bytes_per_block: float
    n_tokens: int
    match_ms: list[float]
    use_ms: list[float]


class ScanSample(Struct, frozen=True):
    """Opening a store of so many small blocks over a cold page cache: every head is read and checked, no body."""

    n_blocks: int
    ms: float


class Samples(Struct):
    """Everything measured."""

    cold: list[ColdSample] = []
    objects: list[ObjectPair] = []
    restarts: list[RestartSample] = []
    no_reuse: list[NoReusePair] = []
    restores: list[RestoreSample] = []
    index: list[IndexSample] = []
    scans: list[ScanSample] = []


def tier_read(before: StoreStatus | None, after: StoreStatus | None) -> Read:
    """From where the one turn between two looks at the counters read."""
    if before is None or after is None:
        return "nothing"
    if after.n_hits_disk > before.n_hits_disk:
        return "disk"
    return "host" if after.n_hits_host > before.n_hits_host else "nothing"


def flat_medians(samples: Samples) -> dict[str, float]:
    """Medians by dotted name; what was not measured is absent."""
    found: dict[str, float | None] = {
        "cold.ttft_ms": middle([one.ttft_ms for one in samples.cold]),
        **_prefixed("cold", [one.phases for one in samples.cold]),
    }
    for name, hits in (("first_hit", _hits(samples, first=True)), ("later_hit", _hits(samples, first=False))):
        found[f"{name}.ttft_ms"] = middle([one.ttft_ms for one in hits])
        found |= _prefixed(name, [one.phases for one in hits])
    found |= {
        "restart.start_ms": middle([one.start_ms for one in samples.restarts]),
        "restart.scan_ms": middle([one.scan_ms for one in samples.restarts]),
        "object.disk_ms": middle([pair.disk_ms for pair in samples.objects]),
        "object.host_ms": middle([pair.host_ms for pair in samples.objects]),
        "no_reuse.on_tokens_per_s": middle([pair.n_tokens * 1000 / pair.on_ms for pair in samples.no_reuse]),
        "no_reuse.off_tokens_per_s": middle([pair.n_tokens * 1000 / pair.off_ms for pair in samples.no_reuse]),
    }
    found |= {f"{way}.gb_per_s": _speed(samples, way) for way in WAYS}
    found |= {
        "index.bytes_per_block": middle([one.bytes_per_block for one in samples.index]),
        "index.match_ms": middle([ms for one in samples.index for ms in one.match_ms]),
        "index.use_ms": middle([ms for one in samples.index for ms in one.use_ms]),
        "scan.ms": middle([one.ms for one in samples.scans]),
    }
    return {name: round(value, 3) for name, value in found.items() if value is not None}


def ratios(samples: Samples) -> list[Ratio]:
    """All targets; those without a sample are neither reached nor missed."""
    at = flat_medians(samples)
    cold = at.get("cold.ttft_ms")
    added = middle([percent(pair.disk_ms - pair.host_ms, pair.host_ms) for pair in samples.objects])
    kept = middle([percent(pair.off_ms, pair.on_ms) for pair in samples.no_reuse])
    plain = max(filter(None, (_speed(samples, "sequential"), _speed(samples, "sequential_direct"))), default=None)
    disk_hits = [
        ratio(f"disk hit after a restart, {what}: TTFT of cold", percent(at.get(name), cold), "%", "≤", limit)
        for what, name, limit in (
            ("the first question", "first_hit.ttft_ms", DISK_HIT_PERCENT_MAX),
            ("after another question", "later_hit.ttft_ms", DISK_HIT_PERCENT_MAX),
        )
    ]
    from_disk = [
        ratio(f"{what}, of sequential reading", percent(_speed(samples, way), plain), "%", "≥", RESTORE_PERCENT_MIN)
        for what, way in RESTORE_WAYS
    ]
    return [
        *disk_hits,
        *from_disk,
        ratio("making an object durable, added to its creation", added, "%", "≤", DURABLE_PERCENT_MAX),
        ratio("throughput without reuse, of caching off", kept, "%", "≥", NO_REUSE_PERCENT_MIN),
        ratio("index memory a block", at.get("index.bytes_per_block"), "bytes", "≤", INDEX_BYTES_MAX),
        ratio("look-up of a long prompt", at.get("index.match_ms"), "ms", "≤", LOOK_UP_MS_MAX),
        ratio("start-up scan of many blocks", at.get("scan.ms"), "ms", "≤", SCAN_MS_MAX),
    ]


RESTORE_WAYS: tuple[tuple[str, Way], ...] = (
    ("disk restore, put together and loaded", "restore"),
    ("disk restore, read and verified", "read"),
)


def _hits(samples: Samples, *, first: bool) -> list[RestartSample]:
    return [one for one in samples.restarts if one.read == "disk" and one.is_first == first]


def _speed(samples: Samples, way: Way) -> float | None:
    return middle([one.gb_per_s for one in samples.restores if one.way == way])


def _prefixed(prefix: str, rows: Sequence[dict[str, float]]) -> dict[str, float | None]:
    return {f"{prefix}.{name}": value for name, value in medians(rows).items()}
