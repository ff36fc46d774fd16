"""Limits come from tiers and from an organisation's own, and the tokens that count are the engine's."""

import re
from pathlib import Path

import msgspec
import pytest

from keepwarm.core.errors import ApiError, ErrorKind
from keepwarm.core.event import Usage
from keepwarm.core.rate_limit import (
    KIMI_TIERS,
    Allowance,
    LimitOverrides,
    LimitState,
    OrgLimits,
    parse_overrides,
    resolved_limits,
    tokens_counted,
)

DOCS = Path(__file__).parents[3] / "docs" / "limits.md"
GOLD = {"gold": OrgLimits(concurrency=7, rpm=70)}


def resolved(tier: str | None, own: bytes | None = None, default: str | None = None) -> OrgLimits:
    return resolved_limits(tier, parse_overrides(own), tiers=GOLD, default_tier=default)


def test_the_docs_have_kimis_tiers() -> None:
    row = re.compile(r"^\| `(\w+)` \| ([\d,]+) \| ([\d,]+) \| ([\d,]+) \| ([\d,]+|none) \|$", re.MULTILINE)
    told = {
        name: OrgLimits(*(None if number == "none" else int(number.replace(",", "")) for number in numbers))
        for name, *numbers in row.findall(DOCS.read_text(encoding="utf-8"))
    }
    assert told == KIMI_TIERS


def test_an_organisation_without_a_tier_has_the_default_one_or_no_limits() -> None:
    assert resolved(None) == OrgLimits()
    assert resolved(None, default="free") == KIMI_TIERS["free"]
    assert resolved("tier3", default="free") == KIMI_TIERS["tier3"]
    assert resolved("gold", default="free") == GOLD["gold"]


def test_a_configured_tier_takes_the_place_of_kimis() -> None:
    mine = {"free": OrgLimits(rpm=1)}
    assert resolved_limits("free", LimitOverrides(), tiers=mine, default_tier=None) == OrgLimits(rpm=1)


def test_an_organisations_own_limits_win_and_null_takes_one_away() -> None:
    assert resolved("free", b'{"rpm": 9, "tpd": null}') == OrgLimits(concurrency=1, rpm=9, tpm=32_000, tpd=None)
    assert resolved(None, b'{"tpm": 5}') == OrgLimits(tpm=5)
    assert resolved("free", b"{}") == KIMI_TIERS["free"]


def test_a_tier_nobody_configured_is_an_error_that_names_the_ones_there_are() -> None:
    with pytest.raises(ApiError, match=r"no tier 'silver'; the tiers are free, .*tier5, gold") as caught:
        resolved("silver")
    assert (caught.value.kind, caught.value.param) == (ErrorKind.INVALID_REQUEST, "tier")


@pytest.mark.parametrize("raw", [b"", b"[]", b'{"rpm": 0}', b'{"rpm": -1}', b'{"rpm": 1.5}', b'{"tpx": 1}', b"\xff"])
def test_limits_that_are_none_are_refused(raw: bytes) -> None:
    with pytest.raises(ApiError) as caught:
        parse_overrides(raw)
    assert (caught.value.kind, caught.value.param) == (ErrorKind.INVALID_REQUEST, "limits")


def test_limits_written_and_read_again_are_the_same() -> None:
    own = LimitOverrides(rpm=3, tpd=None)
    assert msgspec.json.encode(own) == b'{"rpm":3,"tpd":null}'
    assert parse_overrides(msgspec.json.encode(own)) == own


def test_cache_reads_count_or_not() -> None:
    usage = Usage(fresh=10, cache_read=200, cache_write=3000, output=40_000, cache_write_long=1000)
    assert tokens_counted(usage, cache_reads_count=True) == 43_210
    assert tokens_counted(usage, cache_reads_count=False) == 43_010


def test_of_a_minutes_and_a_days_tokens_the_fewer_left_are_told() -> None:
    minute, day = Allowance(100, 50, 1.0), Allowance(1000, 40, 2.0)
    assert LimitState(0.0, minute_tokens=minute, day_tokens=day).tokens is day
    assert LimitState(0.0, minute_tokens=minute).tokens is minute
    assert LimitState(0.0, day_tokens=day).tokens is day
    assert LimitState(0.0, requests=minute).tokens is None
