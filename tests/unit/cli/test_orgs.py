import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from keepwarm.cli.root import build

Run = Callable[..., Result]


@pytest.fixture
def orgs(tmp_path: Path) -> Run:
    def run(*args: str, group: str = "orgs") -> Result:
        return CliRunner().invoke(
            build(), [group, *args, "--data-dir", str(tmp_path)], env={"COLUMNS": "160"}, catch_exceptions=False
        )

    return run


def only(orgs: Run) -> dict[str, object]:
    [told] = json.loads(orgs("list", "--json").stdout)
    return {name: value for name, value in told.items() if name != "created_at"}


def test_an_organisation_is_made_changed_and_shown(orgs: Run) -> None:
    made = orgs("create", "acme", "--tier", "tier1", "--limits", '{"rpm": 5, "tpd": null}', "--prepaid")
    assert (made.exit_code, made.stdout) == (0, "made acme\n")
    first = {
        "id": "acme",
        "tier": "tier1",
        "limits": {"rpm": 5, "tpd": None},
        "is_prepaid": True,
        "cache_scope": "organisation",
        "disabled_at": None,
    }
    assert only(orgs) == first
    assert orgs("set", "acme", "--tier", "", "--cache-scope", "project").stdout == "changed acme\n"
    assert only(orgs) == {**first, "tier": None, "cache_scope": "project"}
    assert orgs("set", "acme", "--postpaid", "--limits", "{}").exit_code == 0
    assert only(orgs) == {**first, "tier": None, "cache_scope": "project", "is_prepaid": False, "limits": {}}


def test_the_table_has_what_differs(orgs: Run) -> None:
    assert orgs("create", "acme", "--tier", "tier1", "--limits", '{"rpm": 5}').exit_code == 0
    table = orgs("list").stdout
    for text in ("acme", "tier1", '{"rpm":5}'):
        assert text in table


def test_one_is_disabled_and_enabled(orgs: Run) -> None:
    orgs("create", "acme")
    assert orgs("disable", "acme").stdout == "disabled acme\n"
    assert only(orgs)["disabled_at"] is not None
    assert orgs("enable", "acme").stdout == "enabled acme\n"
    assert only(orgs)["disabled_at"] is None


def test_showing_one_tells_its_projects_and_keys_and_no_key(orgs: Run) -> None:
    orgs("create", "acme")
    key = orgs("create", "ci", "--org", "acme", group="keys").stdout.strip()
    shown = orgs("show", "acme").stdout
    told = json.loads(shown)
    assert [project["name"] for project in told["projects"]] == ["default"]
    assert [(known["name"], known["last4"]) for known in told["keys"]] == [("ci", key[-4:])]
    assert key not in shown


def test_tiers_of_the_configuration_are_known_with_it(orgs: Run, tmp_path: Path) -> None:
    file = tmp_path / "k.toml"
    file.write_text("[rates.tiers.house]\nrpm = 3\n", encoding="utf-8")
    refused = orgs("create", "acme", "--tier", "house")
    assert refused.exit_code == 1
    assert "no tier 'house'; the tiers are free, tier1" in refused.stderr
    assert orgs("create", "acme", "--tier", "house", "--config", str(file)).exit_code == 0


@pytest.mark.parametrize(
    "words, line",
    [
        (["set", "acme"], "nothing to change"),
        (["set", "nobody", "--prepaid"], "there is no organisation 'nobody'"),
        (["show", "nobody"], "there is no organisation 'nobody'"),
        (["disable", "nobody"], "there is no organisation 'nobody'"),
        (["create", "acme"], "there is an organisation 'acme' already"),
        (["create", "a/b"], "organisation 'a/b' cannot be used as a name"),
        (["set", "acme", "--limits", "{"], "--limits"),
        (["set", "acme", "--limits", '{"rps": 1}'], "rps"),
    ],
)
def test_what_cannot_be_done_is_one_line(orgs: Run, words: list[str], line: str) -> None:
    orgs("create", "acme")
    result = orgs(*words)
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (1, "", 1)
    assert line in result.stderr
