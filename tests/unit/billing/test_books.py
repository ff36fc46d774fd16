import pytest

from keepwarm.billing.act import Creation, Release, Repeat, Settlement
from keepwarm.billing.books import (
    ATTEMPTS_MAX,
    REPEAT_S,
    RETRY_AFTER_S,
    SUM_NANO_MAX,
    Account,
    Books,
    Contents,
    Voucher,
    in_order,
)
from keepwarm.billing.budget import Budget, Period, Scope, period_start
from keepwarm.billing.price import Charge
from keepwarm.billing.row import Payer, Priced, Row, RowKind, TurnUse
from keepwarm.core.errors import ApiError, ErrorKind
from keepwarm.core.event import Usage
from tests.ledgers import HOLD_S, PAYER, PRICED, hold_of, settlement_of

NOW = 1_700_000_000.0
ACME = ("acme", "CNY")
ONCE = Repeat(b"key", b"body")


def books(
    *, cash: int = 0, vouchers: tuple[Voucher, ...] = (), budgets: tuple[Budget, ...] = (), now: float = NOW
) -> Books:
    account = Account(cash, sum(one.left_nano for one in vouchers), 0)
    contents = Contents({ACME: account}, {ACME: in_order(vouchers)}, {}, {"acme": budgets}, {}, {}, {}, set())
    return Books(contents, now, HOLD_S)


def later(before: Books, seconds: float) -> Books:
    return Books(before.at, NOW + seconds, HOLD_S)


def sums(of: Books) -> tuple[int, int, int]:
    account = of.at.accounts[ACME]
    return account.cash_nano, account.voucher_nano, account.held_nano


def left(of: Books) -> dict[str, int]:
    return {one.id: one.left_nano for one in of.at.vouchers[ACME]}


def test_a_turn_holds_its_ceiling_and_pays_what_it_used() -> None:
    at = books(cash=100)
    assert at.hold(hold_of("t", 80)) == ()
    assert sums(at) == (100, 0, 80)
    at.settle(settlement_of("t", 30))
    assert sums(at) == (70, 0, 0)
    assert [(row.id, row.cash_nano, row.held_nano) for row in at.rows] == [("t/hold", 0, 80), ("t/settle", -30, -80)]


def test_every_act_is_done_once() -> None:
    at = books(cash=100)
    for _ in range(2):
        at.hold(hold_of("t", 80))
    for _ in range(2):
        at.settle(settlement_of("t", 30))
    at.hold(hold_of("t", 80))
    at.release(Release("t"))
    assert sums(at) == (70, 0, 0)
    assert [row.id for row in at.rows] == ["t/hold", "t/settle"]


def test_a_released_hold_costs_nothing_and_is_released_once() -> None:
    at = books(cash=100)
    at.hold(hold_of("t", 80))
    at.do(Release("t"))
    at.do(Release("t"))
    at.do(Release("unheard of"))
    assert sums(at) == (100, 0, 0)
    assert [row.id for row in at.rows] == ["t/hold", "t/release"]


def test_a_hold_expires_and_its_turn_is_charged_all_the_same() -> None:
    at = books(cash=100)
    at.hold(hold_of("t", 80))
    assert later(at, HOLD_S - 0.001).expire() == 0
    at = later(at, HOLD_S)
    assert at.expire() == 1
    assert at.expire() == 0
    assert sums(at) == (100, 0, 0)
    at.settle(settlement_of("t", 30))
    assert sums(at) == (70, 0, 0)
    assert [(row.id, row.held_nano) for row in at.rows] == [("t/expire", -80), ("t/settle", 0)]


def test_a_prepaid_balance_must_cover_what_is_held_and_the_turn() -> None:
    at = books(cash=60, vouchers=(Voucher("v", 40, NOW, None),))
    at.hold(hold_of("a", 70, is_prepaid=True))
    with pytest.raises(ApiError, match=r"0.000000031 CNY and 0.00000003 CNY is available") as caught:
        at.hold(hold_of("b", 31, is_prepaid=True))
    assert caught.value.kind is ErrorKind.QUOTA_EXCEEDED
    assert sums(at) == (60, 40, 70)
    at.hold(hold_of("b", 30, is_prepaid=True))
    at.hold(hold_of("c", 1000))  # one that is not prepaid
    assert sums(at) == (60, 40, 1100)


