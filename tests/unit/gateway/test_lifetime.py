"""Lifetimes: the bounds, with the numbers in the message."""

import pytest

from keepwarm.config import CacheConfig
from keepwarm.core.errors import ApiError, ErrorKind
from keepwarm.gateway.lifetime import TIME_MAX, exact_expiry, expiry

CACHE = CacheConfig(ttl_max_s=100)
NOW = 1000.9


def test_nothing_asked_for_is_none() -> None:
    assert expiry(CACHE, NOW, expires_at=None, ttl_s=None) is None


@pytest.mark.parametrize("ttl_s", [1, 100])
def test_a_ttl_counts_from_now(ttl_s: int) -> None:
    assert expiry(CACHE, NOW, expires_at=None, ttl_s=ttl_s) == 1000 + ttl_s


@pytest.mark.parametrize("expires_at", [1001, 1100])
def test_a_time_is_taken_as_it_is(expires_at: int) -> None:
    assert expiry(CACHE, NOW, expires_at=expires_at, ttl_s=None) == expires_at


@pytest.mark.parametrize(
    "expires_at, ttl_s, words",
    [
        (None, 0, "ttl is 0 s; it must be between 1 and 100 s"),
        (None, 101, "ttl is 101 s"),
        (1000, None, "expired_at is 1000; it must be after now"),
        (1101, None, "at most 1100"),
        (1050, 50, "not both"),
    ],
)
def test_outside_the_bounds_is_refused(expires_at: int | None, ttl_s: int | None, words: str) -> None:
    with pytest.raises(ApiError, match=words) as raised:
        expiry(CACHE, NOW, expires_at=expires_at, ttl_s=ttl_s)
    assert raised.value.kind is ErrorKind.INVALID_REQUEST


def test_the_client_is_told_its_own_name_for_it() -> None:
    with pytest.raises(ApiError, match="reset_ttl is 0 s") as raised:
        expiry(CACHE, NOW, expires_at=None, ttl_s=0, param="reset_ttl")
    assert raised.value.param == "reset_ttl"


@pytest.mark.parametrize(
    "now,asked,end",
    [
        (1000.0, {"ttl_s": 300}, (1300, 0)),
        (1000.25, {"ttl_s": 300}, (1301, 750_000_000)),
        (1000.25, {"ttl_s": 4, "early_ns": 250_000_000}, (1004, 0)),
        (1000.25, {"ttl_s": 1, "early_ns": 999_999_999}, (1001, 749_999_999)),
        (1000.9, {"expires_at": 1001, "early_ns": 1}, (1001, 1)),
        (1000.9, {"ttl_s": 10**9}, (1_000_001_001, 100_000_000)),
        (1000.0, {"expires_at": TIME_MAX}, (TIME_MAX, 0)),
    ],
)
def test_an_exact_end_has_nanoseconds_and_no_bound(now: float, asked: dict[str, int], end: tuple[int, int]) -> None:
    wish = {"expires_at": None, "ttl_s": None, "early_ns": 0} | asked
    assert exact_expiry(now, **wish) == end  # type: ignore[arg-type]  # of the mixed dict


@pytest.mark.parametrize(
    "expires_at,ttl_s,early_ns,words",
    [
        (None, 0, 0, "ttl must be in the future"),
        (None, -1, 0, "ttl must be in the future"),
        (1001, None, 100_000_000, "expire_time must be in the future"),
        (-5, None, 0, "expire_time must be in the future"),
        (None, TIME_MAX, 0, "ttl must be before the year 10000"),
    ],
)
def test_an_exact_end_is_after_now(expires_at: int | None, ttl_s: int | None, early_ns: int, words: str) -> None:
    with pytest.raises(ApiError, match=words) as raised:
        exact_expiry(NOW, expires_at=expires_at, ttl_s=ttl_s, early_ns=early_ns)
    assert raised.value.kind is ErrorKind.INVALID_REQUEST
