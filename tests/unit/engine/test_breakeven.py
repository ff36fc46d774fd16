"""Read or compute: by measured speeds, never to the slower side, and never for ever."""

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from keepwarm.engine.breakeven import RETRY_HITS, Speeds, fastest, worth

TOKEN_BYTES = 23_040
DEPTHS = range(0, 4096, 512)


def measured(*, prefill=1000.0, host=None, disk=None, depth_cost=0.0):
    """Speeds in tokens/s at depth 0, and bytes/s; `depth_cost` is seconds a token for each token before it."""
    speeds = Speeds()
    if prefill:
        for depth in DEPTHS:
            speeds.observe_prefill(512, depth, 512 * (1 / prefill + depth_cost * (depth + 256)))
    if host:
        speeds.observe_restore("host", 1 << 20, (1 << 20) / host)
    if disk:
        speeds.observe_restore("disk", 1 << 20, (1 << 20) / disk)
    return speeds


def test_unknown_is_none():
    speeds = Speeds()
    assert (speeds.prefill_tokens_per_s, speeds.host_bytes_per_s, speeds.disk_bytes_per_s) == (None, None, None)
    assert speeds.prefill_s(0, 10) is None
    assert speeds.read_s("disk", 10) is None
    assert speeds.read_s("disk", 0) == 0.0


def test_speeds_are_what_was_observed():
    speeds = measured(prefill=800.0, host=4e9, disk=1e9)
    assert speeds.prefill_tokens_per_s == pytest.approx(800)
    assert speeds.host_bytes_per_s == pytest.approx(4e9)
    assert speeds.disk_bytes_per_s == pytest.approx(1e9)


def test_an_observation_of_nothing_is_none():
    speeds = Speeds()
    speeds.observe_prefill(0, 0, 1.0)
    speeds.observe_prefill(8, 0, 0.0)
    speeds.observe_restore("host", 0, 1.0)
    speeds.observe_restore("disk", 8, 0.0)
    assert (speeds.prefill_tokens_per_s, speeds.host_bytes_per_s, speeds.disk_bytes_per_s) == (None, None, None)


def test_large_reads_count_for_more():
    speeds = Speeds()
    speeds.observe_restore("disk", 100, 1.0)  # mostly the cost of opening a file
    speeds.observe_restore("disk", 1_000_000, 1.0)
    assert speeds.disk_bytes_per_s == pytest.approx(500_000, rel=0.05)


@given(st.floats(1e-5, 1e-2), st.floats(0, 1e-6), st.integers(0, 8192), st.integers(1, 4096))
def test_the_growth_with_depth_is_found(at_zero, slope, start, n):
    speeds = Speeds()
    for _ in range(5):
        for depth in range(0, 8192, 512):
            speeds.observe_prefill(512, depth, 512 * (at_zero + slope * (depth + 256)))
    expected_s = n * (at_zero + slope * (start + n / 2))
    assert speeds.prefill_s(start, start + n) == pytest.approx(expected_s, rel=0.02)


def test_from_one_depth_alone_deeper_tokens_are_expected_to_cost_more():
    speeds = Speeds()
    speeds.observe_prefill(512, 0, 0.5)
    assert speeds.prefill_s(0, 512) == pytest.approx(0.5)
    assert speeds.prefill_s(4096, 4608) == pytest.approx(0.97, rel=0.02)


observations = st.lists(
    st.tuples(st.integers(1, 512), st.integers(0, 100_000), st.floats(1e-6, 1e3)), min_size=1, max_size=30
)


@given(observations, st.integers(0, 100_000), st.integers(1, 10_000), st.integers(0, 10_000))
def test_expected_prefill_is_positive_and_grows(seen, start, n, more):
    speeds = Speeds()
    for observation in seen:
        speeds.observe_prefill(*observation)
    assert 0 < speeds.prefill_s(start, start + n) <= speeds.prefill_s(start, start + n + more) * (1 + 1e-9)
    assert speeds.prefill_s(start, start + n) <= speeds.prefill_s(start + more, start + more + n) * (1 + 1e-9)
    rates = sorted(n / seconds for n, _, seconds in seen)
    assert rates[0] * (1 - 1e-9) <= speeds.prefill_tokens_per_s <= rates[-1] * (1 + 1e-9)


def test_fast_tiers_are_read():
    assert worth(640, 1280, TOKEN_BYTES, measured(host=4e9, disk=1e9), 0) == 1920


def test_a_disk_slower_than_computing_is_not_read_and_what_lies_in_host_is():
    speeds = measured(prefill=1000.0, host=4e9, disk=1e7)  # 434 tokens/s
    assert worth(640, 1280, TOKEN_BYTES, speeds, 0) == 640
    assert worth(0, 1280, TOKEN_BYTES, speeds, 0) == 0


