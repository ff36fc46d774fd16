"""The story of one request's cache, told once for both books: what is read, called and written, in which order.

`prepare` is a generator: it yields the HTTP calls it wants and is sent their replies; a book performs them, blocking or
awaiting. Its own steps touch the SQLite file, so the asynchronous book runs them in a thread. A claim that is held is given
back whichever way the generator ends.

An object's end of life is counted here from before the call that set it, so a clock that differs from the server's does
no harm and the object lives a little longer than believed.
"""

import logging
import sqlite3
from collections.abc import Generator, Mapping, Sequence
from hashlib import sha256
from typing import Any, cast

from msgspec import Struct
from msgspec.structs import replace

from keepwarm.client.decision import Policy, Row, Step, decide
from keepwarm.client.knowledge import HEADER_USED, Form, Knowledge, Sending, WireMessage
from keepwarm.client.rows import Rows
from keepwarm.core.clock import Clock, Ids

STEPS_MAX = 4  # the longest way: CHECK finds it expired, RENEW finds it gone, CREATE, and FULL or USE
MARK = "keepwarm_book"  # metadata of our objects: finds one whose creation was never written down
NOT_FOUND, BAD_REQUEST, OK = 404, 400, 200
PASSING = (401, 408, 409, 425, 429)  # refusals that say nothing of the object
SERVER_FAULTS = 500
UNKNOWN_MODEL = "model_not_found"
LOG = logging.getLogger("keepwarm.client")


class Call(Struct, frozen=True):
    """An HTTP call of the caching API; the path is relative to the client's base URL."""

    method: str
    path: str
    body: dict[str, Any] | None = None
    query: dict[str, Any] | None = None


class Reply(Struct, frozen=True):
    """What came back. `status` None: nothing did, and the call may have been carried out.

    `error` is the server's word for a refusal, not its message, which may quote the request.
    """

    status: int | None
    body: Any = None
    error: str | None = None

    @property
    def object_status(self) -> str | None:
        """Of a reply that is a cache object."""
        return self.body.get("status") if self.status == OK and isinstance(self.body, dict) else None

    @property
    def object_id(self) -> str | None:
        found = self.body.get("id") if self.status == OK and isinstance(self.body, dict) else None
        return found if isinstance(found, str) and found else None

    @property
    def refused(self) -> bool:
        """The server has said no, for a reason that lies in the call or the object."""
        return self.status is not None and OK < self.status < SERVER_FAULTS and self.status not in PASSING


Steps = Generator[Call, Reply, Sending]
Work = Generator[Call, Reply, None]


