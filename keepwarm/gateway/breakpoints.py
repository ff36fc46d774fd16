"""The prefixes that breakpoints made known, by tenant: in memory for every request, in the database for the next start.

An entry says that a prefix may be read until it expires, and by whom; what is stored of it the engine knows. So losing one
costs a client a miss that its store could have spared it, and keeping one too many costs nothing. Bounded per tenant: the
entry that expires first makes room. Expired ones stay for a while, so a miss can be told from one never seen.
"""

from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa
from msgspec.structs import asdict

from keepwarm.cache.breakpoints import Chosen, Entry, choose
from keepwarm.cache.render import Built
from keepwarm.core.errors import ApiError
from keepwarm.gateway.runtime import Runtime
from keepwarm.storage import Storage, breakpoints

ENTRIES_PER_TENANT_MAX = 4096  # 100 bytes each; a coding agent leaves two a turn
EXPIRED_KEPT_S = 3600.0  # so long a miss is "expired" and not "first seen"


class Breakpoints:
    """Finds and keeps entries. `root` names all a state depends on beside tokens and tenant: model, template, KV type."""

    def __init__(self, storage: Storage, runtime: Runtime, *, root: bytes, tokens_min: int) -> None:
        self._storage = storage
        self._clock = runtime.clock
        self._log = runtime.log
        self._tasks = runtime.tasks
        self._root = root
        self._tokens_min = tokens_min
        self._known: dict[str, dict[bytes, Entry]] = {}

    async def load(self) -> None:
        """Read what the last process left; forget what expired long ago."""
        oldest = self._clock.now() - EXPIRED_KEPT_S

        def read(connection: sa.Connection) -> Sequence[sa.Row[Any]]:
            connection.execute(sa.delete(breakpoints).where(breakpoints.c.expires_at <= oldest))
            return connection.execute(sa.select(breakpoints).order_by(breakpoints.c.expires_at)).all()

        for row in await self._storage.run(read):
            self._put(row.tenant, Entry(row.digest, row.n_tokens, row.position, row.ttl_s, row.expires_at))

    def choose(self, tenant: str, built: Built) -> Chosen | None:
        """What this request reads and writes by its breakpoints; None when none of them has a lifetime."""
        if all(one.ttl_s is None for one in built.breakpoints):
            return None
        known: dict[int, list[Entry]] = {}
        for entry in self._known.get(tenant, {}).values():
            known.setdefault(entry.n_tokens, []).append(entry)
        return choose(
            built.breakpoints,
            built.prompt.tokens,
            known,
            root=self._root,
            tokens_min=self._tokens_min,
            now=self._clock.now(),
        )

    def keep(self, tenant: str, chosen: Chosen) -> None:
        """The request's entries live from now on, so that one that comes beside it waits for it and reads."""
        gone = [digest for entry in chosen.kept for digest in self._put(tenant, entry)]
        if chosen.kept:
            self._tasks.create_task(self._write(tenant, chosen.kept, gone))

    async def _write(self, tenant: str, kept: Sequence[Entry], gone: Sequence[bytes]) -> None:
        """For the next start. A database that is busy is no reason to fail a turn."""

        def write(connection: sa.Connection) -> None:
            stale = [*gone, *(entry.digest for entry in kept)]
            connection.execute(
                sa.delete(breakpoints).where(breakpoints.c.tenant == tenant, breakpoints.c.digest.in_(stale))
            )
            connection.execute(sa.insert(breakpoints), [{"tenant": tenant, **asdict(entry)} for entry in kept])

        try:
            await self._storage.run(write)
        except ApiError as error:
            self._log.warning("breakpoints not written", kind=error.kind.value)

    def _put(self, tenant: str, entry: Entry) -> list[bytes]:
        """Enter or renew; the digests of entries that made room."""
        known = self._known.setdefault(tenant, {})
        known[entry.digest] = entry
        gone = []
        while len(known) > ENTRIES_PER_TENANT_MAX:
            first = min(known.values(), key=lambda one: one.expires_at)
            del known[first.digest]
            gone.append(first.digest)
        return gone
