"""Bounds hold at every moment, and whatever was taken comes back."""

from contextlib import ExitStack

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from keepwarm.core.errors import ApiError, ErrorKind
from keepwarm.gateway.admission import Admission


def test_the_turn_over_the_bound_is_refused_before_anything_is_taken() -> None:
    admission = Admission(turns_max=2, per_organisation_max=2)
    with admission.enter("a"), admission.enter("b"):
        with pytest.raises(ApiError) as refused, admission.enter("c"):
            pytest.fail("entered")
        assert admission.n_turns == 2
    assert refused.value.kind is ErrorKind.OVERLOADED
    assert refused.value.retry_after_s == 1
    assert "2 requests are being served, limit 2" in refused.value.message


def test_one_organisation_cannot_fill_the_server_alone() -> None:
    admission = Admission(turns_max=3, per_organisation_max=2)
    with admission.enter("a"), admission.enter("a"):
        with pytest.raises(ApiError, match="2 of your requests"), admission.enter("a"):
            pytest.fail("entered")
        with admission.enter("b"):
            admission.check_integrity()


def test_a_permit_comes_back_when_the_turn_fails() -> None:
    admission = Admission(turns_max=1, per_organisation_max=1)
    with pytest.raises(ZeroDivisionError), admission.enter("a"):
        raise ZeroDivisionError
    assert admission.n_turns == 0


def test_choices_take_a_place_each() -> None:
    admission = Admission(turns_max=4, per_organisation_max=4)
    with admission.enter("a", 3):
        with pytest.raises(ApiError), admission.enter("b", 2):
            pytest.fail("entered")
        with admission.enter("b", 1):
            assert admission.n_turns == 4


def test_more_choices_than_places_are_the_clients_error_not_a_reason_to_retry() -> None:
    with pytest.raises(ApiError) as refused, Admission(turns_max=8, per_organisation_max=3).enter("a", 4):
        pytest.fail("entered")
    assert refused.value.kind is ErrorKind.INVALID_REQUEST
    assert refused.value.param == "n"


@given(turns_max=st.integers(1, 5), per_organisation_max=st.integers(1, 9))
def test_the_organisations_bound_is_never_above_the_whole(turns_max: int, per_organisation_max: int) -> None:
    assert Admission(turns_max, per_organisation_max).per_organisation_max <= turns_max


class Arrivals(RuleBasedStateMachine):
    """Admission against a plain list of who is inside."""

    permits = Bundle("permits")

    def __init__(self) -> None:
        super().__init__()
        self.admission = Admission(turns_max=7, per_organisation_max=4)
        self.inside: list[tuple[str, int]] = []

    @rule(target=permits, organisation=st.sampled_from("abc"), n=st.integers(1, 4))
    def enter(self, organisation: str, n: int) -> tuple[ExitStack, tuple[str, int]] | None:
        total = sum(held for _, held in self.inside)
        own = sum(held for who, held in self.inside if who == organisation)
        stack = ExitStack()
        fits = total + n <= 7 and own + n <= 4
        try:
            stack.enter_context(self.admission.enter(organisation, n))
        except ApiError:
            assert not fits
            return None
        assert fits
        self.inside.append((organisation, n))
        return stack, (organisation, n)

    @rule(permit=consumes(permits))
    def leave(self, permit: tuple[ExitStack, tuple[str, int]] | None) -> None:
        if permit is not None:
            permit[0].close()
            self.inside.remove(permit[1])

    @invariant()
    def counts_agree(self) -> None:
        self.admission.check_integrity()
        assert self.admission.n_turns == sum(held for _, held in self.inside)


TestArrivals = Arrivals.TestCase
