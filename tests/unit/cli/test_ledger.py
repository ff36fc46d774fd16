import json
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from keepwarm.cli.root import build
from keepwarm.storage import database_path
from tests import used
from tests.world import FakeClock

Run = Callable[..., Result]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """With the house's sheet in the configuration."""
    used.make(tmp_path, FakeClock()).close()
    (tmp_path / "sheets").mkdir()
    (tmp_path / "sheets" / "house.toml").write_text(used.HOUSE, encoding="utf-8")
    (tmp_path / "k.toml").write_text(f'[billing]\nsheets_dir = "{tmp_path / "sheets"}"\n', encoding="utf-8")

    def invoke(*args: str) -> Result:
        return CliRunner().invoke(
            build(), args, env={"COLUMNS": "250", "KEEPWARM_DATA_DIR": str(tmp_path)}, catch_exceptions=False
        )

    return invoke


def money(run: Run, org: str = "acme") -> dict[str, dict[str, str]]:
    return {one.pop("currency"): one for one in json.loads(run("ledger", "balance", org, "--json").stdout)}


def test_a_ledger_that_adds_up_is_status_0_and_a_changed_cell_1(run: Run, tmp_path: Path) -> None:
    verify = ("ledger", "verify", "--config", str(tmp_path / "k.toml"))
    good = run(*verify)
    assert (good.exit_code, good.stderr) == (0, "")
    assert good.stdout.endswith("rows: everything adds up\n")
    with sqlite3.connect(database_path(tmp_path)) as connection:
        connection.execute(
            "UPDATE accounts SET cash_nano = cash_nano + 1 WHERE organisation = 'umbra' AND currency = 'CNY'"
        )
    connection.close()
    bad = run(*verify)
    assert bad.exit_code == 1
    assert "account umbra CNY: (-14867999, 0, 700) is kept, the rows come to (-14868000, 0, 700)" in bad.stdout
    assert bad.stderr.startswith("keepwarm: faults: 1; rows counted: ")


def test_a_sheet_that_is_not_there_is_named(run: Run) -> None:
    result = run("ledger", "verify")
    assert result.exit_code == 1
    assert "t3/settle: there are no prices house@1/m; put the sheet back" in result.stdout


def test_credit_comes_in_and_is_shown(run: Run) -> None:
    before = money(run)
    assert run("ledger", "grant", "acme", "1.5", "EUR", "--note", "hi").stdout == "granted 1.5 EUR to acme\n"
    voucher = run("ledger", "voucher", "acme", "0.25", "EUR", "--days", "9")
    assert voucher.stdout.startswith("voucher-")
    after = money(run)
    assert after.pop("EUR") == {"available": "1.75", "cash": "1.5", "voucher": "0.25", "held": "0"}
    assert after == before
    assert run("ledger", "adjust", "acme", "0.5", "EUR", "--note", "found").stdout == "adjusted acme by 0.5 EUR\n"
    assert run("ledger", "adjust", "acme", "--note", "oops", "--", "-3", "EUR").stdout == "adjusted acme by -3 EUR\n"
    assert money(run)["EUR"]["cash"] == "-1"
    told = json.loads(run("ledger", "rows", "--limit", "4", "--json").stdout)
    assert [(row["kind"], row["note"]) for row in told] == [
        ("grant", "hi"),
        ("grant", None),
        ("adjust", "found"),
        ("adjust", "oops"),
    ]


@pytest.mark.parametrize(
    "args, words",
    [
        (("grant", "nobody", "1", "EUR"), "nobody"),
        (("grant", "acme", "0", "EUR"), "an amount must be above 0"),
        (("grant", "acme", "1.2.3", "EUR"), "is not an amount"),
        (("grant", "acme", "1", "euro"), "three capital letters"),
    ],
)
def test_credit_that_cannot_be_is_refused_and_changes_nothing(run: Run, args: tuple[str, ...], words: str) -> None:
    before = money(run)
    result = run("ledger", *args)
    assert result.exit_code == 1
    assert words in result.stderr
    assert money(run) == before


def test_credit_beyond_what_can_be_counted_is_one_line_with_the_numbers(run: Run) -> None:
    for command in ("grant", "voucher"):
        assert run("ledger", command, "acme", "999999999", "EUR").exit_code == 0
    before = money(run)
    for command in (("grant",), ("voucher",), ("adjust", "--note", "more")):
        result = run("ledger", *command, "acme", "2", "EUR")
        told = "999999999 EUR and 2 EUR are together beyond what can be counted, 1000000000"
        assert (result.exit_code, result.stdout, result.stderr) == (1, "", f"keepwarm: {told}\n")
    assert money(run) == before


def test_rows_of_one_turn(run: Run) -> None:
    told = json.loads(run("ledger", "rows", "--turn", "t1", "--json").stdout)
    assert [row["id"] for row in told] == ["t1/hold", "t1/settle"]
    assert "t1/settle" in run("ledger", "rows", "--org", "acme").stdout


def test_budgets_are_set_listed_and_removed(run: Run) -> None:
    assert (
        run("budgets", "set", "acme", "USD", "month", "--hard", "5", "--soft", "4").stdout == "set org:acme USD month\n"
    )
    told = json.loads(run("budgets", "list", "acme", "--json").stdout)
    [mine] = [one for one in told if one["currency"] == "USD"]
    assert mine == {
        "scope": "org:acme", "currency": "USD", "period": "month", "soft": "4", "hard": "5", "spent": "0", "held": "0",
    }  # fmt: skip
    assert "org:acme" in run("budgets", "list", "acme").stdout
    assert run("budgets", "remove", "acme", "USD", "month").exit_code == 0
    again = run("budgets", "remove", "acme", "USD", "month")
    assert (again.exit_code, again.stdout) == (1, "")
    assert run("budgets", "set", "acme", "USD", "month").exit_code == 1
    assert run("budgets", "set", "acme", "USD", "day", "--hard", "1", "--project", "none").exit_code == 1
