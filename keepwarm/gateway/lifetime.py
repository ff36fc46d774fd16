"""When a cache object expires: the one place that turns a wish into unix seconds and checks its bounds. Pure."""

from keepwarm.config import CacheConfig
from keepwarm.core.errors import ApiError, ErrorKind


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
