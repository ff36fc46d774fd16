import csv
import io
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from keepwarm.cli.root import build
from tests import used
from tests.world import FakeClock

Run = Callable[..., Result]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    used.make(tmp_path, FakeClock()).close()

    def invoke(*args: str, columns: int = 250) -> Result:
        return CliRunner().invoke(
            build(), [*args, "--data-dir", str(tmp_path)], env={"COLUMNS": f"{columns}"}, catch_exceptions=False
        )

    return invoke


def test_the_table_has_lines_totals_and_says_what_has_no_prices(run: Run) -> None:
    result = run("usage", "--by", "project,sheet")
    assert result.exit_code == 0
    assert "kimi@2024-07-01" in result.stdout
    assert "total" in result.stdout
    assert "use of models that had no prices" in result.stdout


@pytest.mark.parametrize(
    "by", ["", "model", "day,organisation,model", "day,organisation,project,key,model,dialect,sheet"]
)
@pytest.mark.parametrize("columns", [80, 40])
def test_a_narrow_terminal_breaks_no_number(run: Run, by: str, columns: int) -> None:
    told = run("usage", "--by", by, columns=columns).stdout
    if columns == 80 and by.count(",") <= 2:
        assert max(map(len, told.splitlines())) <= 80
    items = json.loads(run("usage", "--by", by, "--format", "json").stdout)["data"]
    for item in items:
        numbers = [f"{item[name]:,}" for name in ("n_calls", "n_fresh", "n_read", "n_write", "n_output")]
        assert re.search(r"\s+".join(numbers) + r"\s", told)
        if item["currency"] is not None:
            amounts = (item[name] for name in ("cost", "charged", "uncached", "saved"))
            assert re.search(r"\s+".join(map(re.escape, amounts)) + r"\s", told)


def test_json_and_csv_have_the_same_lines(run: Run) -> None:
    told = json.loads(run("usage", "--by", "day,key", "--format", "json").stdout)
    read = list(csv.DictReader(io.StringIO(run("usage", "--by", "day,key", "--format", "csv").stdout)))
    assert [row["charged"] for row in read] == [item["charged"] or "" for item in told["data"]]
    assert {row["day"] for row in read} == {"2023-11-14", "2023-11-15"}
    assert told["has_unpriced"] is True


def test_filters_and_days_bound_the_lines(run: Run) -> None:
    told = json.loads(run("usage", "--by", "organisation", "--org", "umbra", "--format", "json").stdout)
    assert [item["organisation"] for item in told["data"]] == ["umbra"]
    assert [item["n_fresh"] for item in told["data"]] == [1234]
    none = json.loads(run("usage", "--from", "2023-11-16", "--format", "json").stdout)
    assert none == {"data": [], "totals": [], "has_unpriced": False}


def test_an_unknown_part_is_refused(run: Run) -> None:
    result = run("usage", "--by", "day,colour")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "'colour' is none of day, organisation, project, key, model, dialect, sheet" in result.stderr


def test_an_invoice_is_a_file(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "acme.html"
    assert run("invoice", "acme", "2023-11", "--out", str(out)).stdout == f"wrote {out}\n"
    assert "<h1>acme</h1>" in out.read_text(encoding="utf-8")
    wrong = run("invoice", "acme", "2023-13", "--out", str(out))
    assert (wrong.exit_code, wrong.stderr) == (1, "keepwarm: month: '2023-13' is not a month such as '2026-11'\n")
