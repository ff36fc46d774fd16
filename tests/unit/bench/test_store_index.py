import itertools

from keepwarm.bench.store_index import measure_index


class Ticks:
    """A clock that moves one second whenever it is looked at."""

    def __init__(self):
        self._ticks = itertools.count()

    def now(self):
        return float(next(self._ticks))

    monotonic = now


def test_every_look_up_is_timed():
    sample = measure_index(200, 1000, 3, "cost", Ticks())
    assert (sample.n_blocks, sample.n_tokens) == (200, 1000)
    assert sample.match_ms == sample.use_ms == [1000.0] * 3


def test_memory_is_counted_by_the_block():
    small, large = (measure_index(n, 64, 1, "lru", Ticks()).bytes_per_block for n in (400, 1600))
    assert small >= 64 * 4, "each block keeps its 64 token ids"
    assert 0.7 < large / small < 1.3
