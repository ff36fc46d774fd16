"""Admission: how many turns may be running or queued, in all and per organisation. Pure counting, refused before any work.

Invariant: `n_turns` is the sum of the organisations' counts, and both bounds hold at every moment (`check_integrity`). A
permit is a context manager, so whoever entered gives back, once, whichever way the turn ends.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from keepwarm.core.errors import ApiError, ErrorKind

RETRY_AFTER_S = 1  # turns end every few hundred milliseconds; a longer wait would only leave the engine idle


class Admission:
    """Bounds concurrent turns. A turn with n choices runs n times in the engine, so it takes n places."""

    def __init__(self, turns_max: int, per_organisation_max: int) -> None:
        assert turns_max >= 1 and per_organisation_max >= 1
        self.turns_max = turns_max
        self.per_organisation_max = min(per_organisation_max, turns_max)
        self.n_turns = 0
        self._by_organisation: Counter[str] = Counter()

    @contextmanager
    def enter(self, organisation: str, n_turns: int = 1) -> Iterator[None]:
        """A permit for `n_turns` places. Raises ApiError(OVERLOADED), or INVALID_REQUEST when it could never fit."""
        if n_turns > self.per_organisation_max:
            raise ApiError(
                ErrorKind.INVALID_REQUEST,
                f"{n_turns} choices asked for, but at most {self.per_organisation_max} can run at once here",
                param="n",
            )
        held = self._by_organisation[organisation]
        if held + n_turns > self.per_organisation_max:
            raise _overloaded(f"{held} of your requests are being served, limit {self.per_organisation_max}")
        if self.n_turns + n_turns > self.turns_max:
            raise _overloaded(f"{self.n_turns} requests are being served, limit {self.turns_max}")
        self.n_turns += n_turns
        self._by_organisation[organisation] += n_turns
        try:
            yield
        finally:
            self.n_turns -= n_turns
            self._by_organisation[organisation] -= n_turns
            if not self._by_organisation[organisation]:
                del self._by_organisation[
                    organisation
                ]  # absent, not 0: the table must not grow with every organisation ever seen

    def check_integrity(self) -> None:
        """Assert the counts agree and the bounds hold."""
        assert self.n_turns == self._by_organisation.total() <= self.turns_max
        assert all(0 < held <= self.per_organisation_max for held in self._by_organisation.values())


def _overloaded(message: str) -> ApiError:
    return ApiError(ErrorKind.OVERLOADED, f"{message}; try again shortly", retry_after_s=RETRY_AFTER_S)
