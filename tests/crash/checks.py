"""What must hold after a restart. Every check returns what is violated, one line each; none of them changes the server.

The promises: an object that was acknowledged as `ready` and has not expired is `ready` at once and a full hit, without
having been computed again; answers equal cold ones bit by bit; what was deleted stays deleted; the bytes of each pool add
up and equal the files that are there; no file is left that nobody needs.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from blake3 import blake3

from keepwarm.core.clock import Clock
from tests.crash.client import Api, Reply, answer_of, known_of
from tests.crash.ledger import EXPIRY_SLACK_S, Answer, Known, Ledger
from tests.crash.plan import KEYS, N_QUESTIONS
from tests.crash.server import LogLine, Reference

SETTLE_S_MAX = 30.0
POLL_S = 0.05
PAGE = 4096  # a file takes whole pages of the disk tier's budget
COMPUTED_EVENTS = ("cache object settled", "lease repaired")
ENGINE_READY_EVENT = "engine ready"
DISK_POOL = "disk"
BY_A_KILL = ("torn", "orphaned")  # an unfinished write, or one whose block before it was never finished


class Checker:
    """The checks of one run. `port` is the server's at the moment."""

    def __init__(self, port: int, ledger: Ledger, reference: Reference, clock: Clock) -> None:
        self._apis = {key: Api(port, key) for key in KEYS}
        self._ledger, self._reference, self._clock = ledger, reference, clock

    def objects(self) -> list[str]:
        """Every object that was acknowledged, first all look-ups, then all uses. Syncs the ledger with the server."""
        found: list[str] = []
        ready: list[Known] = []
        for entry in self._ledger.known():
            reply = self._apis[entry.key].get(entry.cache_id)
            found += object_violations(entry, reply, self._clock.now())
            if reply.status == 200 and entry.is_ready and reply.body["status"] == "ready":
                ready.append(entry)
            self._sync(entry, reply)
        for entry in ready:
            found += self.use(entry)
        return found

    def use(self, entry: Known) -> list[str]:
        """A question about a ready object: a full hit, and the answer that a cold server gives."""
        question = entry.text % N_QUESTIONS
        reply = self._apis[entry.key].use(entry.cache_id, question)
        if reply.status == 404 and not entry.surely_live(self._clock.now()):
            return []
        if reply.status != 200:
            return [f"{entry.cache_id}: its use is answered with {reply.status}"]
        found = []
        n_cached = reply.body["usage"]["prompt_tokens_details"]["cached_tokens"]
        if n_cached < entry.n_tokens:
            found.append(f"{entry.cache_id}: {n_cached} tokens read of {entry.n_tokens}, not a full hit")
        return found + self.answers([answer_of(reply, entry.text, question)])

    def answers(self, answers: Iterable[Answer]) -> list[str]:
        """Bit-exactness: the scripted model's answers depend on every bit of every cell before them."""
        found = []
        for answer in answers:
            cold = self._reference.answer(answer.text, answer.question)
            if answer != cold:
                found.append(
                    f"text {answer.text}, question {answer.question}: {answer.content!r}, cold {cold.content!r}"
                )
        return found

    def settle(self) -> list[str]:
        """Wait until no object is pending; adopt those whose creation was never answered."""
        deadline = time.monotonic() + SETTLE_S_MAX
        for key, api in self._apis.items():
            while True:
                listed = api.call("GET", "/v1/caching?limit=1000").body["data"]
                pending = [body["id"] for body in listed if body["status"] == "pending"]
                if not pending:
                    break
                if time.monotonic() > deadline:
                    return [f"{cache_id}: still pending after {SETTLE_S_MAX:.0f} s" for cache_id in pending]
                time.sleep(POLL_S)
            known = {entry.cache_id: entry for entry in self._ledger.known()}
            for body in listed:
                if body["status"] == "ready":
                    entry = known.get(body["id"]) or known_of(body, key)
                    self._ledger.adopt(entry)
                    self._ledger.told_ready(entry)
        return []

    def _sync(self, entry: Known, reply: Reply) -> None:
        """What was uncertain is known by now; what is over is of no more interest."""
        if reply.status != 200 or entry.surely_expired(self._clock.now()):
            self._ledger.forget(entry)
            return
        entry.is_deleting = False
        entry.is_ready = reply.body["status"] == "ready"
        entry.expires_first = entry.expires_last = reply.body["expired_at"]


