from datetime import UTC, datetime

import pytest

from keepwarm.billing.book_rows import scope_from
from keepwarm.billing.budget import (
    Budget,
    BudgetState,
    Period,
    Scope,
    balance_refusal,
    excess,
    period_start,
    refusal,
    scopes_of,
)
from keepwarm.billing.row import Payer

NOW = datetime(2026, 3, 31, 23, 59, 59, 999_000, tzinfo=UTC).timestamp()


def state(soft: int | None, hard: int | None, *, spent: int = 60, held: int = 30) -> BudgetState:
    return BudgetState(
        Budget(Scope("acme", "web"), "CNY", Period.DAY, soft, hard), period_start(Period.DAY, NOW), spent, held
    )


def test_days_and_months_begin_at_midnight_utc() -> None:
    assert period_start(Period.DAY, NOW) == datetime(2026, 3, 31, tzinfo=UTC).timestamp()
    assert period_start(Period.DAY, NOW + 0.001) == datetime(2026, 4, 1, tzinfo=UTC).timestamp()
    assert period_start(Period.MONTH, NOW) == datetime(2026, 3, 1, tzinfo=UTC).timestamp()
    assert period_start(Period.MONTH, NOW + 0.001) == datetime(2026, 4, 1, tzinfo=UTC).timestamp()
    assert period_start(Period.TOTAL, NOW) == 0


@pytest.mark.parametrize("scope", [Scope("acme"), Scope("acme", "web"), Scope("acme", key_id=7)])
def test_a_scopes_text_says_which_it_is(scope: Scope) -> None:
    assert scope_from(scope.text, "acme") == scope
    assert scope.text in scopes_of("acme", "web", 7)


def test_a_payer_counts_for_no_scope_of_another() -> None:
    other = {Scope("acm").text, Scope("acme", "we").text, Scope("acme", key_id=8).text, Scope("acme/web").text}
    assert not other & set(scopes_of("acme", "web", 7))
    assert scopes_of("acme", None, None) == ["org:acme"]


def test_a_hard_stop_is_reached_and_not_passed() -> None:
    assert refusal(state(None, 100), 10) is None
    assert refusal(state(None, 100), 11) == (
        "the budget of project 'web' for the day 2026-03-31 (UTC) is 0.0000001 CNY: 0.00000006 CNY is spent and "
        "0.00000003 CNY is held by open requests, and this request may cost up to 0.000000011 CNY"
    )
    assert refusal(state(1, None), 10**18) is None


def test_a_soft_stop_is_told_once_it_may_be_passed() -> None:
    assert excess(state(100, None), 10) is None
    told = excess(state(100, None), 11)
    assert told is not None and told.reached_nano == 101
    assert "soft limit of 0.0000001 CNY" in told.message
    assert excess(state(None, 1), 1000) is None


def test_a_balance_covers_what_cash_and_vouchers_have_beyond_what_is_held() -> None:
    payer = Payer("acme", "web", 7)
    assert balance_refusal(payer, "CNY", (50, 60, 10), 100) is None
    message = balance_refusal(payer, "CNY", (50, 60, 10), 101)
    assert message is not None and "0.000000101 CNY" in message and "0.0000001 CNY is available" in message
