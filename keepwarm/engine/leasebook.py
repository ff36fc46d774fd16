"""Which lease keeps what: the same for a store of blocks and a store of whole states.

What a lease keeps is pinned by its store before it is entered here, and unpinned when the lease ends or keeps something
else. With a disk tier a lease becomes durable there, and its record goes when the lease does.
"""

import threading
from collections.abc import Callable, ItemsView
from typing import Generic, Protocol, TypeVar

from keepwarm.engine.reuse import Done

T = TypeVar("T")
K_contra = TypeVar("K_contra", contravariant=True)


class DiskLeases(Protocol[K_contra]):
    """The disk tier's side of a store."""

    def lease(self, pin: str, kept: K_contra, done: Done, /) -> None: ...
    def drop(self, pin: str, /) -> None: ...


class LeaseBook(Generic[T]):
    """The leases of one store. `lock` is the store's; `unpin` gives back what a lease kept, and is called with it held."""

    def __init__(
        self, lock: threading.Lock, unpin: Callable[[T], None], durable: DiskLeases[T] | None, held: dict[str, T]
    ) -> None:
        """`held` are the leases that were whole at the start."""
        self._lock, self._unpin, self._durable, self._held = lock, unpin, durable, held

    def keep(self, pin: str, kept: T) -> None:
        """The lease keeps this, which is pinned, and nothing else any more. Lock held."""
        self._give_back(pin)
        self._held[pin] = kept

    def make_durable(self, pin: str, done: Done) -> None:
        """See `Store.make_durable`."""
        with self._lock:
            kept = self._held.get(pin)
            if self._durable and kept is not None:
                self._durable.lease(pin, kept, done)
                return
        done(None)

    def end(self, pin: str) -> None:
        """See `Store.unpin`."""
        with self._lock:
            if self._durable and pin in self._held:
                self._durable.drop(pin)
            self._give_back(pin)

    def _give_back(self, pin: str) -> None:
        kept = self._held.pop(pin, None)
        if kept is not None:
            self._unpin(kept)

    def items(self) -> ItemsView[str, T]:
        """Leases and what they keep. Lock held."""
        return self._held.items()

    def __len__(self) -> int:
        return len(self._held)

    @property
    def pins(self) -> tuple[str, ...]:
        """See `Store.pins`."""
        with self._lock:
            return tuple(self._held)
