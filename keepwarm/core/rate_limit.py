"""What an organisation may use in a minute and a day: tiers, single limits that differ from the tier's, and what is left.

Decisions only. What has been used is counted in gateway/rate_limits.py; each dialect tells what is left in its own headers.
"""

from collections.abc import Mapping
from typing import Annotated

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from keepwarm.core.errors import ApiError, ErrorKind
from keepwarm.core.event import Usage

Limit = Annotated[int, Meta(ge=1)]


class OrgLimits(Struct, frozen=True, forbid_unknown_fields=True):
    """The limits of one organisation, all its projects, keys and models together. None: not limited."""

    concurrency: Limit | None = None  # turns at once; each choice of a turn is one
    rpm: Limit | None = None  # turns begun in a minute
    tpm: Limit | None = None  # tokens in a minute: prompt and the longest answer asked for, later what was used
    tpd: Limit | None = None  # the same in a day, UTC


class LimitOverrides(Struct, frozen=True, forbid_unknown_fields=True):
    """An organisation's own limits. Absent: the tier's; null: not limited."""

    concurrency: Limit | UnsetType | None = UNSET
    rpm: Limit | UnsetType | None = UNSET
    tpm: Limit | UnsetType | None = UNSET
    tpd: Limit | UnsetType | None = UNSET


class Allowance(Struct, frozen=True):
    """What is left of one limit. In `reset_s` seconds all of it is free again."""

    limit: int
    remaining: int
    reset_s: float


class LimitState(Struct, frozen=True):
    """What is left of an organisation's limits at the unix time `now`. None: not limited, or not known.

    `organisation` is None where there are none, with --dev.
    """

    now: float
    requests: Allowance | None = None  # of a minute
    minute_tokens: Allowance | None = None
    day_tokens: Allowance | None = None
    organisation: str | None = None

    @property
    def tokens(self) -> Allowance | None:
        """The limit on tokens that has the least left, since clients read of one only."""
        limited = [allowance for allowance in (self.minute_tokens, self.day_tokens) if allowance is not None]
        return min(limited, key=lambda allowance: allowance.remaining, default=None)


KIMI_TIERS: Mapping[str, OrgLimits] = {  # as Kimi's page on limits had them in 2024 and 2025
    "free": OrgLimits(concurrency=1, rpm=3, tpm=32_000, tpd=1_500_000),
    "tier1": OrgLimits(concurrency=50, rpm=200, tpm=128_000, tpd=10_000_000),
    "tier2": OrgLimits(concurrency=100, rpm=500, tpm=128_000, tpd=20_000_000),
    "tier3": OrgLimits(concurrency=200, rpm=5_000, tpm=384_000),
    "tier4": OrgLimits(concurrency=400, rpm=5_000, tpm=768_000),
    "tier5": OrgLimits(concurrency=1_000, rpm=10_000, tpm=2_000_000),
}


def parse_overrides(raw: bytes | None) -> LimitOverrides:
    """An organisation's own limits from their JSON. Raises ApiError(INVALID_REQUEST)."""
    if raw is None:
        return LimitOverrides()
    try:
        return msgspec.json.decode(raw, type=LimitOverrides)
    except msgspec.MsgspecError as exc:
        raise ApiError(ErrorKind.INVALID_REQUEST, f"limits: {exc}", param="limits") from exc


def resolved_limits(
    tier: str | None, overrides: LimitOverrides, *, tiers: Mapping[str, OrgLimits], default_tier: str | None
) -> OrgLimits:
    """The limits of an organisation of `tier` (None: `default_tier`, and where that is None: none) with its own on top.

    `tiers` are the configuration's, which win over Kimi's. Raises ApiError(INVALID_REQUEST) for a name in neither.
    """
    name = default_tier if tier is None else tier
    limits = OrgLimits() if name is None else _tier(name, {**KIMI_TIERS, **tiers})
    own = {name: value for name, value in msgspec.structs.asdict(overrides).items() if value is not UNSET}
    return msgspec.structs.replace(limits, **own)


def tokens_counted(usage: Usage, *, cache_reads_count: bool) -> int:
    """The tokens of `usage` that count towards limits on tokens."""
    return usage.prompt + usage.output - (0 if cache_reads_count else usage.cache_read)


def _tier(name: str, tiers: Mapping[str, OrgLimits]) -> OrgLimits:
    if name not in tiers:
        message = f"limits have no tier {name!r}; the tiers are {', '.join(tiers)}"
        raise ApiError(ErrorKind.INVALID_REQUEST, message, param="tier")
    return tiers[name]
