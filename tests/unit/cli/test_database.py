import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from keepwarm.cache.objects import Objects
from keepwarm.cli.root import build
from keepwarm.config import Config, ConfigError, load
from keepwarm.core.cache_object import CacheObject, ObjectStatus
from keepwarm.storage import Storage, database, database_path

NOWHERE = "postgresql://keepwarm:secret@127.0.0.1:1/keepwarm"
FAR = 4_000_000_000  # a time none of these tests sees
Run = Callable[..., Result]


@pytest.fixture
def caches(tmp_path: Path) -> Run:
    """`keepwarm caches`, with a data directory that is empty."""

    def run(*args: str, env_url: str = "") -> Result:
        return CliRunner().invoke(
            build(),
            ["caches", *args, "--data-dir", str(tmp_path)],
            env={"COLUMNS": "120", "KEEPWARM_DATABASE_URL": env_url},
            catch_exceptions=False,
        )

    return run


@pytest.fixture
def url(postgresql_url: str) -> str:
    """A database with one cache object."""
    obj = CacheObject(
        id="cache-a",
        tenant="alice",
        model="small",
        status=ObjectStatus.READY,
        created_at=1,
        expires_at=FAR,
        messages=(),
        tools=(),
        n_tokens=5,
    )
    storage = Storage.open(postgresql_url, busy_s=1.0)
    asyncio.run(Objects(storage).insert(obj))
    storage.close()
    return postgresql_url


def test_a_database_is_named_by_option_or_environment(caches: Run, url: str, tmp_path: Path) -> None:
    assert "cache-a" in caches("list", "--database-url", url).stdout
    assert "cache-a" in caches("list", env_url=url).stdout
    assert caches("show", "cache-a", "--database-url", url).exit_code == 0
    assert caches("delete", "cache-a", "--database-url", url).stdout == "deleted cache-a\n"
    assert "no cache objects" in caches("list", "--database-url", url).stdout
    assert list(tmp_path.iterdir()) == []


def test_the_option_goes_before_the_environment_and_empty_means_the_directory(caches: Run, url: str) -> None:
    assert "cache-a" in caches("list", "--database-url", url, env_url=NOWHERE).stdout
    assert caches("list", "--database-url", "", env_url=url).stderr.startswith("keepwarm: there is no database in ")


def test_a_database_no_server_has_used_is_told_and_left_alone(caches: Run, postgresql_url: str) -> None:
    for _ in range(2):
        result = caches("list", "--database-url", postgresql_url)
        assert (result.exit_code, result.stdout) == (1, "")
        assert "it has no tables of a server; start one on it first" in result.stderr


def test_a_server_that_does_not_answer_is_one_line_without_the_password(caches: Run) -> None:
    result = caches("list", env_url=NOWHERE)
    assert result.exit_code == 1
    assert result.stderr.startswith("keepwarm: cannot use database postgresql://keepwarm@127.0.0.1:1/keepwarm: ")
    assert result.stderr.count("\n") == 1
    assert "secret" not in result.stderr


def test_the_configuration_says_which_database(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def where(config: Config) -> Path | str:
        return database(config.database_url, config.data_dir)

    file = tmp_path / "keepwarm.toml"
    file.write_text(f'data_dir = "{tmp_path}"\n')
    monkeypatch.delenv("KEEPWARM_DATABASE_URL", raising=False)
    assert where(load(str(file), {})) == database_path(tmp_path)
    monkeypatch.setenv("KEEPWARM_DATABASE_URL", "postgresql://environment/db")
    assert where(load(str(file), {})) == "postgresql://environment/db"
    file.write_text('database_url = "postgresql://file/db"\n')
    assert where(load(str(file), {})) == "postgresql://file/db"
    assert where(load(str(file), {"database_url": "postgresql://option/db"})) == "postgresql://option/db"


def test_another_kind_of_database_is_refused_without_repeating_its_url() -> None:
    with pytest.raises(ConfigError, match="database_url must begin with postgresql://") as caught:
        load(None, {"database_url": "mysql://u:secret@h/db"})
    assert "secret" not in str(caught.value)
