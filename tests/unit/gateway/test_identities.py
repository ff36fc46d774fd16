from collections.abc import Awaitable, Iterator
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from keepwarm.core.clock import RandomIds
from keepwarm.core.errors import ApiError, ErrorKind
from keepwarm.core.identity import KeyChange, NewKey, NewOrganisation, Organisation, OrganisationChange, Project
from keepwarm.core.principal import Principal, Role
from keepwarm.core.rate_limit import LimitOverrides, OrgLimits
from keepwarm.gateway.identities import Identities
from keepwarm.storage import Storage
from tests.world import FakeClock

BAD_NAMES = ["", " ", "a b", "-a", "a\n", "é", "a" * 65, "dev/x", "..", "../x"]
NOW = 1_700_000_000
ADMIN = Principal("acme", "acme", "default", 7, "boss", Role.ADMIN)
OPERATOR = Principal("default", "default", "default", 1, "root", Role.OPERATOR)


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def identities(any_database: Path | str, clock: FakeClock) -> Iterator[Identities]:
    storage = Storage.open(any_database, busy_s=1.0)
    yield Identities(storage, clock, RandomIds(), tiers={"house": OrgLimits(rpm=7)}, default_tier=None)
    storage.close()


async def refused(act: Awaitable[Any], kind: ErrorKind = ErrorKind.INVALID_REQUEST) -> ApiError:
    with pytest.raises(ApiError) as caught:
        await act
    assert caught.value.kind is kind
    return caught.value


async def test_an_organisation_begins_with_a_default_project(identities: Identities) -> None:
    made = await identities.create_organisation(NewOrganisation("acme", "house", LimitOverrides(tpm=None)))
    assert made == Organisation("acme", "house", LimitOverrides(tpm=None), False, "organisation", NOW, None)
    assert await identities.organisation("acme") == made
    assert await identities.organisations() == [made]
    assert await identities.projects("acme") == [Project("acme", "default", NOW, None)]


async def test_what_a_change_does_not_name_stays(identities: Identities, clock: FakeClock) -> None:
    made = await identities.create_organisation(NewOrganisation("acme", "house", LimitOverrides(rpm=1)))
    clock.advance(5)
    for change, expected in (
        (OrganisationChange(), made),
        (OrganisationChange(is_disabled=True), replace(made, disabled_at=NOW + 5)),
        (OrganisationChange(tier=None), replace(made, tier=None, disabled_at=NOW + 5)),
        (OrganisationChange(is_disabled=False), replace(made, tier=None)),
        (OrganisationChange(limits=LimitOverrides()), replace(made, tier=None, limits=LimitOverrides())),
    ):
        assert await identities.change_organisation("acme", change) == expected
        assert await identities.organisation("acme") == expected


async def test_disabling_again_keeps_the_first_time(identities: Identities, clock: FakeClock) -> None:
    await identities.create_organisation(NewOrganisation("acme"))
    await identities.change_organisation("acme", OrganisationChange(is_disabled=True))
    clock.advance(5)
    again = await identities.change_organisation("acme", OrganisationChange(is_disabled=True))
    assert again.disabled_at == NOW


async def test_a_tier_that_is_not_configured_is_refused_with_those_that_are(identities: Identities) -> None:
    error = await refused(identities.create_organisation(NewOrganisation("acme", "gold")))
    assert "tier1" in error.message
    assert "house" in error.message
    await identities.create_organisation(NewOrganisation("acme"))
    await refused(identities.change_organisation("acme", OrganisationChange(tier="gold")))
    assert (await identities.organisation("acme")).tier is None


@pytest.mark.parametrize("name", BAD_NAMES)
async def test_names_are_plain(identities: Identities, name: str) -> None:
    await identities.create_organisation(NewOrganisation("acme"))
    for act in (
        identities.create_organisation(NewOrganisation(name)),
        identities.create_project("acme", name),
        identities.create_key("acme", NewKey(name), by=None),
    ):
        assert "cannot be used as a name" in (await refused(act)).message
    assert len(await identities.organisations()) == len(await identities.projects("acme")) == 1
    assert await identities.keys() == []


