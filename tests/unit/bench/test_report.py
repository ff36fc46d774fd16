from pathlib import Path

import msgspec
import pytest
from msgspec import Struct
from rich.console import Console

from keepwarm.bench import BenchError
from keepwarm.bench.machine import Machine, Versions
from keepwarm.bench.report import (
    Comparison,
    Report,
    encoded,
    percent,
    publish,
    quotient,
    ratio,
    ratio_table,
    shown,
    timestamp,
)
from keepwarm.engine import ModelInfo

MODEL = ModelInfo("d", 8192, 8, 259, "scripted", "plain", "strict", 1, "f16", 64)


class Few(Struct):
    ms: list[float]


def report() -> Report[Few]:
    return Report(
        kind="ttft",
        created_at=timestamp(0),
        machine=Machine("a processor", 2, 1 << 30, "Linux 6"),
        versions=Versions("0.1.0", "0.3", "3.11"),
        model=MODEL,
        settings={"tokens": 5000, "quick": False},
        ratios=[ratio("warm of cold", 1.5, "%", "≤", 2.0), ratio("beside raw", None, "ms", "≤", 20.0)],
        medians={"cold.ttft_ms": 12345.6},
        samples=Few([1.25, 2.5]),
    )


@pytest.mark.parametrize(
    "value, comparison, reached",
    [(2.0, "≤", True), (2.01, "≤", False), (1.0, "≤", True), (2.0, "≥", True), (1.99, "≥", False), (None, "≥", None)],
)
def test_a_ratio_is_judged(value: float | None, comparison: Comparison, reached: bool | None) -> None:
    assert ratio("name", value, "%", comparison, 2.0).reached is reached


def test_without_a_baseline_nothing_is_divided() -> None:
    assert quotient(1.0, None) is quotient(None, 1.0) is quotient(1.0, 0.0) is percent(1.0, None) is None
    assert (quotient(3.0, 2.0), percent(3.0, 2.0)) == (1.5, 150.0)


def test_the_json_has_everything_and_reads_back() -> None:
    assert msgspec.json.decode(encoded(report()), type=Report[Few]) == report()


def test_the_table_says_what_was_reached_and_where_there_was_no_baseline() -> None:
    console = Console(record=True, width=120)
    console.print(ratio_table("ttft", [*report().ratios, ratio("restore", 1.0, "GB/s", "≥", 4.0)]))
    rows = [" ".join(line.split()) for line in console.export_text().splitlines()]
    assert "│ warm of cold │ 1.50 % │ ≤ 2 % │ yes │" in rows
    assert "│ beside raw │ no baseline │ ≤ 20 ms │ │" in rows
    assert "│ restore │ 1 GB/s │ ≥ 4 GB/s │ no │" in rows


def test_a_report_is_published_to_the_named_file(tmp_path: Path) -> None:
    console, out = Console(record=True, width=120), tmp_path / "results" / "one.json"
    publish(report(), console, out)
    assert out.read_bytes() == encoded(report())
    assert "12,346" in console.export_text()


def test_without_a_name_the_file_has_date_and_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    publish(report(), Console(record=True), None)
    assert [path.name for path in tmp_path.iterdir()] == ["1970-01-01-ttft.json"]


def test_a_file_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BenchError, match=r"cannot write .* choose another --out"):
        publish(report(), Console(record=True), tmp_path / "file" / "one.json")


@pytest.mark.parametrize(
    "value, expected",
    [(5.0, "5"), (0.0629, "0.0629"), (12.345, "12.35"), (123.45, "123.5"), (12345.6, "12,346"), (-695.4, "-695.4")],
)
def test_numbers_are_shown_as_precisely_as_they_are_read(value: float, expected: str) -> None:
    assert shown(value) == expected