def correction(cash: int) -> Row:
    return Row(id="1/adjust", kind=RowKind.ADJUST, at=NOW, organisation="acme", currency="CNY", cash_nano=cash)


@pytest.mark.parametrize("had, comes", [(SUM_NANO_MAX, 1), (1 - SUM_NANO_MAX, -2), (-2 * SUM_NANO_MAX, -1)])
def test_credit_beyond_what_can_be_counted_is_refused(had: int, comes: int) -> None:
    at = books(cash=had)
    with pytest.raises(ApiError, match="beyond what can be counted"):
        at.credit(correction(comes))
    assert (sums(at), at.rows) == ((had, 0, 0), [])


def test_what_is_owed_beyond_it_can_be_paid_back_in_parts() -> None:
    at = books(cash=-2 * SUM_NANO_MAX)
    at.credit(correction(1))
    assert sums(at) == (1 - 2 * SUM_NANO_MAX, 0, 0)


def test_who_never_had_credit_has_none() -> None:
    with pytest.raises(ApiError, match="0 CNY is available"):
        books().hold(hold_of("t", 1, payer=Payer("new", "web", 8), is_prepaid=True))


def test_vouchers_are_used_before_cash_and_the_one_that_expires_first_before_others() -> None:
    several = (
        Voucher("forever", 10, NOW - 9, None),
        Voucher("late", 10, NOW - 9, NOW + 20),
        Voucher("young", 10, NOW - 1, NOW + 10),
        Voucher("old", 10, NOW - 2, NOW + 10),
    )
    at = books(cash=100, vouchers=several)
    at.settle(settlement_of("a", 15))
    assert left(at) == {"old": 0, "young": 5, "late": 10, "forever": 10}
    at.settle(settlement_of("b", 18))
    assert left(at) == {"old": 0, "young": 0, "late": 0, "forever": 7}
    at.settle(settlement_of("c", 9))
    assert sums(at) == (98, 0, 0)
    assert [(row.voucher_nano, row.cash_nano) for row in at.rows] == [(-15, 0), (-18, 0), (-7, -2)]


def test_a_voucher_whose_time_is_over_is_not_used() -> None:
    at = books(cash=100, vouchers=(Voucher("v", 40, NOW - 9, NOW + 10), Voucher("w", 5, NOW - 9, NOW + 11)))
    at = later(at, 10)
    at.settle(settlement_of("t", 30))
    assert sums(at) == (75, 0, 0)
    assert [(row.id, row.voucher_nano, row.cash_nano) for row in at.rows] == [
        ("v/lapse", -40, 0),
        ("t/settle", -5, -25),
    ]
    assert at.lapse() == 0


def test_a_lapsed_voucher_covers_no_prepaid_turn() -> None:
    at = later(books(vouchers=(Voucher("v", 40, NOW - 9, NOW + 10),)), 10)
    with pytest.raises(ApiError, match="0 CNY is available"):
        at.hold(hold_of("t", 1, is_prepaid=True))


def test_a_hard_budget_counts_what_is_spent_and_held_of_its_own_scope() -> None:
    at = books(budgets=(Budget(Scope("acme", "web"), "CNY", Period.DAY, hard_nano=100),))
    at.hold(hold_of("elsewhere", 90, payer=Payer("acme", "other", 8)))
    at.hold(hold_of("a", 60))
    at.settle(settlement_of("a", 50))
    at.hold(hold_of("b", 40))
    with pytest.raises(ApiError, match="project 'web'") as caught:
        at.hold(hold_of("c", 11))
    assert caught.value.kind is ErrorKind.QUOTA_EXCEEDED
    at.hold(hold_of("c", 10))


