import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from keepwarm.cli.root import build

Run = Callable[..., Result]


@pytest.fixture
def projects(tmp_path: Path) -> Run:
    def run(*args: str, group: str = "projects") -> Result:
        return CliRunner().invoke(
            build(), [group, *args, "--data-dir", str(tmp_path)], env={"COLUMNS": "120"}, catch_exceptions=False
        )

    run("create", "acme", group="orgs")
    return run


def test_a_project_is_made_archived_and_opened_again(projects: Run) -> None:
    def archived() -> dict[str, bool]:
        told = json.loads(projects("list", "--org", "acme", "--json").stdout)
        return {project["name"]: project["archived_at"] is not None for project in told}

    assert projects("create", "search", "--org", "acme").stdout == "made acme/search\n"
    assert archived() == {"default": False, "search": False}
    assert projects("archive", "search", "--org", "acme").stdout == "archived acme/search\n"
    assert archived() == {"default": False, "search": True}
    assert "search" in projects("list", "--org", "acme").stdout
    assert projects("create", "search", "--org", "acme").exit_code == 0
    assert archived() == {"default": False, "search": False}


@pytest.mark.parametrize(
    "words, line",
    [
        (["create", "search"], "there is no organisation 'default'"),
        (["create", "default", "--org", "acme"], "has a project 'default' already"),
        (["create", "a b", "--org", "acme"], "project 'a b' cannot be used as a name"),
        (["archive", "search", "--org", "acme"], "organisation 'acme' has no project 'search'"),
    ],
)
def test_what_cannot_be_done_is_one_line(projects: Run, words: list[str], line: str) -> None:
    result = projects(*words)
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (1, "", 1)
    assert line in result.stderr
