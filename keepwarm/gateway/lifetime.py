"""When a cache object expires: the one place that turns a wish into unix seconds and checks its bounds. Pure."""

from keepwarm.config import CacheConfig
from keepwarm.core.cache_object import NS_PER_S
from keepwarm.core.errors import ApiError, ErrorKind

TIME_MAX = 253_402_300_799  # unix seconds: the last that RFC 3339 can write, in the year 9999


def expiry(
    cache: CacheConfig, now: float, *, expires_at: int | None, ttl_s: int | None, param: str = "ttl"
) -> int | None:
    """The expiry asked for, or None when none was. Raises ApiError(INVALID_REQUEST) outside 1 s … `cache.ttl_max_s`.

    `param` is the client's name for `ttl_s`.
    """
    if expires_at is not None and ttl_s is not None:
        raise ApiError(ErrorKind.INVALID_REQUEST, "give expired_at or ttl, not both", param="ttl")
    if ttl_s is not None:
        if not 1 <= ttl_s <= cache.ttl_max_s:
            message = f"{param} is {ttl_s} s; it must be between 1 and {cache.ttl_max_s} s"
            raise ApiError(ErrorKind.INVALID_REQUEST, message, param=param)
        return int(now) + ttl_s
    if expires_at is not None:
        latest = int(now) + cache.ttl_max_s
        if not now < expires_at <= latest:
            message = f"expired_at is {expires_at}; it must be after now ({int(now)}) and at most {latest}"
            raise ApiError(ErrorKind.INVALID_REQUEST, message, param="expired_at")
        return expires_at
    return None


def exact_expiry(now: float, *, expires_at: int | None, ttl_s: int | None, early_ns: int) -> tuple[int, int]:
    """(expires_at, early_ns) for Gemini's lifetimes, which have nanoseconds and no longest one. One of the two is given.

    Raises ApiError(INVALID_REQUEST) for an end that is not after now, or that no date can be written for.
    """
    assert (expires_at is None) != (ttl_s is None), "the dialect has seen to it"
    param, end_ns = "expire_time", (expires_at or 0) * NS_PER_S - early_ns
    if ttl_s is not None:
        param, end_ns = "ttl", round(now * 1e6) * 1000 + ttl_s * NS_PER_S - early_ns  # no float of now has more digits
    if end_ns <= now * NS_PER_S:
        raise ApiError(ErrorKind.INVALID_REQUEST, f"{param} must be in the future", param=param)
    end_s = -(-end_ns // NS_PER_S)
    if end_s > TIME_MAX:
        raise ApiError(ErrorKind.INVALID_REQUEST, f"{param} must be before the year 10000", param=param)
    return end_s, end_s * NS_PER_S - end_ns
