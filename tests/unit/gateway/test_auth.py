import asyncio
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from keepwarm.core.clock import RandomIds
from keepwarm.core.errors import ApiError, ErrorKind
from keepwarm.gateway.auth import DevAuth, KeyAuth, KeyInfo, KeyNameError, Keys, Principal
from keepwarm.storage import Storage, database_path

BAD_HEADERS = [None, "", "Bearer", "Bearer ", "Bearer   ", "sk-secret", "Basic sk-secret", "Bearersk-secret"]


@pytest.fixture
def storage(tmp_path: Path) -> Iterator[Storage]:
    storage = Storage.open(database_path(tmp_path), busy_s=1.0)
    yield storage
    storage.close()


@pytest.fixture
def keys(storage: Storage) -> Keys:
    return Keys(storage, RandomIds())


async def refusal(auth: KeyAuth | DevAuth, authorization: str | None) -> ApiError:
    with pytest.raises(ApiError) as caught:
        await auth.principal(authorization)
    assert caught.value.kind is ErrorKind.UNAUTHENTICATED
    assert "secret" not in caught.value.message
    return caught.value


@pytest.mark.parametrize("authorization", BAD_HEADERS)
async def test_a_missing_or_malformed_key_is_refused_with_the_form(storage: Storage, authorization: str | None) -> None:
    for auth in (KeyAuth(storage), DevAuth()):
        assert "Authorization: Bearer KEY" in (await refusal(auth, authorization)).message


async def test_dev_keys_are_tenants_of_their_own() -> None:
    auth = DevAuth()
    one = await auth.principal("Bearer one")
    assert one == await auth.principal("bearer  one ")
    assert re.fullmatch(r"dev-[0-9a-f]{16}", one.tenant)
    assert one.tenant != (await auth.principal("Bearer two")).tenant
    assert one.tenant != (await auth.principal("Bearer öne")).tenant


async def test_a_key_is_made_used_and_revoked(storage: Storage, keys: Keys) -> None:
    auth = KeyAuth(storage)
    key = await keys.create("laptop", None, 100.9)
    other = await keys.create("server", "team", 101.0)
    assert re.fullmatch(r"sk-kw-[a-z0-9]{40}", key)
    assert await auth.principal(f"Bearer {key}") == Principal("laptop", "laptop")
    assert await auth.principal(f"Bearer {other}") == Principal("team", "server")
    assert await keys.revoke("laptop", 200.0)
    assert "unknown or was revoked" in (await refusal(auth, f"Bearer {key}")).message
    assert await auth.principal(f"Bearer {other}") == Principal("team", "server")
    assert not await keys.revoke("laptop", 201.0)
    assert await keys.list() == [
        KeyInfo("laptop", "laptop", key[-4:], 100, 200),
        KeyInfo("server", "team", other[-4:], 101, None),
    ]


async def test_a_key_revoked_by_another_process_is_refused_at_once(
    tmp_path: Path, storage: Storage, keys: Keys
) -> None:
    key = await keys.create("laptop", None, 1)
    auth = KeyAuth(storage)
    await auth.principal(f"Bearer {key}")
    other = await asyncio.to_thread(Storage.open, database_path(tmp_path), 1.0)
    assert await Keys(other, RandomIds()).revoke("laptop", 2)
    await asyncio.to_thread(other.close)
    await refusal(auth, f"Bearer {key}")


async def test_keys_that_only_look_alike_are_refused(storage: Storage, keys: Keys) -> None:
    key = await keys.create("laptop", None, 1)
    for near in (key[:-1], key + "x", key.upper(), key[6:], "sk-secret", "sk-secret-\u00e9", "%", "' OR 1=1 --"):
        await refusal(KeyAuth(storage), f"Bearer {near}")


def test_the_key_is_nowhere_in_the_database(tmp_path: Path, storage: Storage, keys: Keys) -> None:
    key = asyncio.run(keys.create("laptop", None, 1))
    stored = b"".join(file.read_bytes() for file in tmp_path.iterdir())
    assert b"laptop" in stored
    assert key.encode() not in stored
    assert key.removeprefix("sk-kw-").encode() not in stored


async def test_a_name_is_taken_until_its_key_is_revoked(storage: Storage, keys: Keys) -> None:
    first = await keys.create("laptop", None, 1)
    with pytest.raises(KeyNameError, match="revoke it first"):
        await keys.create("laptop", "team", 2)
    await keys.revoke("laptop", 3)
    second = await keys.create("laptop", None, 4)
    assert await KeyAuth(storage).principal(f"Bearer {second}") == Principal("laptop", "laptop")
    await refusal(KeyAuth(storage), f"Bearer {first}")


@pytest.mark.parametrize("name", ["", " ", "a b", "-a", "a\n", "é", "a" * 65, "dev/x"])
async def test_names_are_plain(keys: Keys, name: str) -> None:
    with pytest.raises(KeyNameError, match="cannot be used"):
        await keys.create(name, None, 1)
    with pytest.raises(KeyNameError, match="tenant"):
        await keys.create("fine", name, 1)
    assert await keys.list() == []
