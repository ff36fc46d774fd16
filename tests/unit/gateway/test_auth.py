import asyncio
import re
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace

from keepwarm.core.clock import RandomIds
from keepwarm.core.errors import ApiError, ErrorKind
from keepwarm.core.identity import NewKey, NewOrganisation, OrganisationChange
from keepwarm.core.principal import Principal, Role
from keepwarm.core.rate_limit import LimitOverrides
from keepwarm.gateway.auth import Auth, DevAuth, KeyAuth
from keepwarm.gateway.identities import Identities
from keepwarm.storage import Storage, database_path
from tests.world import FakeClock

BAD_HEADERS = [None, "", "Bearer", "Bearer ", "Bearer   ", "sk-secret", "Basic sk-secret", "Bearersk-secret"]

LAPTOP = NewKey("laptop")


@pytest.fixture
def storage(any_database: Path | str) -> Iterator[Storage]:
    storage = Storage.open(any_database, busy_s=1.0)
    yield storage
    storage.close()


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def identities(storage: Storage, clock: FakeClock) -> Identities:
    return Identities(storage, clock, RandomIds(), tiers={}, default_tier=None)


@pytest.fixture
def auth(storage: Storage, clock: FakeClock) -> KeyAuth:
    return KeyAuth(storage, clock)


async def make(identities: Identities, new: NewKey = LAPTOP, org: str | None = None) -> str:
    key, _ = await identities.create_key(org, new, by=None)
    return key


async def refusal(auth: Auth, authorization: str | None, kind: ErrorKind = ErrorKind.UNAUTHENTICATED) -> str:
    with pytest.raises(ApiError) as caught:
        await auth.principal(authorization)
    assert caught.value.kind is kind
    assert "secret" not in caught.value.message
    return caught.value.message


@pytest.mark.parametrize("authorization", BAD_HEADERS)
async def test_a_missing_or_malformed_key_is_refused_with_the_form(auth: KeyAuth, authorization: str | None) -> None:
    for one in (auth, DevAuth()):
        assert "Authorization: Bearer KEY" in await refusal(one, authorization)


async def test_dev_keys_are_operators_and_tenants_of_their_own() -> None:
    auth = DevAuth()
    one = await auth.principal("Bearer one")
    assert one == await auth.principal("bearer  one ")
    assert re.fullmatch(r"dev-[0-9a-f]{16}", one.tenant)
    assert (one.role, one.is_billed) == (Role.OPERATOR, False)
    assert one.tenant != (await auth.principal("Bearer two")).tenant
    assert one.tenant != (await auth.principal("Bearer öne")).tenant


async def test_a_key_tells_all_that_limits_and_holds_go_by(auth: KeyAuth, identities: Identities) -> None:
    own = LimitOverrides(rpm=5, tpd=None)
    await identities.create_organisation(NewOrganisation("acme", "tier1", own, is_prepaid=True))
    await identities.create_project("acme", "search")
    key = await make(identities, NewKey("ci", "search", Role.ADMIN, models=("b", "a")), "acme")
    assert re.fullmatch(r"sk-kw-[a-z0-9]{40}", key)
    found = await auth.principal(f"Bearer {key}")
    assert found == Principal(
        tenant="acme",
        organisation="acme",
        project="search",
        key_id=1,
        key_name="ci",
        role=Role.ADMIN,
        models=("b", "a"),
        is_prepaid=True,
        tier="tier1",
        limits=found.limits,
    )
    assert msgspec.json.decode(found.limits or b"", type=LimitOverrides) == own
    assert found.is_billed


async def test_a_key_with_nothing_said_is_a_members_of_the_default_organisation(
    auth: KeyAuth, identities: Identities
) -> None:
    found = await auth.principal(f"Bearer {await make(identities)}")
    assert found == Principal("default", "default", "default", 1, "laptop", Role.MEMBER)


