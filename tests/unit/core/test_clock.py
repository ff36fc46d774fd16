"""Ids and time."""

import re

from keepwarm.core.clock import RandomIds, SystemClock, draw_seed


def test_ids_have_their_prefix_and_twenty_letters_and_never_repeat():
    ids = RandomIds()
    made = [ids.new("cache-") for _ in range(2000)]
    assert all(re.fullmatch(r"cache-[a-z0-9]{20}", one) for one in made)
    assert len(set(made)) == len(made)
    assert len({one[6] for one in made}) == len({one[-1] for one in made}) == 36  # every place takes every letter


def test_seeds_fit_the_samplers_random_source():
    assert all(0 <= draw_seed() < 2**31 for _ in range(100))


def test_time_goes_on():
    clock = SystemClock()
    assert clock.now() > 1_700_000_000
    assert clock.monotonic() <= clock.monotonic()
