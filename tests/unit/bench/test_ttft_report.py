from keepwarm.bench.raw_frames import Took
from keepwarm.bench.ttft_report import (
    ColdSample,
    CrowdSample,
    DecodeSample,
    NewContextSample,
    Samples,
    WarmSample,
    Way,
    flat_medians,
    ratios,
)


def warm(way: Way, ttft_ms: float, raw_ms: float | None = None, n_evaluated: int = 24) -> WarmSample:
    raw = None if raw_ms is None else Took(raw_ms, 20.0, raw_ms - 20.0, 1000)
    faster = None if raw_ms is None else Took(raw_ms - 1.0)
    return WarmSample(way, 5024, 5000, n_evaluated, 24, ttft_ms, {"http_ms": 2.0}, 5.0, raw, faster)


def samples(*, with_raw: bool) -> Samples:
    raw = with_raw or None
    return Samples(
        cold=[ColdSample(5000, 0, ms, {"http_ms": 1.0}, raw and ms - 100) for ms in (10_100.0, 10_300.0)],
        warm=[
            warm("object", 100.0, raw and 90.0),
            warm("object", 120.0, raw and 80.0),
            warm("automatic", 300.0, raw and 290.0, n_evaluated=32),
            warm("displaced", 150.0, raw and 140.0),
        ],
        decode=[DecodeSample(64, 48.0, raw and 50.0)],
        crowd=[CrowdSample([800.0, 900.0, 1000.0], [32] * 3, [30] * 3, 80.0, raw and 100.0)],
        new_context=[NewContextSample(8, 2500, 200, 2700, [5000.0])],
    )


def test_medians_by_name() -> None:
    at = flat_medians(samples(with_raw=True))
    assert (at["cold.ttft_ms"], at["cold.raw_ms"], at["object.ttft_ms"]) == (10_200.0, 10_100.0, 110.0)
    assert (at["object.http_ms"], at["crowd.ttft_p50_ms"], at["crowd.ttft_max_ms"]) == (2.0, 900.0, 1000.0)


def test_what_was_not_measured_is_absent() -> None:
    assert not [name for name in flat_medians(samples(with_raw=False)) if ".raw" in name]
    assert flat_medians(Samples()) == {}


def test_ratios_with_a_baseline() -> None:
    found = {one.name: (one.value, one.reached) for one in ratios(samples(with_raw=True), granularity=8)}
    assert found["warm TTFT of cold, object"] == (1.0784, True)
    assert found["warm TTFT of cold, automatic"] == (2.9412, False)
    assert found["warm TTFT beyond raw, object"] == (26.0, False)  # each sample with its own raw: 11 and 41
    assert found["warm TTFT beyond raw, displaced"] == (11.0, True)
    assert found["tokens evaluated beyond the new ones, object"] == (0.0, True)
    assert found["tokens evaluated beyond the new ones, automatic"] == (8.0, True)
    assert found["cold TTFT of raw"] == (100.9901, True)
    assert found["decode tokens/s of raw, 1 user"] == (96.0, True)
    assert found["decode tokens/s of raw, users at once"] == (80.0, False)
    assert found["TTFT p50 of users at once, of 1 user"] == (8.1818, True)
    assert found["tokens evaluated, users at once over a new context, of computing it once"] == (1.0, True)
    assert found["restore"] == (5.0, True)


def test_without_a_baseline_those_beside_raw_are_not_judged() -> None:
    found = ratios(samples(with_raw=False), granularity=None)
    unjudged = {one.name for one in found if one.reached is None}
    assert unjudged == {one.name for one in found if "raw" in one.name}
    assert len(unjudged) == 6
