import pytest

from keepwarm.bench.gateway import sized_body
from keepwarm.bench.gateway_report import Latency, Samples, Throughput, flat_medians, ratios

MB = 1_000_000


def samples(*, rss_end: int) -> Samples:
    latency = Latency([5.0, 4.0, 9.0], [1.0, 2.0, 3.0])
    throughput = Throughput(16, 1000, 2.0, 100, [100 * MB, 110 * MB, rss_end])
    return Samples({"whole": latency, "stream": latency}, {"whole": throughput, "stream": throughput})


def test_overhead_is_what_the_engine_did_not_take() -> None:
    at = flat_medians(samples(rss_end=111 * MB))
    assert (at["whole.latency_p50_ms"], at["whole.overhead_p50_ms"], at["whole.overhead_p99_ms"]) == (5.0, 4.0, 6.0)
    assert (at["stream.requests_per_s"], at["whole.rss_growth_bytes"]) == (500.0, MB)


@pytest.mark.parametrize("rss_end, flat", [(111 * MB, True), (120 * MB, False)])
def test_memory_is_compared_with_early_on_not_with_the_start(rss_end: int, flat: bool) -> None:
    found = {one.name: one.reached for one in ratios(samples(rss_end=rss_end))}
    assert found["gateway's memory at the end, of early on"] is flat
    assert found["gateway overhead p50, whole"] is False
    assert found["requests on one core, stream"] is True


@pytest.mark.parametrize("stream", [True, False])
def test_bodies_have_one_size_and_differ_in_the_question_only(stream: bool) -> None:
    one, other = sized_body(1, 1024, stream=stream), sized_body(10_000, 1024, stream=stream)
    assert len(one) == len(other) == 1024
    assert one.replace(b"000000001", b"000010000") == other
