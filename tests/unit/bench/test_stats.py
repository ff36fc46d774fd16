import pytest

from keepwarm.bench.stats import medians, percentile, summary


@pytest.mark.parametrize(
    "share, expected",
    [(0.01, 1.0), (0.5, 50.0), (0.99, 99.0), (0.991, 100.0), (1.0, 100.0)],
)
def test_a_percentile_is_the_nearest_rank(share: float, expected: float) -> None:
    assert percentile([float(n) for n in range(100, 0, -1)], share) == expected


def test_the_percentile_of_one_sample_is_that_sample() -> None:
    assert percentile([7.0], 0.01) == percentile([7.0], 1.0) == 7.0


def test_a_summary() -> None:
    found = summary([4.0, 1.0, 3.0, 2.0])
    assert (found.n, found.median, found.p99, found.low, found.high) == (4, 2.5, 4.0, 1.0, 4.0)


def test_medians_are_taken_over_the_rows_that_have_the_key() -> None:
    rows = [{"render_ms": 1.0, "objects_ms": 5.0}, {"render_ms": 3.0}, {"render_ms": 2.0, "lease_ms": 4.0}]
    assert list(medians(rows).items()) == [("render_ms", 2.0), ("objects_ms", 5.0), ("lease_ms", 4.0)]
