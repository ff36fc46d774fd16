"""How likely a block is read in the next moment, by its class and the time since its last use; learned as it goes. Pure.

Hazard = reads seen / time watched, in half-octaves of age. Blocks that left are watched on as ghosts, and a ghost that
is dropped takes its reads and its time with it: so what is evicted young looks no worse than it is. Old observations fade.

From the hazards comes a block's worth, its Gittins index: the most reads per second of room that holding it from now until
some later age can bring. It looks ahead, so a conversation that usually goes on after a minute is worth keeping at age 0,
and worth little once that minute is over. What has been seen little is taken to be like its like (`groups`).
"""

from math import frexp

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

N_AGES = 34
HALF_OCTAVE = 2.0**-0.5
FIRST_AGE_S = 0.5  # ages up to this are one; the last begins after nine hours
EDGES_S = np.concatenate(([0.0], FIRST_AGE_S * 2.0 ** (np.arange(N_AGES) / 2)))
WIDTHS_S = np.diff(EDGES_S)
PRIOR_READS = 0.2  # before anything was seen: a fifth of the blocks are read again,
PRIOR_AGE_S = 60.0  # most within minutes, so the order is that of LRU


class Hazards:
    """Reads and watched time by class and age. Classes of one group follow each other: `n_classes` = groups × members."""

    def __init__(self, n_classes: int, n_groups: int) -> None:
        self.n_classes, self._n_groups = n_classes, n_groups
        self._reads = np.zeros(n_classes * N_AGES)
        self._watched_s = np.zeros(n_classes * N_AGES)

    def read(self, classes: Ints, ages_s: Floats, unwatched_s: Floats) -> None:
        """Blocks of these classes were read at these ages, and had been unwatched for so long."""
        cells = classes * N_AGES + age_index(ages_s)
        self._reads += np.bincount(cells, minlength=len(self._reads))
        self._watched_s += np.bincount(cells, unwatched_s, len(self._reads))

    def read_one(self, class_: int, age_s: float, unwatched_s: float) -> None:
        """`read` for one block."""
        cell = class_ * N_AGES + age_index_of(age_s)
        self._reads[cell] += 1.0
        self._watched_s[cell] += unwatched_s

    def watch(self, classes: Ints, ages_s: Floats, unwatched_s: Floats) -> None:
        """Blocks reached these ages without being read since they were last watched."""
        cells = classes * N_AGES + age_index(ages_s - unwatched_s / 2)
        self._watched_s += np.bincount(cells, unwatched_s, len(self._reads))

    def fade(self, factor: float) -> None:
        self._reads *= factor
        self._watched_s *= factor

    def worth(self, weight: float) -> Floats:
        """Reads per second that a block can bring, by class and age: shape (n_classes, N_AGES).

        `weight` is how many reads a class needs before it counts as much as its group, and a group as all.
        """
        reads = self._reads.reshape(self.n_classes, N_AGES)
        watched_s = self._watched_s.reshape(self.n_classes, N_AGES)
        in_all = _shrunk(reads.sum(0), watched_s.sum(0), PRIOR_READS / (EDGES_S[:-1] + PRIOR_AGE_S), weight)
        shape = (self._n_groups, self.n_classes // self._n_groups, N_AGES)
        by_group = _shrunk(reads.reshape(shape).sum(1), watched_s.reshape(shape).sum(1), in_all, weight)
        return gittins(_shrunk(reads, watched_s, by_group.repeat(shape[1], 0), weight))


def age_index(ages_s: Floats) -> Ints:
    """Which half-octave an age falls in."""
    found = np.log2(np.maximum(ages_s, FIRST_AGE_S / 2) / FIRST_AGE_S) * 2 + 1
    return np.clip(found.astype(np.int64), 0, N_AGES - 1)


def age_index_of(age_s: float) -> int:
    """`age_index` of one age, without arrays."""
    if age_s < FIRST_AGE_S:
        return 0
    mantissa, exponent = frexp(age_s / FIRST_AGE_S)
    return min(2 * exponent - 1 + (mantissa >= HALF_OCTAVE), N_AGES - 1)


def gittins(hazards: Floats) -> Floats:
    """The largest ratio of expected reads to expected time held, over all ages to stop at; by class and starting age."""
    stays = np.exp(-hazards * WIDTHS_S)
    reads_within = 1.0 - stays
    held_s = reads_within / hazards
    alive = np.ones_like(hazards)
    reads, time_s, best = np.zeros_like(hazards), np.zeros_like(hazards), np.zeros_like(hazards)
    for ahead in range(N_AGES):
        n = N_AGES - ahead
        reads[:, :n] += alive[:, :n] * reads_within[:, ahead:]
        time_s[:, :n] += alive[:, :n] * held_s[:, ahead:]
        alive[:, :n] *= stays[:, ahead:]
        np.maximum(best[:, :n], reads[:, :n] / time_s[:, :n], out=best[:, :n])
    return best


def _shrunk(reads: Floats, watched_s: Floats, like: Floats, weight: float) -> Floats:
    return (reads + weight) / (watched_s + weight / like)
