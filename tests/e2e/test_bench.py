"""The benches run to their end against the scripted engine and write what they measured. No time is judged."""

import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import msgspec
import pytest

from keepwarm.bench.agent_report import Samples as AgentSamples
from keepwarm.bench.gateway_report import Samples as GatewaySamples
from keepwarm.bench.report import Report
from keepwarm.bench.store_report import Samples as StoreSamples
from keepwarm.bench.ttft_report import Samples as TtftSamples

pytestmark = pytest.mark.e2e


def bench(*arguments: str | Path) -> str:
    """In a process of its own, as it pins itself and blocks where it likes."""
    done = subprocess.run(
        [sys.executable, "-m", "keepwarm", "bench", *arguments],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


def test_bench_gateway(tmp_path: Path) -> None:
    out = tmp_path / "gateway.json"
    assert "gateway overhead p50" in bench("gateway", "--requests", "40", "--out", out)
    report = msgspec.json.decode(out.read_bytes(), type=Report[GatewaySamples])
    assert report.model.weights == "scripted"
    for form in ("whole", "stream"):
        latency, throughput = report.samples.latency[form], report.samples.throughput[form]
        assert len(latency.total_ms) == len(latency.engine_ms) == 4
        assert min(latency.overhead_ms) > 0
        assert len(throughput.rss_bytes) == 11
    assert report.samples.throughput["whole"].n_requests == 40
    billing = report.samples.billing  # the command has counted the rows
    assert len(billing.off.all_ms) == len(billing.on.all_ms) == 20
    assert min(billing.on.all_ms) > 0
    assert all(ratio.reached is not None for ratio in report.ratios)


def test_bench_ttft_without_a_baseline(tmp_path: Path) -> None:
    config, out = tmp_path / "scripted.toml", tmp_path / "ttft.json"
    config.write_text('[model]\nengine = "scripted"\n', encoding="utf-8")
    shown = bench(
        "ttft", "--quick", "--tokens", "1500", "--config", config, "--data-dir", tmp_path / "data", "--out", out
    )
    assert "no baseline" in shown
    report = msgspec.json.decode(out.read_bytes(), type=Report[TtftSamples])
    samples = report.samples
    assert samples.cold[0].n_cached == 0
    assert samples.cold[0].raw_ms is None
    assert {sample.way for sample in samples.warm} == {"object", "automatic", "displaced"}
    assert all(sample.n_evaluated <= sample.n_new < 64 for sample in samples.warm)
    assert samples.new_context[0].n_evaluated <= samples.new_context[0].n_context + samples.new_context[0].n_questions
    assert {ratio.reached for ratio in report.ratios if "raw" in ratio.name} == {None}


@pytest.mark.slow
def test_bench_store(tmp_path: Path) -> None:
    config, data, out = tmp_path / "scripted.toml", tmp_path / "data", tmp_path / "store.json"
    config.write_text('[model]\nengine = "scripted"\n', encoding="utf-8")
    assert "index memory a block" in bench(
        "store", "--quick", "--tokens", "1500", "--config", config, "--data-dir", data, "--out", out
    )
    report = msgspec.json.decode(out.read_bytes(), type=Report[StoreSamples])
    samples = report.samples
    assert samples.cold[0].n_cached == 0
    assert [sample.read for sample in samples.restarts] == ["disk", "disk"]
    assert [sample.is_first for sample in samples.restarts] == [True, False]
    assert all(sample.n_cached >= samples.objects[0].n_tokens - 64 for sample in samples.restarts)
    assert {sample.way for sample in samples.restores} >= {"sequential", "read", "read_untouched", "restore"}
    assert all(pair.n_prompts == 3 for pair in samples.no_reuse)
    assert all(ratio.reached is not None for ratio in report.ratios)
    assert [path.name for path in data.iterdir()] == ["models"]  # what was made to be measured is gone


@pytest.mark.slow
def test_bench_agent_reads_all_but_what_is_new(tmp_path: Path) -> None:
    """An agent's session of six turns: from the third on nearly everything is read, and the answers stay what they are."""
    config, out = tmp_path / "scripted.toml", tmp_path / "agent.json"
    config.write_text('[model]\nengine = "scripted"\nn_ctx = 16384\n', encoding="utf-8")
    bench("agent", "--turns", "6", "--tokens", "8000", "--config", config, "--out", out)
    samples = msgspec.json.decode(out.read_bytes(), type=Report[AgentSamples]).samples
    on, off = samples.of("on"), samples.of("off")
    assert [one.number for one in on] == [one.number for one in off] == [1, 2, 3, 4, 5, 6]
    assert [one.answer for one in on] == [one.answer for one in off]
    assert len({one.answer for one in on}) > 1
    assert all(one.n_read + one.n_written + one.n_fresh == one.n_prompt for one in samples.turns)
    assert all(one.n_read == one.n_written == 0 for one in off)
    assert {one.outcome for one in on[1:]} == {"hit"}
    assert all(one.read_percent >= 95 for one in samples.counted)
    for before, after in pairwise(on):
        assert after.n_read >= before.n_read + before.n_written  # all that the turn before had read or written
