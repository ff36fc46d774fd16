"""The host tier's size under pressure: bounded, monotone, back in the end, and never to and fro."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from keepwarm.engine import PoolStatus
from keepwarm.engine.governor import Governed, GovernorSettings, Pools, govern, host_target, lacking_bytes, pool
from keepwarm.engine.pressure import MemoryReading

MIB, GIB = 1 << 20, 1 << 30
SETTINGS = GovernorSettings()
CALM = MemoryReading(some_avg10=0.0, full_avg10=0.0, available_bytes=20 * GIB, total_bytes=24 * GIB)
RESERVE = 24 * GIB // 20
WAITING = msgspec.structs.replace(CALM, some_avg10=30.0)

bytes_upto = st.integers(0, 32 * GIB)
percents = st.floats(0, 100)
readings = st.builds(
    MemoryReading,
    some_avg10=st.none() | percents,
    full_avg10=st.none() | percents,
    available_bytes=st.none() | bytes_upto,
    cgroup_limit_bytes=st.none() | bytes_upto,
    cgroup_used_bytes=st.none() | bytes_upto,
    total_bytes=st.just(24 * GIB),
)
states = st.builds(Governed, bytes_upto, st.integers(0, 40), st.integers(0, 5))


def left(available_bytes):
    return msgspec.structs.replace(CALM, available_bytes=available_bytes)


def test_without_pressure_the_configured_size_stays():
    assert govern(8 * GIB, Governed(8 * GIB), CALM).bytes_target == 8 * GIB


def test_unknown_numbers_press_nobody():
    assert lacking_bytes(MemoryReading()) == 0
    assert govern(8 * GIB, Governed(8 * GIB), MemoryReading()).bytes_target == 8 * GIB


def test_waiting_gives_back_a_quarter_and_then_lets_the_average_pass():
    state, targets = Governed(8 * GIB), []
    for _ in range(7):
        state = govern(8 * GIB, state, WAITING)
        targets.append(state.bytes_target)
    assert targets == [6 * GIB] * 6 + [6 * GIB * 3 // 4]


def test_a_little_less_than_the_reserve_gives_back_a_quarter():
    assert host_target(8 * GIB, 8 * GIB, left(RESERVE)) == 8 * GIB
    assert host_target(8 * GIB, 8 * GIB, left(RESERVE - 1)) == 6 * GIB


def test_all_that_is_lacking_is_given_back_at_once_even_while_settling():
    reading = msgspec.structs.replace(CALM, cgroup_limit_bytes=10 * GIB, cgroup_used_bytes=12 * GIB)
    assert lacking_bytes(reading) == 2 * GIB + 512 * MIB
    after = govern(8 * GIB, Governed(8 * GIB, 0, 5), reading)
    assert after == Governed(8 * GIB - 2 * GIB - 512 * MIB, 0, SETTINGS.n_settling)


def test_what_the_tier_takes_up_is_given_back_not_what_it_might():
    assert host_target(8 * GIB, 8 * GIB, WAITING, taken_bytes=1 * GIB) == 768 * MIB


def test_the_reserve_is_a_share_of_a_large_limit_and_never_tiny():
    settings = GovernorSettings(reserve_bytes_min=512 * MIB, reserve_share=0.05)
    large = MemoryReading(cgroup_limit_bytes=100 * GIB, cgroup_used_bytes=99 * GIB)
    small = MemoryReading(cgroup_limit_bytes=2 * GIB, cgroup_used_bytes=2 * GIB - 100 * MIB)
    assert lacking_bytes(large, settings) == 4 * GIB
    assert lacking_bytes(small, settings) == 412 * MIB


def test_the_floor_holds_until_next_to_nothing_is_left():
    assert host_target(8 * GIB, 70 * MIB, left(RESERVE // 2)) == 64 * MIB
    assert host_target(8 * GIB, 64 * MIB, left(RESERVE // 2)) == 64 * MIB
    assert host_target(8 * GIB, 20 * MIB, left(RESERVE // 2)) == 20 * MIB  # the floor is no reason to grow
    assert host_target(8 * GIB, 64 * MIB, left(RESERVE // 8)) == 0
    stalled = msgspec.structs.replace(WAITING, full_avg10=50.0)
    assert host_target(8 * GIB, 64 * MIB, stalled) == 48 * MIB


def test_it_grows_by_an_eighth_after_enough_calm_and_not_before():
    state, sizes = Governed(4 * GIB), []
    for _ in range(SETTINGS.n_calm_min + 5):
        state = govern(8 * GIB, state, CALM)
        sizes.append(state.bytes_target // GIB)
    assert sizes == [4] * (SETTINGS.n_calm_min - 1) + [5, 6, 7, 8, 8, 8]


def test_one_reading_that_is_not_calm_begins_the_count_anew():
    state = Governed(4 * GIB, SETTINGS.n_calm_min - 1)
    between = msgspec.structs.replace(CALM, some_avg10=5.0)
    assert govern(8 * GIB, state, CALM).bytes_target == 5 * GIB
    assert govern(8 * GIB, state, between) == Governed(4 * GIB)


def test_what_was_granted_and_not_yet_filled_is_not_granted_twice():
    reading = left(RESERVE * 3 // 2 + 2 * GIB)
    assert host_target(8 * GIB, 4 * GIB, reading) == 5 * GIB
    assert host_target(8 * GIB, 4 * GIB, reading, taken_bytes=3 * GIB) == 5 * GIB
    assert host_target(8 * GIB, 4 * GIB, reading, taken_bytes=3 * GIB - 1) == 4 * GIB


@given(bytes_upto, states, readings, st.none() | bytes_upto)
def test_bounded(configured, before, reading, taken):
    after = govern(configured, before, reading, taken_bytes=taken)
    assert 0 <= after.bytes_target <= configured
    assert 0 <= after.n_calm <= SETTINGS.n_calm_min
    assert 0 <= after.n_settling <= SETTINGS.n_settling
    assert after.bytes_target <= min(before.bytes_target, configured) + max(configured // 8, 1)


def worse(reading, percent, n_bytes):
    """The same or more pressure in every number that is known."""
    changes = {}
    for name in ("some_avg10", "full_avg10"):
        if (value := getattr(reading, name)) is not None:
            changes[name] = value + percent
    if reading.available_bytes is not None:
        changes["available_bytes"] = max(reading.available_bytes - n_bytes, 0)
    if reading.cgroup_used_bytes is not None:
        changes["cgroup_used_bytes"] = reading.cgroup_used_bytes + n_bytes
    return msgspec.structs.replace(reading, **changes)


@given(bytes_upto, states, readings, st.none() | bytes_upto, percents, bytes_upto)
def test_more_pressure_never_gives_a_larger_target(configured, before, reading, taken, percent, n_bytes):
    mild = govern(configured, before, reading, taken_bytes=taken)
    harsh = govern(configured, before, worse(reading, percent, n_bytes), taken_bytes=taken)
    assert harsh.bytes_target <= mild.bytes_target


@given(bytes_upto, states, readings)
def test_a_reading_that_stays_the_same_moves_the_target_one_way_and_to_rest(configured, before, reading):
    state, targets = before, []
    for _ in range(150):
        state = govern(configured, state, reading)
        targets.append(state.bytes_target)
    assert targets in (sorted(targets), sorted(targets, reverse=True))
    assert len(set(targets[-10:])) == 1 or reading.some_avg10 is not None  # steps get small while tasks go on waiting


@given(st.integers(1, 16 * GIB), st.integers(0, 32 * GIB), st.floats(0.01, 1))
def test_with_the_tier_as_the_only_consumer_it_comes_to_rest(configured, room, fill_share):
    """The tier fills what it may by a share at a time, and what it takes is no longer available."""
    state, taken, targets = Governed(configured), 0, []
    for _ in range(600):
        reading = MemoryReading(0.0, 0.0, max(room - taken, 0), total_bytes=32 * GIB)
        state = govern(configured, state, reading, taken_bytes=taken)
        taken = min(taken + int((state.bytes_target - taken) * fill_share) + 1, state.bytes_target)
        targets.append(state.bytes_target)
    falls = [i for i in range(1, len(targets)) if targets[i] < targets[i - 1]]
    rises = [i for i in range(1, len(targets)) if targets[i] > targets[i - 1]]
    assert not falls or not rises or max(falls) < min(rises)
    assert len(set(targets[-100:])) == 1


@given(st.integers(1, 16 * GIB), readings)
def test_it_is_whole_again_after_pressure_has_gone(configured, reading):
    state = Governed(configured)
    for _ in range(10):
        state = govern(configured, state, reading)
    roomy = MemoryReading(0.0, 0.0, 64 * GIB, total_bytes=64 * GIB)
    for _ in range(SETTINGS.n_calm_min + 9):
        state = govern(configured, state, roomy)
    assert state.bytes_target == configured


def test_a_pool_is_exact():
    assert pool("host", total=10, resident=3, leased=2, configured=20, n_blocks=4) == PoolStatus(
        "host", 10, 5, 3, 2, 20, 4
    )


@pytest.mark.parametrize(
    "change", [{"resident": 9}, {"resident": -1}, {"leased": -1}, {"configured": -1}, {"n_blocks": -1}, {"total": 4}]
)
def test_a_pool_that_holds_more_than_it_has_is_a_bug(change):
    with pytest.raises(AssertionError):
        pool("host", **({"total": 10, "resident": 3, "leased": 2, "configured": 20, "n_blocks": 4} | change))


def test_three_pools():
    live, host, disk = (pool(name, total=9, resident=1, leased=2, configured=9) for name in ("live", "host", "disk"))
    assert Pools(live, host, disk).all == (live, host, disk)
    with pytest.raises(AssertionError):
        Pools(host, live, disk)
    with pytest.raises(AssertionError):
        Pools(live, host, PoolStatus("disk", 9, 7, 1, 2, 9))
