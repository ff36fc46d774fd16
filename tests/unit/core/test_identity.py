from hypothesis import given
from hypothesis import strategies as st

from keepwarm.core.identity import NAME, CacheScope, organisation_of, tenant_of

names = st.from_regex(NAME, fullmatch=True)
scopes: st.SearchStrategy[CacheScope] = st.sampled_from(("organisation", "project"))


@given(organisation=names, project=names, scope=scopes)
def test_a_namespace_tells_its_organisation(organisation: str, project: str, scope: CacheScope) -> None:
    assert organisation_of(tenant_of(organisation, project, scope)) == organisation