async def test_projects_share_a_namespace_unless_their_organisation_says_otherwise(
    auth: KeyAuth, identities: Identities
) -> None:
    await identities.create_organisation(NewOrganisation("acme"))
    await identities.create_project("acme", "search")
    keys = [await make(identities, NewKey(name, name), "acme") for name in ("default", "search")]

    async def tenants() -> list[str]:
        return [(await auth.principal(f"Bearer {key}")).tenant for key in keys]

    assert await tenants() == ["acme", "acme"]
    await identities.change_organisation("acme", OrganisationChange(cache_scope="project"))
    assert await tenants() == ["acme/default", "acme/search"]


async def test_a_revoked_key_is_refused(auth: KeyAuth, identities: Identities) -> None:
    key, other = await make(identities), await make(identities, NewKey("server"))
    await identities.revoke_named(None, "laptop")
    assert "unknown or was revoked" in await refusal(auth, f"Bearer {key}")
    assert (await auth.principal(f"Bearer {other}")).key_name == "server"


async def test_a_key_ends_at_its_second(auth: KeyAuth, identities: Identities, clock: FakeClock) -> None:
    key = await make(identities, NewKey("laptop", expires_at=int(clock.now()) + 60))
    clock.advance(59.9)
    await auth.principal(f"Bearer {key}")
    clock.advance(0.1)
    assert "expired at 2023-11-14 22:14:20+00:00" in await refusal(auth, f"Bearer {key}")


async def test_a_disabled_organisation_is_refused_until_it_is_enabled(auth: KeyAuth, identities: Identities) -> None:
    key = await make(identities)
    await identities.change_organisation("default", OrganisationChange(is_disabled=True))
    assert "'default' is disabled" in await refusal(auth, f"Bearer {key}", ErrorKind.PERMISSION_DENIED)
    await identities.change_organisation("default", OrganisationChange(is_disabled=False))
    await auth.principal(f"Bearer {key}")


async def test_an_archived_project_is_refused_until_it_is_made_again(auth: KeyAuth, identities: Identities) -> None:
    key = await make(identities)
    await identities.archive_project("default", "default", by=None)
    assert "archived" in await refusal(auth, f"Bearer {key}", ErrorKind.PERMISSION_DENIED)
    await identities.create_project("default", "default")
    await auth.principal(f"Bearer {key}")


async def test_a_key_revoked_by_another_process_is_refused_at_once(
    any_database: Path | str, auth: KeyAuth, identities: Identities, clock: FakeClock
) -> None:
    key = await make(identities)
    await auth.principal(f"Bearer {key}")
    other = await asyncio.to_thread(Storage.open, any_database, 1.0)
    await Identities(other, clock, RandomIds(), tiers={}, default_tier=None).revoke_named(None, "laptop")
    await asyncio.to_thread(other.close)
    await refusal(auth, f"Bearer {key}")


async def test_keys_that_only_look_alike_are_refused(auth: KeyAuth, identities: Identities) -> None:
    key = await make(identities)
    for near in (key[:-1], key + "x", key.upper(), key[6:], "sk-secret", "sk-secret-\u00e9", "%", "' OR 1=1 --"):
        await refusal(auth, f"Bearer {near}")


def test_the_key_is_nowhere_in_the_database(tmp_path: Path, clock: FakeClock) -> None:
    storage = Storage.open(database_path(tmp_path), busy_s=1.0)
    key = asyncio.run(make(Identities(storage, clock, RandomIds(), tiers={}, default_tier=None)))
    storage.close()
    stored = b"".join(file.read_bytes() for file in tmp_path.iterdir())
    assert b"laptop" in stored
    assert key.encode() not in stored
    assert key.removeprefix("sk-kw-").encode() not in stored


async def test_a_renamed_successor_does_not_revive_a_revoked_key(auth: KeyAuth, identities: Identities) -> None:
    first = await make(identities)
    await identities.revoke_named(None, "laptop")
    second = await make(identities)
    await refusal(auth, f"Bearer {first}")
    known = await auth.principal(f"Bearer {second}")
    assert known == replace(known, key_id=2, key_name="laptop")
