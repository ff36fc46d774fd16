"""Time and ids come from outside: every layer that needs them is handed a `Clock` or an `Ids`, so tests can steer both."""

import secrets
import string
import time
from typing import Protocol

ID_ALPHABET = string.ascii_lowercase + string.digits
ID_LENGTH = 20  # 20 of 36 letters: 103 bits, the length Kimi's ids have


class Clock(Protocol):
    """Wall time for lifetimes that users see, monotonic time for durations."""

    def now(self) -> float:
        """Unix time in seconds."""
        ...

    def monotonic(self) -> float:
        """Seconds since an arbitrary start; never goes back."""
        ...


class SystemClock:
    """The machine's own clock."""

    def now(self) -> float:
        return time.time()

    def monotonic(self) -> float:
        return time.monotonic()


def draw_seed() -> int:
    """A fresh 31-bit seed for a turn that names none."""
    return secrets.randbits(31)


class Ids(Protocol):
    """Makes unguessable ids: `ids.new("cache-")` gives "cache-" and 20 lower-case letters and digits."""

    def new(self, prefix: str) -> str: ...


class RandomIds:
    """Ids from the operating system's random source."""

    def new(self, prefix: str) -> str:
        number = secrets.randbelow(len(ID_ALPHABET) ** ID_LENGTH)  # one draw: twenty cost a tenth of a small request
        letters = []
        for _ in range(ID_LENGTH):
            number, digit = divmod(number, len(ID_ALPHABET))
            letters.append(ID_ALPHABET[digit])
        return prefix + "".join(letters)
