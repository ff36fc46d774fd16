import pytest

from keepwarm.bench.gateway import sized_body
from keepwarm.bench.gateway_report import Billed, Latency, Samples, Throughput, Turns, flat_medians, ratios

MB = 1_000_000


def turns(*blocks: list[float]) -> Turns:
    found = Turns()
    for block in blocks:
        found.add([(ms, {"auth_ms": ms / 10, "reserve_ms": ms / 5, "render_ms": 0.5}) for ms in block])
    return found


def billed(*, added_ms: float) -> Billed:
    return Billed(turns([1.0, 2.0], [3.0, 7.0, 2.5]), turns([2.5 + added_ms, 9.0], [3.0]))


def samples(*, rss_end: int, added_ms: float = 1.0) -> Samples:
    latency = Latency([5.0, 4.0, 9.0], [1.0, 2.0, 3.0])
    throughput = Throughput(16, 1000, 2.0, 100, [100 * MB, 110 * MB, rss_end])
    return Samples(
        {"whole": latency, "stream": latency}, {"whole": throughput, "stream": throughput}, billed(added_ms=added_ms)
    )


def test_overhead_is_what_the_engine_did_not_take() -> None:
    at = flat_medians(samples(rss_end=111 * MB))
    assert (at["whole.latency_p50_ms"], at["whole.overhead_p50_ms"], at["whole.overhead_p99_ms"]) == (5.0, 4.0, 6.0)
    assert (at["stream.requests_per_s"], at["whole.rss_growth_bytes"]) == (500.0, MB)


@pytest.mark.parametrize("rss_end, flat", [(111 * MB, True), (120 * MB, False)])
def test_memory_is_compared_with_halfway_not_with_the_start(rss_end: int, flat: bool) -> None:
    found = {one.name: one.reached for one in ratios(samples(rss_end=rss_end))}
    assert found["gateway's memory at the end, of halfway"] is flat
    assert found["gateway overhead p50, whole"] is False
    assert found["requests on one core, stream"] is True


def test_what_billing_adds_is_the_difference_of_the_medians_over_all_blocks() -> None:
    at = flat_medians(samples(rss_end=111 * MB))
    assert (at["billing.off.latency_p50_ms"], at["billing.off.latency_p90_ms"]) == (2.5, 7.0)
    assert (at["billing.on.latency_p50_ms"], at["billing.on.latency_p90_ms"]) == (3.5, 9.0)
    assert (at["billing.added_p50_ms"], at["billing.added_p90_ms"]) == (1.0, 2.0)
    assert (at["billing.on.auth_p50_ms"], at["billing.on.reserve_p50_ms"]) == (0.35, 0.7)


@pytest.mark.parametrize("added_ms, reached", [(2.0, True), (2.1, False)])
def test_what_billing_adds_is_held_against_its_target(added_ms: float, reached: bool) -> None:
    found = {one.name: one for one in ratios(samples(rss_end=111 * MB, added_ms=added_ms))}
    assert found["keys, limits and ledger, added to p50"].reached is reached


@pytest.mark.parametrize("stream", [True, False])
def test_bodies_have_one_size_and_differ_in_the_question_only(stream: bool) -> None:
    one, other = sized_body(1, 1024, stream=stream), sized_body(10_000, 1024, stream=stream)
    assert len(one) == len(other) == 1024
    assert one.replace(b"000000001", b"000010000") == other
