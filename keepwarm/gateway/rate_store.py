"""Where uses are counted: in this process's memory, or in Redis for several processes that serve the same organisations."""

import asyncio
import importlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from limits.aio.storage import MemoryStorage, RedisStorage, Storage

from keepwarm.config import ConfigError

KEY_PREFIX = "keepwarm"
REDIS_S_MAX = 1.0  # every turn waits for it, so a Redis that takes longer counts as one that is down
REDIS_CONNECTIONS_MAX = 32  # a command takes a tenth of a millisecond, so a turn seldom waits for one of them


@dataclass(frozen=True, slots=True)
class RateStore:
    """Counters, and how to close their connections. Counters raise limits.errors.StorageError when they fail.

    Who uses them holds one of `slots` meanwhile: then a connection is there, and what is begun has been sent.
    """

    counters: Storage
    close: Callable[[], Awaitable[None]]
    slots: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(REDIS_CONNECTIONS_MAX))


def open_rate_store(redis_url: str | None) -> RateStore:
    """Counters in memory, or with `redis_url` in that Redis. Nothing is connected yet, but the client's files are read.

    Raises ConfigError.
    """
    if redis_url is None:
        return RateStore(MemoryStorage(wrap_exceptions=True), _nothing)
    try:
        client = importlib.import_module("redis.asyncio")  # an extra: most servers are one process
    except ImportError as exc:
        raise ConfigError("rates.redis_url needs Redis's client: pip install 'keepwarm[redis]'") from exc
    try:
        pool = client.BlockingConnectionPool.from_url(
            redis_url,
            max_connections=REDIS_CONNECTIONS_MAX,
            timeout=REDIS_S_MAX,
            socket_timeout=REDIS_S_MAX,
            socket_connect_timeout=REDIS_S_MAX,
            retry=None,  # a count that is sent twice is counted twice
            driver_info=None,  # else its version is read from the disk for every connection
        )
    except ValueError as exc:  # its message does not repeat the password
        raise ConfigError(f"rates.redis_url cannot be used: {exc}") from exc
    options: dict[str, Any] = {"connection_pool": pool}
    counters = RedisStorage(
        "redis://", wrap_exceptions=True, implementation="redispy", key_prefix=KEY_PREFIX, **options
    )
    return RateStore(counters, pool.disconnect)


async def _nothing() -> None:
    """Memory needs no closing."""
