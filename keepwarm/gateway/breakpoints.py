"""The prefixes that breakpoints made known, by tenant: in memory for every request, in the database for the next start.

An entry says that a prefix may be read until it expires, and by whom; what is stored of it the engine knows. So losing one
costs a client a miss that its store could have spared it, and keeping one too many costs nothing: an entry whose turn then
failed is read for what is there of it. Bounded per tenant: those that expire first make room, many at a time. Expired ones
stay until then, so that a miss can be told from a prefix never seen.

Turns do not wait for the database. One write is under way at a time, and what changes meanwhile goes with the next one: so
the backlog is never more than the entries themselves, however slow the database is and however many turns renew them. A
process that is killed loses what its last write did not have, and of a lifetime `RENEWAL_S` at the most.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import sqlalchemy as sa
from msgspec.structs import asdict

from keepwarm.cache.breakpoints import Chosen, Entry, choose
from keepwarm.cache.render import Built
from keepwarm.core.errors import ApiError
from keepwarm.gateway.runtime import Runtime
from keepwarm.storage import Storage
from keepwarm.tables import breakpoints

ENTRIES_PER_TENANT_MAX = 2048  # a coding agent leaves two a turn. Each costs a marked request 2 µs, and half a kilobyte
ENTRIES_DROPPED = 256  # at once, so that a full tenant is not sorted for every request
EXPIRED_KEPT_S = 3600.0  # over a restart; so long a miss is "expired" and not "first seen"
RENEWAL_S = 10.0  # a lifetime that moved by less is not written

_NONE: Mapping[int, Mapping[bytes, Entry]] = MappingProxyType({})


class Breakpoints:
    """Finds and keeps entries. `root` names all a state depends on beside tokens and tenant: model, template, KV type."""

    def __init__(
        self,
        storage: Storage,
        runtime: Runtime,
        *,
        root: bytes,
        tokens_min: int,
        entries_max: int = ENTRIES_PER_TENANT_MAX,
    ) -> None:
        self._storage = storage
        self._clock = runtime.clock
        self._log = runtime.log
        self._tasks = runtime.tasks
        self._root = root
        self._tokens_min = tokens_min
        self._entries_max = entries_max
        self._known: dict[str, _Known] = {}
        self._changed: dict[tuple[str, bytes], Entry | None] = {}  # not written yet; None: dropped
        self._is_writing = False

    async def load(self) -> None:
        """Read what the last process left; forget what expired long ago."""
        oldest = self._clock.now() - EXPIRED_KEPT_S

        def read(connection: sa.Connection) -> Sequence[sa.Row[Any]]:
            connection.execute(sa.delete(breakpoints).where(breakpoints.c.expires_at <= oldest))
            return connection.execute(sa.select(breakpoints)).all()

        for row in await self._storage.run(read):
            entry = Entry(row.digest, row.n_tokens, row.position, row.ttl_s, row.expires_at)
            self._known.setdefault(row.tenant, _Known()).put(entry)

    def choose(self, tenant: str, built: Built) -> Chosen | None:
        """What this request reads and writes by its breakpoints; None when none of them has a lifetime."""
        if all(one.ttl_s is None for one in built.breakpoints):
            return None
        known = self._known.get(tenant)
        return choose(
            built.breakpoints,
            built.prompt.tokens,
            known.by_length if known is not None else _NONE,
            root=self._root,
            tokens_min=self._tokens_min,
            now=self._clock.now(),
        )

    def keep(self, tenant: str, chosen: Chosen) -> None:
        """The request's entries live from now on, so that one that comes beside it waits for it and reads."""
        if not chosen.kept:
            return
        known = self._known.setdefault(tenant, _Known())
        for entry in chosen.kept:
            if known.put(entry):
                self._changed[tenant, entry.digest] = entry
        if known.n_entries > self._entries_max:
            for digest in known.drop(max(ENTRIES_DROPPED, known.n_entries - self._entries_max)):
                self._changed[tenant, digest] = None
        if self._changed and not self._is_writing:
            self._is_writing = True
            self._tasks.create_task(self._write())

    async def _write(self) -> None:
        """Until nothing has changed. A database that is busy or full is no reason to fail a turn or to end the server."""
        try:
            while self._changed:
                changed, self._changed = self._changed, {}
                try:
                    await self._storage.run(partial(_replace, changed=changed))
                except (ApiError, sa.exc.DatabaseError) as error:
                    self._changed = changed | self._changed
                    self._log.warning("breakpoints not written", error=type(error).__name__)
                    return  # the next turn tries again
        finally:
            self._is_writing = False


class _Known:
    """One tenant's entries."""

    def __init__(self) -> None:
        self.by_length: dict[int, dict[bytes, Entry]] = {}
        self.n_entries = 0
        self._written: dict[bytes, Entry] = {}  # as the database has them, or will have when the backlog is written

    def put(self, entry: Entry) -> bool:
        """Enter or renew; whether that is worth writing."""
        group = self.by_length.setdefault(entry.n_tokens, {})
        self.n_entries += entry.digest not in group
        group[entry.digest] = entry
        written = self._written.get(entry.digest)
        is_renewal = written is not None and entry.ttl_s == written.ttl_s
        if written is not None and is_renewal and abs(entry.expires_at - written.expires_at) < RENEWAL_S:
            return False
        self._written[entry.digest] = entry
        return True

    def drop(self, n: int) -> list[bytes]:
        """Forget the n entries that expire first."""
        entries = sorted((one for group in self.by_length.values() for one in group.values()), key=_expires_at)
        for entry in entries[:n]:
            group = self.by_length[entry.n_tokens]
            del group[entry.digest], self._written[entry.digest]
            if not group:
                del self.by_length[entry.n_tokens]
        self.n_entries -= min(n, len(entries))
        return [entry.digest for entry in entries[:n]]


def _expires_at(entry: Entry) -> float:
    return entry.expires_at


def _replace(connection: sa.Connection, changed: Mapping[tuple[str, bytes], Entry | None]) -> None:
    """Make the rows what `changed` says."""
    stale = sa.delete(breakpoints).where(
        breakpoints.c.tenant == sa.bindparam("of"), breakpoints.c.digest == sa.bindparam("named")
    )
    connection.execute(stale, [{"of": tenant, "named": digest} for tenant, digest in changed])
    rows = [{"tenant": tenant, **asdict(entry)} for (tenant, _), entry in changed.items() if entry is not None]
    if rows:
        connection.execute(sa.insert(breakpoints), rows)
