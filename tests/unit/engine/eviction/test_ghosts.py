"""Ghosts: bounded, oldest first within a row; watched ones come back with what they were."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keepwarm.engine.eviction import Ghosts
from keepwarm.engine.eviction.watched import Watched


@given(st.integers(1, 16), st.lists(st.tuples(st.booleans(), st.integers(0, 30)), max_size=100))
def test_a_small_set_is_a_list_that_loses_its_oldest(n_max, steps):
    ghosts, twin = Ghosts(n_max), []
    for remembered, n in steps:
        key = b"%d" % n
        twin = [known for known in twin if known != key]
        if remembered:
            ghosts.remember(key)
            twin = [*twin, key][-n_max:]
        else:
            ghosts.forget(key)
        assert [b"%d" % n in ghosts for n in range(31)] == [b"%d" % n in twin for n in range(31)]
        assert len(ghosts) == len(twin)


@pytest.mark.parametrize("n_max", [17, 100, 1000])
def test_a_large_set_is_bounded_and_remembers_most_of_what_is_newest(n_max):
    ghosts = Ghosts(n_max)
    for n in range(5 * n_max):
        ghosts.remember(b"%d" % n)
        assert len(ghosts) <= n_max
    newest = range(5 * n_max - n_max // 2, 5 * n_max)
    assert sum(b"%d" % n in ghosts for n in newest) >= 0.9 * len(newest)
    assert not any(b"%d" % n in ghosts for n in range(n_max))


def test_a_set_of_nothing_is_refused():
    with pytest.raises(ValueError, match="0 ghosts"):
        Ghosts(0)


def test_what_is_watched_comes_back_once():
    watched = Watched(4)
    for n in range(1, 6):
        watched.put(n, n * 10, float(n), n)
    assert watched.take(1) is None
    assert watched.take(5) == (50, 5.0, 5)
    assert watched.take(5) is None
    classes, used_s = watched.all()
    assert sorted(classes.tolist()) == [20, 30, 40]
    assert sorted(used_s.tolist()) == [2.0, 3.0, 4.0]