def object_violations(entry: Known, reply: Reply, now: float) -> list[str]:
    """One object's look-up against what was acknowledged of it."""
    name = entry.cache_id
    if entry.is_deleted:
        return [] if reply.status == 404 else [f"{name}: deleted, and answered with {reply.status}"]
    if reply.status == 404 and entry.is_deleting:
        return []
    if reply.status != 200:
        return [f"{name}: acknowledged, and answered with {reply.status}"]
    found = []
    status, expires_at = reply.body["status"], reply.body["expired_at"]
    if reply.body["tokens"] != entry.n_tokens:
        found.append(f"{name}: {reply.body['tokens']} tokens, acknowledged with {entry.n_tokens}")
    if not entry.expires_first <= expires_at <= entry.expires_last:
        found.append(f"{name}: expires at {expires_at}, acknowledged {entry.expires_first} to {entry.expires_last}")
    if now - EXPIRY_SLACK_S > expires_at and status not in ("inactive", "error"):
        found.append(f"{name}: {status} after its end")
    if entry.is_ready and now + EXPIRY_SLACK_S < expires_at and status != "ready":
        found.append(f"{name}: acknowledged as ready, and {status}")
    return found


def recomputed(lines: Iterable[LogLine], ready: Sequence[Known]) -> list[str]:
    """Objects acknowledged as ready that the new engine computed again."""
    wanted, engine_is_new, found = {entry.cache_id for entry in ready}, False, []
    for line in lines:
        engine_is_new |= line.event == ENGINE_READY_EVENT
        if engine_is_new and line.event in COMPUTED_EVENTS and line.object_id in wanted:
            found.append(f"{line.object_id}: acknowledged as ready, and computed again after the restart")
    return found


def pool_violations(pools: Sequence[dict[str, Any]], store: Path, disk_bytes: int) -> list[str]:
    """The books of each pool, and the disk's against its files."""
    found = []
    for pool in pools:
        free, resident, leased = pool["bytes_free"], pool["bytes_resident"], pool["bytes_leased"]
        if min(free, resident, leased) < 0 or free + resident + leased != pool["bytes_total"]:
            found.append(f"pool {pool['name']}: {free:,} + {resident:,} + {leased:,} is not {pool['bytes_total']:,}")
        if pool["name"] == DISK_POOL:
            on_disk = sum(_file_bytes(path) for path in (store / "blocks").iterdir())
            if on_disk != resident + leased:
                found.append(f"the disk pool holds {resident + leased:,} bytes, its files take {on_disk:,}")
            if on_disk > disk_bytes:
                found.append(f"the disk tier's files take {on_disk:,} bytes of {disk_bytes:,}")
    return found


def damaged(counts: Mapping[str, int]) -> list[str]:
    """Blocks are whole or not there: what the start found wrong must be the temporary files of a write cut short."""
    return [
        f"{n} blocks found damaged by a kill: {cause}" for cause, n in counts.items() if n and cause not in BY_A_KILL
    ]


def left_over(store: Path, live: Iterable[str]) -> list[str]:
    """Files nobody needs, and leases that are not there. `live` are the ids of the ready objects."""
    found = [f"left over: {path.relative_to(store)}" for path in store.rglob("*.tmp")]
    leases = {path.name.partition(".")[0] for path in (store / "leases").iterdir()}
    wanted = {blake3(cache_id.encode()).hexdigest(): cache_id for cache_id in live}
    found += [f"a lease of no ready object: {name[:16]}" for name in sorted(leases - wanted.keys())]
    found += [f"{wanted[name]}: ready, and its lease is not on disk" for name in sorted(wanted.keys() - leases)]
    return found


def _file_bytes(path: Path) -> int:
    """In whole pages; 0 when it has just been deleted."""
    try:
        return -(-path.stat().st_size // PAGE) * PAGE
    except FileNotFoundError:
        return 0
