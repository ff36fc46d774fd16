import asyncio
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from keepwarm.cache.objects import Objects
from keepwarm.cli.root import build
from keepwarm.core.cache_object import CacheObject, Cause, ObjectStatus
from keepwarm.core.request import Message, ObjectDialect, TextPart, Tool
from keepwarm.storage import Storage, database_path

FAR = 4_000_000_000  # a time none of these tests sees
Run = Callable[..., Result]


def an_object(object_id: str, tenant: str, expires_at: int, text: str, dialect: ObjectDialect = "kimi") -> CacheObject:
    return CacheObject(
        id=object_id,
        tenant=tenant,
        model="moonshot-v1",
        status=ObjectStatus.PENDING,
        created_at=1_700_000_000,
        expires_at=expires_at,
        messages=(Message("system", (TextPart(text),)),),
        tools=(Tool("look_up", "finds things", "{}"),),
        n_tokens=12_345,
        name="[red]handbook",
        metadata=(("biz", "1"),),
        dialect=dialect,
    )


@pytest.fixture
def caches(tmp_path: Path) -> Run:
    async def fill(storage: Storage) -> None:
        objects = Objects(storage)
        await objects.insert(an_object("cache-a", "alice", FAR, "x" * 5000), ("t",))
        await objects.insert(an_object("cache-b", "bob", 1_700_000_001, "short", "gemini"))
        await objects.settle("cache-a", 0, Cause.COMPUTED)

    storage = Storage.open(database_path(tmp_path), busy_s=1.0)
    asyncio.run(fill(storage))
    storage.close()

    def run(*args: str) -> Result:
        return CliRunner().invoke(
            build(), ["caches", *args, "--data-dir", str(tmp_path)], env={"COLUMNS": "120"}, catch_exceptions=False
        )

    return run


def test_the_list_tells_what_a_client_would_be_told(caches: Run) -> None:
    lines = [line for line in caches("list").stdout.splitlines() if "cache-" in line]
    assert [line.split("│")[1:5] for line in lines] == [
        [" cache-a ", " alice  ", " kimi    ", " ready    "],
        [" cache-b ", " bob    ", " gemini  ", " inactive "],
    ]
    assert "[red]handbook" in lines[0]
    assert "12,345" in lines[0]


def test_the_list_as_json_and_of_one_tenant(caches: Run) -> None:
    assert [obj["id"] for obj in json.loads(caches("list", "--json").stdout)] == ["cache-a", "cache-b"]
    [only] = json.loads(caches("list", "--json", "--tenant", "bob").stdout)
    assert only == {
        "id": "cache-b",
        "tenant": "bob",
        "dialect": "gemini",
        "model": "moonshot-v1",
        "status": "inactive",
        "n_tokens": 12345,
        "created_at": 1_700_000_000,
        "expires_at": 1_700_000_001,
        "name": "[red]handbook",
        "description": "",
        "metadata": {"biz": "1"},
        "error": None,
    }
    assert caches("list", "--tenant", "carol").stdout == "no cache objects\n"
    assert json.loads(caches("list", "--tenant", "carol", "--json").stdout) == []


def test_one_object_with_its_messages(caches: Run) -> None:
    shown = caches("show", "cache-a").stdout
    assert "(5,000 characters)" in shown
    assert "look_up: finds things" in shown
    assert [line.split() for line in shown.splitlines() if "dialect" in line] == [["│", "dialect", "│", "kimi", "│"]]
    whole = json.loads(caches("show", "cache-a", "--json").stdout)
    assert whole["messages"][0]["parts"] == [{"type": "text", "text": "x" * 5000, "mark": None}]
    assert whole["tools"][0]["name"] == "look_up"


def test_delete(caches: Run) -> None:
    assert caches("delete", "cache-a").stdout == "deleted cache-a\n"
    assert [obj["id"] for obj in json.loads(caches("list", "--json").stdout)] == ["cache-b"]
    assert caches("delete", "cache-a").exit_code == 1


@pytest.mark.parametrize("command", ["show", "delete"])
def test_an_object_that_is_not_there_or_not_that_tenants(caches: Run, command: str) -> None:
    result = caches(command, "cache-a", "--tenant", "bob")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == (
        "keepwarm: there is no cache object cache-a of tenant bob; keepwarm caches list shows them\n"
    )
    assert caches(command, "cache-z").exit_code == 1
    assert len(json.loads(caches("list", "--json").stdout)) == 2