def test_a_new_day_has_its_budget_again_but_for_what_is_still_held() -> None:
    at = books(budgets=(Budget(Scope("acme"), "CNY", Period.DAY, hard_nano=100),))
    at.settle(settlement_of("a", 100))
    with pytest.raises(ApiError):
        at.hold(hold_of("b", 1))
    tomorrow = Books(at.at, period_start(Period.DAY, NOW) + 86_400, HOLD_S)
    tomorrow.hold(hold_of("b", 100))
    with pytest.raises(ApiError):
        Books(tomorrow.at, period_start(Period.DAY, NOW) + 2 * 86_400, HOLD_S).hold(hold_of("c", 1))


def test_a_budget_in_another_currency_does_not_count() -> None:
    at = books(budgets=(Budget(Scope("acme"), "USD", Period.TOTAL, hard_nano=0),))
    at.hold(hold_of("t", 100))


def test_soft_stops_are_told_and_refuse_nothing() -> None:
    soft = Budget(Scope("acme", key_id=7), "CNY", Period.MONTH, soft_nano=50)
    at = books(budgets=(soft,))
    assert at.hold(hold_of("a", 50)) == ()
    [told] = at.hold(hold_of("b", 1))
    assert (told.state.budget, told.reached_nano) == (soft, 51)


def test_use_without_prices_is_recorded_and_changes_no_sum() -> None:
    at = books(cash=100)
    use = TurnUse(Usage(1, 2, 3, 4), 0, None, None)
    at.settle(Settlement("t", PAYER, "openai", "m", "finished", None, use))
    [row] = at.rows
    assert (row.use, row.currency, row.priced) == (use, None, None)
    assert sums(at) == (100, 0, 0)


def test_a_hold_in_another_currency_is_released_by_a_row_of_its_own() -> None:
    at = books(cash=100)
    at.hold(hold_of("t", 80))
    act = settlement_of("t", 30)
    at.settle(Settlement("t", PAYER, "openai", "m", "finished", Priced("sheet@2", "m", "USD"), act.use))
    assert sums(at) == (100, 0, 0)
    assert at.at.accounts["acme", "USD"] == Account(-30, 0, 0)


def test_making_an_object_is_charged_once_and_closes_its_hold() -> None:
    at = books(cash=100)
    at.hold(hold_of("c", 80))
    act = Creation("c", PAYER, "cache-1", "kimi", "m", PRICED, 1000, Charge(creation=24))
    at.do(act)
    at.do(act)
    assert sums(at) == (76, 0, 0)
    assert [(row.id, row.object_tokens) for row in at.rows] == [("c/hold", None), ("c/creation", 1000)]


def test_storage_is_charged_from_vouchers_first_and_counts_for_budgets() -> None:
    budget = Budget(Scope("acme"), "CNY", Period.DAY, hard_nano=100)
    at = books(vouchers=(Voucher("v", 10, NOW, None),), budgets=(budget,))
    row = Row("m/1", RowKind.STORAGE, NOW, "acme", currency="CNY", charge=Charge(storage=25))
    at.store(row)
    assert sums(at) == (-15, 0, 0)
    assert at.state(budget).spent_nano == 25


def test_a_request_sent_again_pays_only_what_it_costs_more() -> None:
    at = books()
    for turn, cost, charged in (("a", 30, 30), ("b", 20, 0), ("c", 45, 15), ("d", 45, 0)):
        at.hold(hold_of(turn, 50, repeat=ONCE))
        at.settle(settlement_of(turn, cost, repeat=ONCE))
        row = at.rows[-1]
        assert -row.cash_nano == charged
        assert row.repeated_nano == (charged - cost or None)
    assert sums(at) == (-45, 0, 0)


def test_a_request_sent_again_holds_only_what_it_may_cost_more() -> None:
    at = books(cash=50)
    at.hold(hold_of("a", 50, is_prepaid=True, repeat=ONCE))
    at.settle(settlement_of("a", 45, repeat=ONCE))
    at.hold(hold_of("b", 50, is_prepaid=True, repeat=ONCE))
    assert sums(at) == (5, 0, 5)


