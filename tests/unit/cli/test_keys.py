import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from keepwarm.cli.root import build
from keepwarm.gateway.auth import KeyAuth, Principal
from keepwarm.storage import Storage, database_path

Run = Callable[..., Result]


@pytest.fixture
def keys(tmp_path: Path) -> Run:
    def run(*args: str) -> Result:
        return CliRunner().invoke(
            build(), ["keys", *args, "--data-dir", str(tmp_path)], env={"COLUMNS": "120"}, catch_exceptions=False
        )

    return run


def who(data_dir: Path, key: str) -> Principal:
    storage = Storage.open(database_path(data_dir), busy_s=1.0)
    try:
        return asyncio.run(KeyAuth(storage).principal(f"Bearer {key}"))
    finally:
        storage.close()


def test_a_key_is_printed_alone_and_works(keys: Run, tmp_path: Path) -> None:
    result = keys("create", "laptop", "--tenant", "research")
    assert result.exit_code == 0
    assert "cannot be shown again" in result.stderr
    [key] = result.stdout.split()
    assert who(tmp_path, key) == Principal("research", "laptop")


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
