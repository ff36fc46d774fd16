"""What the server has acknowledged: the harness's own model of the objects, kept by the clients as answers arrive.

It claims only what an answer said. A call without an answer may have taken effect or not, so it widens what is allowed:
a delete that was sent makes an object's presence unknown, a reset of its lifetime makes the earlier of both ends the one
that is relied on. `check` calls sync it with the server after each restart. Thread-safe.
"""

import threading
from collections.abc import Iterable

from msgspec import Struct

from tests.crash.plan import Act, Operation

EXPIRY_SLACK_S = 1.0  # lifetimes end on whole seconds, and an answer takes its time
RESET_SLACK_S = 20  # a reset that comes after the end would make an object pending, so it is sent long before
CALL_S_MAX = 60.0  # a call that takes effect does so within this


class Known(Struct):
    """One object, as far as it is acknowledged. Times are unix seconds."""

    cache_id: str
    key: str
    owner: int  # the one client that resets its lifetime, so that resets have an order
    text: int
    n_tokens: int
    expires_first: int  # not before this, whichever call without an answer took effect
    expires_last: int
    is_ready: bool = False
    is_deleting: bool = False  # a delete was sent
    is_deleted: bool = False  # and acknowledged

    def surely_live(self, now: float) -> bool:
        return not self.is_deleting and now + EXPIRY_SLACK_S < self.expires_first

    def surely_expired(self, now: float) -> bool:
        return now - EXPIRY_SLACK_S > self.expires_last


class Answer(Struct, frozen=True):
    """A whole answer at temperature 0 to a question about a text, to be compared with a cold one."""

    text: int
    question: int
    content: str
    reason: str


class Ledger:
    """All objects the clients know of, their answers of this round, and a log of what was done."""

    def __init__(self, known: Iterable[Known] = ()) -> None:
        self._lock = threading.Lock()
        self._known = {entry.cache_id: entry for entry in known}
        self._answers: list[Answer] = []
        self._log: list[str] = []
        self._n_answers = self._n_ready = 0
        self.answered = threading.Condition(self._lock)

    @property
    def n_answers(self) -> int:
        """Calls of this round that were answered; changes are told through `answered`, which must be held."""
        return self._n_answers

    @property
    def n_ready(self) -> int:
        """Objects that were told as ready for the first time; as `n_answers`."""
        return self._n_ready

    def begin_round(self) -> None:
        with self._lock:
            self._answers, self._log, self._n_answers = [], [], 0

    def known(self) -> list[Known]:
        """All entries, oldest first."""
        with self._lock:
            return list(self._known.values())

    def answers(self) -> list[Answer]:
        with self._lock:
            return list(self._answers)

    def log(self) -> list[str]:
        """The round's calls in the order in which they ended."""
        with self._lock:
            return list(self._log)

    def pick(self, operation: Operation, key: str, client: int, now: float) -> Known | None:
        """The object an operation is about; None when the tenant has none that will do."""
        with self._lock:
            able = [entry for entry in self._known.values() if entry.key == key and not entry.is_deleted]
            if operation.act is Act.RESET:
                able = [entry for entry in able if entry.owner == client and entry.surely_live(now + RESET_SLACK_S)]
            return able[int(operation.pick * len(able))] if able else None

    def adopt(self, entry: Known) -> None:
        with self._lock:
            self._known[entry.cache_id] = entry

    def forget(self, entry: Known) -> None:
        with self._lock:
            self._known.pop(entry.cache_id, None)

    def told_ready(self, entry: Known) -> None:
        with self.answered:
            self._n_ready += not entry.is_ready
            entry.is_ready = True
            self.answered.notify_all()

    def delete_sent(self, entry: Known) -> None:
        with self._lock:
            entry.is_deleting = True

    def delete_acknowledged(self, entry: Known) -> None:
        with self._lock:
            entry.is_deleting = entry.is_deleted = True

    def reset_sent(self, entry: Known, ttl_s: int, now: float) -> None:
        """Either end of life is possible from here on."""
        with self._lock:
            entry.expires_first = min(entry.expires_first, int(now) + ttl_s)
            entry.expires_last = max(entry.expires_last, int(now + CALL_S_MAX) + ttl_s)

    def told_expiry(self, entry: Known, expires_at: int) -> None:
        """The server named the end of life."""
        with self._lock:
            entry.expires_first = entry.expires_last = expires_at

    def answer(self, answer: Answer) -> None:
        with self._lock:
            self._answers.append(answer)

    def note(self, line: str, *, is_answered: bool) -> None:
        """A call has ended."""
        with self.answered:
            self._log.append(line)
            self._n_answers += is_answered
            self.answered.notify_all()