async def test_names_are_taken_once(identities: Identities) -> None:
    await identities.create_organisation(NewOrganisation("acme"))
    await identities.create_key("acme", NewKey("ci"), by=None)
    for act in (
        identities.create_organisation(NewOrganisation("acme")),
        identities.create_project("acme", "default"),
        identities.create_key("acme", NewKey("ci"), by=None),
    ):
        assert "already" in (await refused(act)).message
    await identities.create_organisation(NewOrganisation("other"))
    await identities.create_key("other", NewKey("ci"), by=None)


async def test_what_is_not_there_is_told_with_what_to_do(identities: Identities) -> None:
    for act in (
        identities.organisation("acme"),
        identities.change_organisation("acme", OrganisationChange()),
        identities.projects("acme"),
        identities.create_project("acme", "search"),
        identities.keys("acme"),
        identities.create_key("acme", NewKey("ci"), by=None),
    ):
        assert "keepwarm orgs create" in (await refused(act, ErrorKind.UNKNOWN_ROUTE)).message
    await identities.create_organisation(NewOrganisation("acme"))
    await refused(identities.project("acme", "search"), ErrorKind.UNKNOWN_ROUTE)
    await refused(identities.archive_project("acme", "search", by=None), ErrorKind.UNKNOWN_ROUTE)
    await refused(identities.key("acme", 1), ErrorKind.UNKNOWN_ROUTE)


async def test_a_key_needs_a_live_project(identities: Identities) -> None:
    await identities.create_organisation(NewOrganisation("acme"))
    new = NewKey("ci", "search")
    error = await refused(identities.create_key("acme", new, by=None))
    assert "keepwarm projects create search --org acme" in error.message
    await identities.create_project("acme", "search")
    await identities.archive_project("acme", "search", by=None)
    assert "archived" in (await refused(identities.create_key("acme", new, by=None))).message
    assert (await identities.create_project("acme", "search")).archived_at is None
    _, made = await identities.create_key("acme", new, by=None)
    assert made.project == "search"


async def test_a_key_of_no_organisation_makes_the_default_one_once(identities: Identities) -> None:
    for name in ("a", "b"):
        await identities.create_key(None, NewKey(name), by=None)
    assert [org.id for org in await identities.organisations()] == ["default"]
    assert [(key.name, key.organisation, key.project) for key in await identities.keys()] == [
        ("a", "default", "default"),
        ("b", "default", "default"),
    ]


async def test_a_refused_key_leaves_no_default_organisation(identities: Identities) -> None:
    await refused(identities.create_key(None, NewKey("a", "search"), by=None))
    assert await identities.organisations() == []


async def test_only_operators_make_and_end_operators(identities: Identities) -> None:
    new = NewKey("root", role=Role.OPERATOR)
    await refused(identities.create_key(None, new, by=ADMIN), ErrorKind.PERMISSION_DENIED)
    _, made = await identities.create_key(None, new, by=OPERATOR)
    revoking = identities.revoke_key("default", made.id, by=ADMIN)
    await refused(revoking, ErrorKind.PERMISSION_DENIED)
    archiving = identities.archive_project("default", "default", by=ADMIN)  # its keys would be refused
    await refused(archiving, ErrorKind.PERMISSION_DENIED)
    assert (await identities.key("default", made.id)).revoked_at is None
    assert (await identities.revoke_key("default", made.id, by=OPERATOR)).revoked_at == NOW
    assert (await identities.archive_project("default", "default", by=ADMIN)).archived_at == NOW


@pytest.mark.parametrize(
    "more, param",
    [
        ({}, "models"),
        ({"models": ("a", "c")}, "models"),
        ({"models": ("a",)}, "expires_at"),
        ({"models": ("a",), "expires_at": NOW + 101}, "expires_at"),
    ],
)
async def test_a_key_makes_none_that_may_more_or_longer(
    identities: Identities, more: dict[str, Any], param: str
) -> None:
    await identities.create_organisation(NewOrganisation("acme"))
    narrow = replace(ADMIN, models=("a", "b"), expires_at=NOW + 100)
    creating = identities.create_key("acme", NewKey("new", role=Role.ADMIN, **more), by=narrow)
    assert (await refused(creating, ErrorKind.PERMISSION_DENIED)).param == param
    within = NewKey("new", role=Role.ADMIN, models=("b",), expires_at=NOW + 100)
    await identities.create_key("acme", within, by=narrow)
    await identities.create_key("acme", NewKey("free"), by=ADMIN)


