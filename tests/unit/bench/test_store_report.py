from msgspec.structs import replace

from keepwarm.bench.store_report import (
    ColdSample,
    IndexSample,
    NoReusePair,
    ObjectPair,
    Read,
    RestartSample,
    RestoreSample,
    Samples,
    ScanSample,
    flat_medians,
    ratios,
    tier_read,
)
from keepwarm.engine import StoreStatus

STATUS = StoreStatus(pools=(), policy="cost", n_leases=1, n_hits_host=3, n_hits_disk=5)


def restart(ttft_ms: float, read: Read = "disk", *, is_first: bool = True) -> RestartSample:
    return RestartSample(is_first, read, 5024, 5000, ttft_ms, {"engine_restore_ms": ttft_ms - 50}, 4000.0, None)


def samples() -> Samples:
    return Samples(
        cold=[ColdSample(5000, 0, ms, {"http_ms": 1.0}) for ms in (9_000.0, 10_000.0, 14_000.0)],
        objects=[ObjectPair(5000, 11_000, 10_000), ObjectPair(5000, 21_000, 20_000), ObjectPair(5000, 15_000, 10_000)],
        restarts=[
            restart(400.0),
            restart(600.0),
            restart(3.0, "host"),
            restart(9_000.0, "nothing"),
            restart(200.0, is_first=False),
        ],
        no_reuse=[NoReusePair(5, 4000, 10_000, 9_900), NoReusePair(5, 4000, 10_000, 9_700)],
        restores=[
            RestoreSample("sequential", 200_000_000, 100.0),
            RestoreSample("sequential_direct", 100_000_000, 100.0),
            RestoreSample("read", 120_000_000, 100.0),
            RestoreSample("read_untouched", 180_000_000, 100.0),
            RestoreSample("restore", 100_000_000, 50.0),
            RestoreSample("restore", 100_000_000, 100.0),
        ],
        index=[IndexSample(20_000, 512.0, 100_000, [5.0, 7.0, 30.0], [1.0, 2.0, 3.0])],
        scans=[ScanSample(10_000, ms) for ms in (1500.0, 2100.0, 1900.0)],
    )


def test_medians_by_name() -> None:
    at = flat_medians(samples())
    assert (at["cold.ttft_ms"], at["first_hit.ttft_ms"], at["later_hit.ttft_ms"]) == (10_000.0, 500.0, 200.0)
    assert (at["first_hit.engine_restore_ms"], at["restart.start_ms"]) == (450.0, 4000.0)
    assert (at["sequential.gb_per_s"], at["read_untouched.gb_per_s"], at["restore.gb_per_s"]) == (2.0, 1.8, 1.5)
    assert (at["no_reuse.on_tokens_per_s"], at["index.match_ms"], at["index.use_ms"]) == (400.0, 7.0, 2.0)


def test_what_was_not_measured_is_absent() -> None:
    assert flat_medians(Samples()) == {}
    assert "restart.scan_ms" not in flat_medians(samples())
    assert {one.reached for one in ratios(Samples())} == {None}


def test_ratios() -> None:
    found = {one.name: (one.value, one.reached) for one in ratios(samples())}
    assert found == {
        "disk hit after a restart, the first question: TTFT of cold": (5.0, True),
        "disk hit after a restart, after another question: TTFT of cold": (2.0, True),
        "disk restore, put together and loaded, of sequential reading": (75.0, True),
        "disk restore, read and verified, of sequential reading": (60.0, False),
        "making an object durable, added to its creation": (10.0, True),  # the pairs' own: 10, 5 and 50
        "throughput without reuse, of caching off": (98.0, True),
        "index memory a block": (512.0, False),
        "look-up of a long prompt": (7.0, True),
        "start-up scan of many blocks": (1900.0, True),
    }


def test_restoring_is_compared_with_the_faster_way_to_read_in_order() -> None:
    faster = [*samples().restores, *[RestoreSample("sequential_direct", 900_000_000, 100.0)] * 3]
    found = ratios(Samples(restores=faster))
    assert [one.value for one in found if "sequential" in one.name] == [16.6667, 13.3333]


def test_a_question_not_answered_from_the_disk_is_no_disk_hit() -> None:
    found = ratios(Samples(cold=samples().cold, restarts=[restart(1.0, "host"), restart(9_000.0, "nothing")]))
    assert [one.value for one in found if "disk hit" in one.name] == [None, None]


def test_durability_may_cost_less_than_nothing() -> None:
    found = ratios(Samples(objects=[ObjectPair(5000, 9_000, 10_000)]))
    assert [(one.value, one.reached) for one in found if "durable" in one.name] == [(-10.0, True)]


def test_where_a_turn_read_from() -> None:
    assert tier_read(STATUS, replace(STATUS, n_hits_disk=6)) == "disk"
    assert tier_read(STATUS, replace(STATUS, n_hits_host=4)) == "host"
    assert tier_read(STATUS, replace(STATUS, n_misses=1)) == "nothing"
    assert tier_read(None, STATUS) == tier_read(STATUS, None) == "nothing"
