"""Keys of blocks that left, in a bounded set of fingerprints: has this block been here before?

A key becomes a fingerprint of 63 bits, kept in one of many small rows; a row that is full loses its oldest. 8 bytes a key.
Two keys with one fingerprint are taken for the same, once in 10^13 or so at a hundred thousand ghosts: a ghost only ever
decides what is worth keeping, never what is read. Invariant: never more than `n_max` keys.
"""

import hashlib
from array import array

ROW_KEYS = 16  # a row overflows early when keys fall unevenly: 16 keep about nine tenths of n_max in their order


def fingerprint(key: bytes) -> int:
    """63 bits, never 0."""
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1 or 1


class Ghosts:
    """A set of up to `n_max` keys; the oldest of a row makes room."""

    def __init__(self, n_max: int) -> None:
        if n_max < 1:
            raise ValueError(f"a set of {n_max} ghosts remembers nothing")
        self._width = min(n_max, ROW_KEYS)
        self._n_rows = n_max // self._width
        self._table = array("q", bytes(8 * self._n_rows * self._width))  # 0: free; a row is oldest first
        self._n = 0

    def __len__(self) -> int:
        return self._n

    def __contains__(self, key: bytes) -> bool:
        return self.has(fingerprint(key))

    def remember(self, key: bytes) -> None:
        """The key is the newest of its row."""
        self.put(fingerprint(key))

    def forget(self, key: bytes) -> None:
        """The key is not in the set any more, if it was."""
        self.drop(fingerprint(key))

    def has(self, print_: int) -> bool:
        """`in` for a policy that keeps fingerprints; so are the next two."""
        start = print_ % self._n_rows * self._width
        return print_ in self._table[start : start + self._width]

    def put(self, print_: int) -> None:
        start = print_ % self._n_rows * self._width
        row = self._table[start : start + self._width]
        gone = print_ if print_ in row else row[0]
        self._n += gone == 0
        row.remove(gone)
        row.append(print_)
        self._table[start : start + self._width] = row

    def drop(self, print_: int) -> None:
        start = print_ % self._n_rows * self._width
        row = self._table[start : start + self._width]
        if print_ in row:
            row.remove(print_)
            row.insert(0, 0)
            self._table[start : start + self._width] = row
            self._n -= 1