async def test_a_change_gives_a_key_no_more_than_its_changer_has(identities: Identities) -> None:
    await identities.create_organisation(NewOrganisation("acme"))
    narrow = replace(ADMIN, models=("a", "b"), expires_at=NOW + 100)
    _, key = await identities.create_key("acme", NewKey("ci", models=("a",), expires_at=NOW + 50), by=None)
    for change in (KeyChange(models=None), KeyChange(models=("c",)), KeyChange(expires_at=NOW + 101)):
        await refused(identities.change_key("acme", key.id, change, by=narrow), ErrorKind.PERMISSION_DENIED)
    assert await identities.key("acme", key.id) == key
    within = KeyChange("robot", NOW + 100, ("b",))
    changed = await identities.change_key("acme", key.id, within, by=narrow)
    assert changed == replace(key, name="robot", expires_at=NOW + 100, models=("b",))
    await refused(identities.change_key("default", key.id, within, by=None), ErrorKind.UNKNOWN_ROUTE)


async def test_an_organisation_has_so_many_projects_and_live_keys(
    identities: Identities, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("keepwarm.gateway.identities.PROJECTS_MAX", 2)
    monkeypatch.setattr("keepwarm.gateway.identities.LIVE_KEYS_MAX", 2)
    await identities.create_organisation(NewOrganisation("acme"))
    await identities.create_project("acme", "one")
    assert "2 of at most 2 projects" in (await refused(identities.create_project("acme", "two"))).message
    _, first = await identities.create_key("acme", NewKey("a"), by=None)
    await identities.create_key("acme", NewKey("b"), by=None)
    assert "2 of at most 2 live keys" in (await refused(identities.create_key("acme", NewKey("c"), by=None))).message
    await identities.revoke_key("acme", first.id, by=None)
    await identities.create_key("acme", NewKey("c"), by=None)
    assert [key.name for key in await identities.keys("acme", after=first.id, limit=1)] == ["b"]


async def test_a_key_is_revoked_by_its_own_organisation_only(identities: Identities) -> None:
    await identities.create_organisation(NewOrganisation("other"))
    _, made = await identities.create_key(None, NewKey("ci"), by=None)
    await refused(identities.revoke_key("other", made.id, by=None), ErrorKind.UNKNOWN_ROUTE)
    await refused(identities.key("other", made.id), ErrorKind.UNKNOWN_ROUTE)
    assert (await identities.key("default", made.id)) == made


async def test_revoking_again_keeps_the_first_time(identities: Identities, clock: FakeClock) -> None:
    _, made = await identities.create_key(None, NewKey("ci"), by=None)
    await identities.revoke_key("default", made.id, by=None)
    clock.advance(5)
    assert (await identities.revoke_key("default", made.id, by=None)).revoked_at == NOW


async def test_a_name_that_several_organisations_have_is_revoked_for_one(identities: Identities) -> None:
    for org in ("acme", "other"):
        await identities.create_organisation(NewOrganisation(org))
        await identities.create_key(org, NewKey("ci"), by=None)
    assert "acme, other" in (await refused(identities.revoke_named(None, "ci"))).message
    assert (await identities.revoke_named("other", "ci")).organisation == "other"
    assert (await identities.revoke_named(None, "ci")).organisation == "acme"
    await refused(identities.revoke_named(None, "ci"), ErrorKind.UNKNOWN_ROUTE)


@pytest.mark.parametrize(
    "new",
    [
        NewKey("ci", expires_at=NOW),
        NewKey("ci", expires_at=1 << 70),
        NewKey("ci", models=()),
        NewKey("ci", models=("",)),
        NewKey("ci", models=("m" * 201,)),
        NewKey("ci", models=("m",) * 101),
    ],
    ids=["expired", "milliseconds", "no models", "no name", "long name", "many models"],
)
async def test_a_key_nobody_could_use_is_refused(identities: Identities, new: NewKey) -> None:
    await refused(identities.create_key(None, new, by=None))
    assert await identities.keys() == []


async def test_what_is_told_of_a_key_is_what_was_asked_for(identities: Identities) -> None:
    new = NewKey("ci", "default", Role.READ_ONLY, NOW + 1, ("a", "b"))
    text, made = await identities.create_key(None, new, by=None)
    assert (made.role, made.expires_at, made.models) == (Role.READ_ONLY, NOW + 1, ("a", "b"))
    assert text.endswith(made.last4)
    assert await identities.keys() == [made]
    assert await identities.keys("default") == [made]
