import pytest

from keepwarm.core.errors import ApiError, ErrorKind
from keepwarm.core.principal import Access, Principal, Role, allowed, allowed_names, check_access, check_allowed

RANKED = [Role.OPERATOR, Role.ADMIN, Role.MEMBER, Role.READ_ONLY]
N_ALLOWED = {Access.PUBLIC: 4, Access.READ: 4, Access.USE: 3, Access.ADMIN: 2, Access.OPERATOR: 1}


def caller(role: Role = Role.MEMBER, models: tuple[str, ...] | None = None) -> Principal:
    return Principal("acme", "acme", "default", 1, "ci", role, models)


@pytest.mark.parametrize("access", Access)
def test_each_access_is_for_a_role_and_those_above_it(access: Access) -> None:
    assert [role for role in RANKED if access.allows(role)] == RANKED[: N_ALLOWED[access]]


def test_who_is_refused_is_told_both_roles() -> None:
    check_access(caller(Role.ADMIN), Access.ADMIN)
    with pytest.raises(ApiError, match="role admin or above; this key's role is member") as caught:
        check_access(caller(Role.MEMBER), Access.ADMIN)
    assert caught.value.kind is ErrorKind.PERMISSION_DENIED


def test_a_key_without_a_list_may_use_every_model() -> None:
    assert allowed(caller(), "small")
    assert allowed_names(caller(), ("small", "alias")) == ("small", "alias")


def test_a_list_counts_by_the_name_that_is_asked_for() -> None:
    listed = caller(models=("alias", "other"))
    check_allowed(listed, "alias")
    assert allowed_names(listed, ("small", "alias")) == ("alias",)
    with pytest.raises(ApiError, match="may not use model 'small'; it may use: alias, other") as caught:
        check_allowed(listed, "small")
    assert (caught.value.kind, caught.value.param) == (ErrorKind.PERMISSION_DENIED, "model")
