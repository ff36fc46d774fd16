"""Blocks that left and are still watched: what they were, and whether they come back.

Like `Ghosts`, with the class, the last use and the number of uses beside each fingerprint: 10 bytes a ghost. A ghost goes
to a row by its fingerprint and takes the place of the row's oldest.
"""

from array import array

import numpy as np
from numpy.typing import NDArray

ROW_GHOSTS = 16


class Watched:
    """A table of up to `n_max` ghosts."""

    def __init__(self, n_max: int) -> None:
        self._width = min(n_max, ROW_GHOSTS)
        self._n_rows = n_max // self._width
        n = self._n_rows * self._width
        self._prints = array("I", bytes(4 * n))  # 0: free
        self._used_s = array("f", bytes(4 * n))
        self._classes = array("b", bytes(n))
        self._uses = bytearray(n)
        self._next = bytearray(self._n_rows)  # where the row's oldest is

    def put(self, print_: int, class_: int, used_s: float, uses: int) -> None:
        row = print_ % self._n_rows
        place = row * self._width + self._next[row]
        self._next[row] = (self._next[row] + 1) % self._width
        self._prints[place], self._used_s[place], self._classes[place] = print_, used_s, class_
        self._uses[place] = uses

    def take(self, print_: int) -> tuple[int, float, int] | None:
        """Class, last use and number of uses of a ghost that is none any more; None for one that is not known."""
        start = print_ % self._n_rows * self._width
        row = self._prints[start : start + self._width]
        if print_ not in row:
            return None
        place = start + row.index(print_)
        self._prints[place] = 0
        return self._classes[place], self._used_s[place], self._uses[place]

    def all(self) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
        """Classes and last uses of all ghosts."""
        there = np.flatnonzero(np.frombuffer(self._prints, np.uint32))
        return np.frombuffer(self._classes, np.int8)[there], np.frombuffer(self._used_s, np.float32)[there]