def test_another_body_under_the_same_key_is_refused() -> None:
    at = books()
    at.hold(hold_of("a", 50, repeat=ONCE))
    at.release(Release("a"))
    with pytest.raises(ApiError, match="another request body") as caught:
        at.hold(hold_of("b", 50, repeat=Repeat(b"key", b"other")))
    assert caught.value.kind is ErrorKind.INVALID_REQUEST
    at.hold(hold_of("c", 50, payer=Payer("else", "web", 9), repeat=Repeat(b"key", b"other")))  # its own keys


def test_a_request_is_not_run_beside_itself() -> None:
    at = books()
    at.hold(hold_of("a", 50, repeat=ONCE))
    with pytest.raises(ApiError, match="still running") as caught:
        at.hold(hold_of("b", 50, repeat=ONCE))
    assert (caught.value.kind, caught.value.retry_after_s) == (ErrorKind.OVERLOADED, RETRY_AFTER_S)
    later(at, HOLD_S).hold(hold_of("b", 50, repeat=ONCE))  # nobody closed the first, and its time is over


def test_an_attempt_settled_after_its_hold_has_expired_counts_with_the_one_after_it() -> None:
    at = books()
    at.hold(hold_of("a", 50, repeat=ONCE))
    at = later(at, HOLD_S)
    at.expire()
    at.hold(hold_of("b", 50, repeat=ONCE))
    at.settle(settlement_of("a", 30, repeat=ONCE))
    with pytest.raises(ApiError, match="still running"):
        at.hold(hold_of("c", 50, repeat=ONCE))
    at.settle(settlement_of("b", 40, repeat=ONCE))
    assert sums(at) == (-40, 0, 0)


def test_a_key_has_so_many_attempts_and_is_forgotten_after_a_day() -> None:
    at = books()
    for n in range(ATTEMPTS_MAX):
        at.hold(hold_of(f"t{n}", 50, repeat=ONCE))
        at.settle(settlement_of(f"t{n}", 30, repeat=ONCE))
    with pytest.raises(ApiError, match="5 attempts, limit 5") as caught:
        at.hold(hold_of("one more", 50, repeat=ONCE))
    assert caught.value.kind is ErrorKind.INVALID_REQUEST
    with pytest.raises(ApiError):
        later(at, REPEAT_S - 0.001).hold(hold_of("one more", 50, repeat=ONCE))
    at = later(at, REPEAT_S)
    at.hold(hold_of("a new one", 50, repeat=ONCE))
    at.settle(settlement_of("a new one", 30, repeat=ONCE))
    assert sums(at) == (-60, 0, 0)


def test_a_refused_attempt_does_not_count() -> None:
    at = books(cash=10)
    for _ in range(ATTEMPTS_MAX + 1):
        with pytest.raises(ApiError, match="does not cover"):
            at.hold(hold_of("a", 50, is_prepaid=True, repeat=ONCE))
    at.hold(hold_of("a", 10, is_prepaid=True, repeat=ONCE))


def test_what_was_charged_in_another_currency_is_not_taken_off() -> None:
    at = books()
    at.settle(settlement_of("a", 30, repeat=ONCE))
    usd = Settlement("b", PAYER, "openai", "m", "finished", Priced("s@2", "m", "USD"), settlement_of("b", 20).use, ONCE)
    at.settle(usd)
    assert at.at.accounts["acme", "USD"] == Account(-20, 0, 0)


def test_attempts_without_prices_are_counted_and_cost_nothing() -> None:
    at = books()
    use = TurnUse(Usage(1, 2, 3, 4), 0, None, None)
    for turn in ("a", "b"):
        at.settle(Settlement(turn, PAYER, "openai", "m", "finished", None, use, ONCE))
    assert at.at.repeats["acme", b"key"].n_attempts == 2
    assert [row.repeated_nano for row in at.rows] == [None, None]
