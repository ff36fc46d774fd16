import json
from pathlib import Path

from click.testing import Result
from typer.testing import CliRunner

from keepwarm.cli.root import build

HOUSE = (
    'name = "house"\nversion = "1"\ncurrency = "EUR"\neffective_from = 2026-01-01\nsource = "ours"\n'
    '[models.m]\nterms = "gemini@2026/2.5-pro"\noutput = "8"\n'
    'tiers = [{ prompt_tokens_max = 1000, input = "2" }, { input = "4" }]\n'
)


def prices(*args: str) -> Result:
    return CliRunner().invoke(build(), ["prices", *args], env={"COLUMNS": "200"})


def configured(folder: Path, sheet: str = HOUSE) -> tuple[str, str]:
    """--config of a server with one sheet of its own."""
    (folder / "sheets").mkdir()
    (folder / "sheets" / "house.toml").write_text(sheet, encoding="utf-8")
    (folder / "k.toml").write_text(f'[billing]\nsheets_dir = "{folder / "sheets"}"\n', encoding="utf-8")
    return "--config", str(folder / "k.toml")


def dollars(text: str) -> str:
    return text.replace('"EUR"', '"USD"')


def test_the_list_has_every_version_and_says_which_counts_today() -> None:
    result = prices("list")
    assert result.exit_code == 0
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in result.stdout.splitlines() if "│" in line]
    days = {row[0]: row[2:4] for row in rows}
    assert days["kimi@2024-07-01"] == ["2024-07-01", ""]
    assert days["kimi@2024-08-07"] == ["2024-08-07", "yes"]


def test_own_sheets_are_listed_too(tmp_path: Path) -> None:
    result = prices("list", "--json", *configured(tmp_path, dollars(HOUSE)))
    [house] = [sheet for sheet in json.loads(result.stdout) if sheet["name"] == "house"]
    assert house == {
        "id": "house@1",
        "name": "house",
        "version": "1",
        "currency": "USD",
        "effective_from": "2026-01-01",
        "source": "ours",
        "models": ["m"],
    }


def test_a_sheet_is_shown_by_name_or_by_version() -> None:
    assert "kimi@2024-08-07, in CNY" in prices("show", "kimi").stdout
    launch = prices("show", "kimi@2024-07-01").stdout
    assert "creation 24, storage 10 per begun minute, read 0, 0.02 CNY per call that reads one" in launch


def test_tiers_and_terms_are_shown(tmp_path: Path) -> None:
    shown = prices("show", "house", *configured(tmp_path, dollars(HOUSE))).stdout
    assert "≤ 1,000" in shown
    assert "longer" in shown
    assert "cache objects: creation as input, storage 4.5 per hour" in shown
    assert "terms opus-5.5: read 0.05x, write 1.25x, write_long 2x" in prices("show", "anthropic").stdout


def test_a_sheet_as_json_has_its_prices_in_nano() -> None:
    found = json.loads(prices("show", "kimi@2024-07-01", "--json").stdout)
    eight = found["prices"]["moonshot-v1-8k"]
    assert (eight["tiers"][0]["input"], eight["objects"]["storage"]["unit_s"]) == (12_000_000_000, 60)
    assert eight["batch_multiple"] == "1"


def test_an_unknown_sheet_is_one_line() -> None:
    for name in ("nobody", "kimi@2024"):
        result = prices("show", name)
        assert (result.exit_code, result.stdout) == (1, "")
        assert result.stderr == f"keepwarm: there is no price sheet {name}; keepwarm prices list shows them\n"


def test_a_good_sheet_is_told_to_be_good(tmp_path: Path) -> None:
    file = tmp_path / "house.toml"
    file.write_text(dollars(HOUSE), encoding="utf-8")
    result = prices("check", str(file))
    assert (result.exit_code, result.stdout) == (0, "house@1: good; 1 models and 0 terms in USD, from 2026-01-01 on\n")


def test_a_sheet_that_is_in_the_configured_folder_is_no_double_of_itself(tmp_path: Path) -> None:
    config = configured(tmp_path, dollars(HOUSE))
    assert prices("check", str(tmp_path / "sheets" / "house.toml"), *config).exit_code == 0
    elsewhere = tmp_path / "house.toml"
    elsewhere.write_text(dollars(HOUSE), encoding="utf-8")
    result = prices("check", str(elsewhere), *config)
    assert result.exit_code == 1
    assert "house@1 from 2026-01-01 is also in house.toml" in result.stderr


def test_a_mistake_is_one_line_and_status_1(tmp_path: Path) -> None:
    file = tmp_path / "house.toml"
    file.write_text(HOUSE, encoding="utf-8")
    result = prices("check", str(file))
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == (
        "keepwarm: house.toml: models.m.terms: gemini@2026/2.5-pro has amounts in USD, this sheet is in EUR\n"
    )
    missing = prices("check", str(tmp_path / "missing.toml"))
    assert (missing.exit_code, missing.stderr.count("\n")) == (1, 1)
    assert "cannot read" in missing.stderr


def test_a_broken_sheet_in_the_configured_folder_is_told(tmp_path: Path) -> None:
    result = prices("list", *configured(tmp_path, "name = 1"))
    assert result.exit_code == 1
    assert result.stderr.startswith("keepwarm: house.toml: ")