def test_a_slow_host_tier_is_not_read_even_before_a_fast_disk():
    assert worth(4096, 64, TOKEN_BYTES, measured(prefill=1000.0, host=1e6, disk=1e9), 0) == 0


def test_depth_decides():
    speeds = measured(
        prefill=1000.0, host=4e9, disk=15e6, depth_cost=1e-6
    )  # 651 tokens/s; computing: slower from 1,070
    assert worth(64, 512, TOKEN_BYTES, speeds, 0) == 64
    assert worth(3072, 512, TOKEN_BYTES, speeds, 0) == 3584


@pytest.mark.parametrize("known", [{"prefill": None, "host": 1.0, "disk": 1.0}, {"host": 1.0}, {"disk": 1.0}, {}])
def test_what_was_never_measured_is_read(known):
    assert worth(64, 128, TOKEN_BYTES, measured(**known), 0) == 192


def test_one_known_tier_is_enough_when_all_lies_there():
    assert worth(64, 0, TOKEN_BYTES, measured(host=1.0), 0) == 0
    assert worth(0, 64, TOKEN_BYTES, measured(disk=1.0), 0) == 0


def test_equal_times_are_read():
    speeds = Speeds()
    speeds.observe_prefill(64, 0, 1.0)
    speeds.observe_restore("disk", 64, speeds.prefill_s(0, 64))
    assert fastest(0, 64, 1, speeds) == 64


def test_one_in_sixteen_is_read_all_the_same():
    speeds = measured(host=4e9, disk=1e6)
    read = [worth(64, 64, TOKEN_BYTES, speeds, n_skips) for n_skips in range(3 * RETRY_HITS)]
    assert read == ([64] * (RETRY_HITS - 1) + [128]) * 3


def test_a_wrong_measurement_heals():
    """One read took a minute. The reads after it are fast, when there are any."""
    speeds = measured(prefill=1000.0)
    speeds.observe_restore("disk", 64 * TOKEN_BYTES, 60.0)
    n_skips = n_hits = 0
    while fastest(0, 6400, TOKEN_BYTES, speeds) < 6400:
        n_hits += 1
        assert n_hits <= 2 * RETRY_HITS
        if worth(0, 6400, TOKEN_BYTES, speeds, n_skips):
            for _ in range(100):
                speeds.observe_restore("disk", 64 * TOKEN_BYTES, 64 * TOKEN_BYTES / 1e9)
        n_skips += 1
    assert n_hits == RETRY_HITS


tokens = st.integers(0, 20_000)
rates = st.floats(1e4, 1e11)


def cost(speeds, n_host, n_disk, n_read):
    n = n_host + n_disk
    read_s = speeds.read_s("host", min(n_read, n_host) * TOKEN_BYTES)
    read_s += speeds.read_s("disk", max(n_read - n_host, 0) * TOKEN_BYTES)
    return read_s + speeds.prefill_s(n_read, n)


@given(tokens, tokens, st.floats(10, 1e5), rates, rates, st.floats(0, 1e-6))
def test_nothing_is_faster_than_what_is_chosen_and_ties_are_read(n_host, n_disk, prefill, host, disk, depth_cost):
    assume(n_host + n_disk)
    speeds = measured(prefill=prefill, host=host, disk=disk, depth_cost=depth_cost)
    n = fastest(n_host, n_disk, TOKEN_BYTES, speeds)
    choices = {0, n_host, n_host + n_disk}
    assert n in choices
    chosen = cost(speeds, n_host, n_disk, n)
    assert all(chosen <= cost(speeds, n_host, n_disk, other) * (1 + 1e-9) for other in choices)
    assert all(chosen < cost(speeds, n_host, n_disk, other) * (1 + 1e-9) for other in choices if other > n)


@given(tokens, tokens, st.floats(10, 1e5), rates, rates, st.floats(1, 100), st.integers(0, 50))
def test_a_faster_tier_or_slower_prefill_never_reads_less(n_host, n_disk, prefill, host, disk, factor, n_skips):
    before = worth(n_host, n_disk, TOKEN_BYTES, measured(prefill=prefill, host=host, disk=disk), n_skips)
    for better in (
        measured(prefill=prefill, host=host, disk=disk * factor),
        measured(prefill=prefill / factor, host=host, disk=disk),
        measured(prefill=prefill, host=host * factor, disk=disk * factor),
    ):
        assert worth(n_host, n_disk, TOKEN_BYTES, better, n_skips) >= before
