import asyncio
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from keepwarm.cli.root import build
from keepwarm.core.clock import SystemClock
from keepwarm.core.principal import Principal, Role
from keepwarm.gateway.auth import KeyAuth
from keepwarm.storage import Storage, database_path

Run = Callable[..., Result]


@pytest.fixture
def keys(tmp_path: Path) -> Run:
    def run(*args: str, group: str = "keys") -> Result:
        return CliRunner().invoke(
            build(), [group, *args, "--data-dir", str(tmp_path)], env={"COLUMNS": "160"}, catch_exceptions=False
        )

    return run


def who(data_dir: Path, key: str) -> Principal:
    storage = Storage.open(database_path(data_dir), busy_s=1.0)
    try:
        return asyncio.run(KeyAuth(storage, SystemClock()).principal(f"Bearer {key}"))
    finally:
        storage.close()


def test_a_key_is_printed_alone_and_works(keys: Run, tmp_path: Path) -> None:
    result = keys("create", "laptop")
    assert result.exit_code == 0
    assert "cannot be shown again" in result.stderr
    [key] = result.stdout.split()
    assert who(tmp_path, key) == Principal("default", "default", "default", 1, "laptop", Role.MEMBER)


def test_a_key_is_made_for_an_organisation_a_project_a_role_and_models(keys: Run, tmp_path: Path) -> None:
    keys("create", "research", group="orgs")
    keys("create", "search", "--org", "research", group="projects")
    where = ("--org", "research", "--project", "search")
    key = keys("create", "ci", *where, "--role", "read-only", "--model", "a", "--model", "b").stdout.strip()
    assert who(tmp_path, key) == Principal("research", "research", "search", 1, "ci", Role.READ_ONLY, ("a", "b"))


def test_an_expiry_is_in_utc(keys: Run) -> None:
    keys("create", "laptop", "--expires-at", "2100-01-02T03:04:05")
    [told] = json.loads(keys("list", "--json").stdout)
    assert told["expires_at"] == 4_102_542_245
    assert "expires 2100-01-02 03:04:05Z" in keys("list").stdout


def test_a_key_is_changed_by_its_number(keys: Run, tmp_path: Path) -> None:
    key = keys("create", "laptop", "--model", "a", "--expires-at", "2100-01-02").stdout.strip()
    assert keys("set", "1", "--name", "desk", "--model", "b", "--never-expires").stdout == "changed default key 1\n"
    assert who(tmp_path, key) == Principal("default", "default", "default", 1, "desk", Role.MEMBER, ("b",))
    assert keys("set", "1", "--all-models").exit_code == 0
    assert who(tmp_path, key).models is None
    for wrong in (("1",), ("2", "--name", "x"), ("1", "--model", "a", "--all-models"), ("1", "--name", "a b")):
        result = keys("set", *wrong)
        assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (1, "", 1)


def test_a_key_for_an_organisation_that_is_not_there_says_what_to_do(keys: Run) -> None:
    result = keys("create", "laptop", "--org", "research")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "there is no organisation 'research'" in result.stderr
    assert "keepwarm orgs create" in result.stderr


def test_a_name_that_two_organisations_have_is_revoked_with_its_own(keys: Run) -> None:
    for org in ("acme", "other"):
        keys("create", org, group="orgs")
        keys("create", "ci", "--org", org)
    unclear = keys("revoke", "ci")
    assert unclear.exit_code == 1
    assert "acme, other" in unclear.stderr
    assert keys("revoke", "ci", "--org", "acme").stdout == "revoked ci\n"
    assert keys("revoke", "ci").stdout == "revoked ci\n"


def test_the_list_shows_the_end_of_each_key_and_never_a_key(keys: Run) -> None:
    key = keys("create", "laptop").stdout.strip()
    assert "laptop" in keys("list").stdout
    assert keys("revoke", "laptop").stdout == "revoked laptop\n"
    listed = keys("list").stdout
    assert f"sk-kw-…{key[-4:]}" in listed
    assert key not in listed
    assert listed.count("Z ") == 2, "made and revoked"


def test_a_key_that_is_not_there_or_revoked_already_cannot_be_revoked(keys: Run) -> None:
    keys("create", "laptop")
    assert keys("revoke", "laptop").exit_code == 0
    for name in ("laptop", "server"):
        result = keys("revoke", name)
        assert (result.exit_code, result.stdout) == (1, "")
        assert result.stderr == f"keepwarm: there is no live key '{name}'; keepwarm keys list shows them\n"


@pytest.mark.parametrize("name", ["laptop", "a b"])
def test_a_name_that_cannot_be_used_is_one_line(keys: Run, name: str) -> None:
    keys("create", "laptop")
    result = keys("create", name)
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (1, "", 1)


def test_listing_makes_no_database(keys: Run, tmp_path: Path) -> None:
    result = keys("list")
    assert result.exit_code == 1
    assert result.stderr == (
        f"keepwarm: there is no database in {tmp_path}; give the server's --data-dir, or start a server there first\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_broken_database_is_one_line(keys: Run, tmp_path: Path) -> None:
    database_path(tmp_path).write_bytes(b"x" * 1000)
    result = keys("list")
    assert result.exit_code == 1
    assert "file is not a database" in result.stderr
    assert result.stderr.count("\n") == 1