class Bookkeeping:
    """The decisions and rows of one book."""

    def __init__(self, rows: Rows, model: str, policy: Policy, clock: Clock, ids: Ids) -> None:
        self._rows, self._model, self._policy, self._clock, self._ids = rows, model, policy, clock, ids

    def prepare(self, key: str, knowledge: Knowledge, new: Sequence[WireMessage], form: Form) -> Steps:
        """How to send `new` behind `knowledge`."""
        digest = knowledge.digest(self._model)
        full = Sending(key, knowledge, tuple(new), self._clock.now())
        for _ in range(STEPS_MAX):
            row = self._rows.read(key)
            step = decide(row, digest, self._clock.now(), self._policy)
            if step not in (Step.USE, Step.FULL):
                claim = self._ids.new("claim-")
                row, step = self._rows.claim(key, digest, claim, self._clock.now(), self._policy)
                try:
                    yield from self._work(step, key, knowledge, claim, row)
                finally:
                    if step not in (Step.USE, Step.FULL):
                        self._rows.release(key, claim)
            if step is Step.FULL:
                return full
            if step is Step.USE:
                assert row is not None
                return replace(
                    full,
                    form=form,
                    cache_id=row.cache_id,
                    expires_at=row.expires_at,
                    prepared_at=self._clock.now(),
                    reset_ttl_s=self._policy.ttl_s,
                )
        return full

    def again(self, sending: Sending, status: int, code: str | None) -> Sending | None:
        """What to send after a refusal: the same in full if the cache may be the reason, None if it cannot be."""
        if sending.cache_id is None or status not in (BAD_REQUEST, NOT_FOUND) or code == UNKNOWN_MODEL:
            return None
        # A 400 comes back with the next question (an object of another model), a 404 is over once the object is made anew.
        wait_s = self._policy.retry_s if status == BAD_REQUEST else 0.0
        self._doubt(sending, wait_s)
        return sending.in_full()

    def answered(self, sending: Sending, headers: Mapping[str, str]) -> None:
        """The request went well: its object lives on, or, in the header form, was not used."""
        if sending.cache_id is None:
            return
        if sending.form is Form.HEADERS and HEADER_USED not in headers:
            self._doubt(sending, self._policy.check_s)
            return
        expires_at = sending.prepared_at + sending.reset_ttl_s
        if expires_at - sending.expires_at < sending.reset_ttl_s * self._policy.renew_share / 4:
            return  # not worth a write
        try:
            self._rows.extend(sending.key, sending.cache_id, expires_at)
        except sqlite3.Error as error:
            warn(error)

    def _doubt(self, sending: Sending, wait_s: float) -> None:
        assert sending.cache_id is not None
        try:
            self._rows.doubt(sending.key, sending.cache_id, self._clock.now() + wait_s)
        except sqlite3.Error as error:
            warn(error)

    def _work(self, step: Step, key: str, knowledge: Knowledge, claim: str, row: Row | None) -> Work:
        match step:
            case Step.CREATE:
                yield from self._create(key, knowledge, claim, row)
            case Step.CHECK:
                assert row is not None
                yield from self._check(key, claim, row)
            case Step.RENEW:
                assert row is not None
                yield from self._renew(key, claim, row)
            case Step.USE | Step.FULL:
                pass

    def _create(self, key: str, knowledge: Knowledge, claim: str, row: Row | None) -> Work:
        digest = knowledge.digest(self._model)
        if row is not None and row.cache_id is not None:
            yield Call("DELETE", object_path(row.cache_id))  # if that fails, its lifetime ends it
        mark = sha256(f"{key}\0{digest}".encode()).hexdigest()
        now = self._clock.now()
        made = Row(digest, next_at=now + self._policy.retry_s)
        if row is not None and row.digest != digest:
            made = replace(made, replaced_digest=row.digest, replaced_at=now)
        adopted = None
        if row is not None and row.uncertain:
            listed = yield Call("GET", "/caching", query={f"metadata[{MARK}]": mark, "limit": 1})
            if listed.status != OK and not listed.refused:  # a refusal means there is no such list: create blindly
                self._rows.record(key, claim, replace(made, uncertain=True))
                return
            adopted = marked_object(listed, mark)
        if adopted is not None:
            self._rows.record(
                key, claim, replace(made, cache_id=adopted, next_at=now)
            )  # its lifetime is unknown: renewed
            return
        reply = yield Call("POST", "/caching", body=self._new_object(knowledge, mark))
        if reply.object_id is None:
            why = (reply.status or "no answer", reply.error or "")
            LOG.warning("no cache object could be created (%s %s); its knowledge is sent in full", *why)
            self._rows.record(key, claim, replace(made, uncertain=not reply.refused))
            return
        made = replace(
            made,
            cache_id=reply.object_id,
            ready=reply.object_status == "ready",
            expires_at=now + self._policy.ttl_s,
            next_at=now + self._policy.check_s,
        )
        if not self._rows.record(key, claim, made):
            yield Call("DELETE", object_path(reply.object_id))  # the claim ran out, somebody else creates one

    def _new_object(self, knowledge: Knowledge, mark: str) -> dict[str, Any]:
        body: dict[str, Any] = {"model": self._model, "messages": list(knowledge.messages)}
        if knowledge.tools:
            body["tools"] = list(knowledge.tools)
        return {**body, "ttl": self._policy.ttl_s, "metadata": {MARK: mark}}

    def _check(self, key: str, claim: str, row: Row) -> Work:
        assert row.cache_id is not None
        reply = yield Call("GET", object_path(row.cache_id))
        now = self._clock.now()
        match reply.object_status:
            case "ready":
                found = replace(row, ready=True)
            case "inactive":
                found = replace(row, expires_at=0.0, next_at=0.0)
            case "error":
                LOG.warning("a cache object could not be computed; its knowledge is sent in full")
                yield Call("DELETE", object_path(row.cache_id))
                found = replace(row, cache_id=None, next_at=now + self._policy.retry_s)
            case _ if reply.status == NOT_FOUND:
                found = replace(row, cache_id=None, next_at=0.0)
            case _:
                found = replace(row, next_at=now + self._policy.check_s)
        self._rows.record(key, claim, found)

    def _renew(self, key: str, claim: str, row: Row) -> Work:
        assert row.cache_id is not None
        now = self._clock.now()
        live = row.ready and now < row.expires_at
        reply = yield Call("PUT", object_path(row.cache_id), body={"ttl": self._policy.ttl_s})
        if reply.status == OK:
            # The server calls it `pending` for a moment, but what was computed is there and may be used.
            later = now + self._policy.check_s
            renewed = replace(row, ready=live, expires_at=now + self._policy.ttl_s, next_at=later)
        elif reply.status == NOT_FOUND or (reply.refused and not live):
            renewed = replace(row, cache_id=None, ready=False, next_at=0.0)
        else:
            renewed = replace(row, next_at=now + self._policy.retry_s)
        self._rows.record(key, claim, renewed)


def advance(steps: Steps, reply: Reply | None, full: Sending) -> Call | Sending:
    """One step of a `prepare`. A book that cannot be read or written is no use, and no error either."""
    try:
        return next(steps) if reply is None else steps.send(reply)
    except StopIteration as done:
        return cast("Sending", done.value)
    except sqlite3.Error as error:
        warn(error)
        return full


def end(steps: Steps) -> None:
    """Give back what an abandoned `prepare` holds."""
    try:
        steps.close()
    except sqlite3.Error as error:
        warn(error)


def marked_object(listed: Reply, mark: str) -> str | None:
    """The id of a listed object that carries our mark and can be brought back to life."""
    found = listed.body.get("data") if listed.status == OK and isinstance(listed.body, dict) else None
    for cached in found or ():
        if (cached.get("metadata") or {}).get(MARK) == mark and cached.get("status") != "error":
            return str(cached["id"])
    return None


def object_path(cache_id: str) -> str:
    return f"/caching/{cache_id}"


def warn(error: sqlite3.Error) -> None:
    LOG.warning("the cache book cannot be used: %s; knowledge is sent in full", error)
