"""The calls under /admin on money: usage, invoices, balances, budgets, credit.

Each is of one organisation: the caller's own, or for an operator the one that the query names. An operator's usage is of
all when it names none. Amounts are decimals as text, exact to the nano.
"""

import asyncio
from datetime import date
from typing import Annotated, Literal

import msgspec
from blake3 import blake3
from msgspec import Meta, Struct

from keepwarm.billing.amount import checked_currency, nano_of
from keepwarm.billing.budget import Budget, BudgetState, Period, Scope
from keepwarm.billing.invoice import invoice, invoice_query
from keepwarm.billing.ledger import Balance, Ledger
from keepwarm.billing.report import By, UsageQuery, UsageReport, usage
from keepwarm.billing.report_text import UsageReply, usage_csv, usage_reply
from keepwarm.billing.sheet import decimal_text
from keepwarm.core.clock import Clock
from keepwarm.core.errors import ApiError, ErrorKind
from keepwarm.core.identity import KEY_ID_MAX, key_id_of
from keepwarm.core.principal import Access, Role, check_sees
from keepwarm.dialects.body import JsonBody
from keepwarm.dialects.kimi_balance import BalanceReply, render_balance
from keepwarm.dialects.openai_error import ErrorBody
from keepwarm.dialects.openapi import Param, Route
from keepwarm.gateway.identities import Identities
from keepwarm.server.endpoints import Entry, fields_of, repeat_of
from keepwarm.server.exchange import Exchange
from keepwarm.storage import Storage

TAG = "money"
NOTE_CHARS_MAX = 1000
ONCE_BYTES = 16  # of the digest that names a grant
ALONE = (  # what a browser may do with a page about money: show it, as what it says it is
    ("cache-control", "no-store"),
    ("content-security-policy", "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'"),
    ("x-content-type-options", "nosniff"),
)
REPORTS_MAX = 8  # usage and invoices being made or waiting
RETRY_AFTER_S = 1
ORG = Param("organisation", "whose; by default the key's own, and only an operator may name another")
USAGE_PARAMS = (
    Param("by", "what lines are told apart by, with commas: day, organisation, project, key, model, dialect, sheet"),
    Param("from", "first day, 2026-11-01, in UTC"),
    Param("to", "last day"),
    ORG,
    Param("project", "only this one's"),
    Param("key", "only the one's with this id", int),
    Param("model", "only this one's"),
    Param("dialect", "only this one's"),
    Param("format", "json or csv, json by default"),
)


class BalanceItem(Struct, frozen=True):
    """What there is in one currency; available is cash and vouchers less what open requests hold."""

    currency: str
    available: str
    cash: str
    voucher: str
    held: str


class BalanceList(Struct, frozen=True):
    """By currency; empty where there has been neither credit nor use with prices."""

    organisation: str
    data: list[BalanceItem]


class BudgetText(Struct, frozen=True, forbid_unknown_fields=True):
    """A budget of an organisation, or of one of its projects or keys. One of the limits is needed."""

    currency: str
    period: Literal["day", "month", "total"]
    organisation: str | None = None  # null: the key's own
    project: str | None = None
    key: Annotated[int, Meta(ge=1, le=KEY_ID_MAX)] | None = None
    soft: str | None = None
    hard: str | None = None


class BudgetItem(Struct, frozen=True):
    """A budget and how it stands in its current period."""

    organisation: str
    project: str | None
    key: int | None
    currency: str
    period: str
    period_start: int
    soft: str | None
    hard: str | None
    spent: str
    held: str


class BudgetList(Struct, frozen=True):
    """All of an organisation."""

    organisation: str
    data: list[BudgetItem]


class NewGrant(Struct, frozen=True, forbid_unknown_fields=True):
    """Credit: cash, or a voucher, which may end at `expires_at`, unix seconds."""

    organisation: str
    currency: str
    amount: str
    kind: Literal["cash", "voucher"] = "cash"
    expires_at: int | None = None
    note: Annotated[str, Meta(max_length=NOTE_CHARS_MAX)] | None = None


class BillingCalls:
    """Usage, invoices, balances, budgets, credit."""

    def __init__(self, storage: Storage, ledger: Ledger, identities: Identities, clock: Clock) -> None:
        self._storage = storage
        self._ledger = ledger
        self._identities = identities
        self._clock = clock
        self._encoder = msgspec.json.Encoder()
        self._budget = JsonBody(BudgetText)
        self._grant = JsonBody(NewGrant)
        self._reading = asyncio.Semaphore(1)  # reports: the database's thread is the turns'
        self._n_reports = 0

    async def usage(self, exchange: Exchange) -> None:
        """GET /admin/usage."""
        given = fields_of(exchange, {param.name for param in USAGE_PARAMS})
        is_all = exchange.principal.is_operator and "organisation" not in given
        asked = UsageQuery(
            by=_parts(given.get("by", "model")),
            first_day=_day(given, "from"),
            last_day=_day(given, "to"),
            organisation=None if is_all else _organisation(exchange, given.get("organisation")),
            project=given.get("project"),
            key_id=_key_id(given["key"]) if "key" in given else None,
            model=given.get("model"),
            dialect=given.get("dialect"),
        )
        output = given.get("format", "json")
        if output not in ("json", "csv"):
            raise _wrong("format", f"{output[:40]!r} is neither json nor csv")
        report = await self._report(asked)
        if output == "csv":
            await exchange.reply(usage_csv(report).encode(), content_type="text/csv; charset=utf-8", headers=ALONE)
        else:
            await exchange.reply(self._encoder.encode(usage_reply(report)))

    async def invoice(self, exchange: Exchange) -> None:
        """GET /admin/invoice."""
        given = fields_of(exchange, {"organisation", "month"})
        if "month" not in given:
            raise _wrong("month", "is required, such as 2026-11")
        asked = invoice_query(_organisation(exchange, given.get("organisation")), given["month"])
        page = invoice(await self._report(asked), self._clock.now())
        await exchange.reply(page.encode(), content_type="text/html; charset=utf-8", headers=ALONE)

    async def balance(self, exchange: Exchange) -> None:
        """GET /admin/balance."""
        org = _organisation(exchange, fields_of(exchange, {"organisation"}).get("organisation"))
        await self._identities.organisation(org)
        await self._reply_balance(exchange, org)

    async def budgets(self, exchange: Exchange) -> None:
        """GET /admin/budgets."""
        org = _organisation(exchange, fields_of(exchange, {"organisation"}).get("organisation"))
        await self._identities.organisation(org)
        await self._reply_budgets(exchange, org)

    async def set_budget(self, exchange: Exchange) -> None:
        """PUT /admin/budgets."""
        budget = self._parsed(exchange, self._budget.decode(await exchange.body()))
        await self._check_scope(exchange, budget.scope)
        await self._ledger.set_budget(budget)
        await self._reply_budgets(exchange, budget.scope.organisation)

    async def remove_budget(self, exchange: Exchange) -> None:
        """DELETE /admin/budgets."""
        given = fields_of(exchange, {"organisation", "project", "key", "currency", "period"})
        for name in ("currency", "period"):
            if name not in given:
                raise _wrong(name, "is required")
        if given["period"] not in [period.value for period in Period]:
            raise _wrong("period", "is one of day, month and total")
        key_id = _key_id(given["key"]) if "key" in given else None
        scope = _scope(_organisation(exchange, given.get("organisation")), given.get("project"), key_id)
        await self._check_scope(exchange, scope)
        budget = Budget(scope, checked_currency(given["currency"]), Period(given["period"]))
        if not await self._ledger.remove_budget(budget):
            message = f"there is no budget {scope.text} in {budget.currency} for the period {budget.period.value}"
            raise ApiError(ErrorKind.UNKNOWN_ROUTE, message)
        await self._reply_budgets(exchange, scope.organisation)

    async def grant(self, exchange: Exchange) -> None:
        """POST /admin/grants. One that is sent again with its Idempotency-Key and body is the same one."""
        new = self._grant.decode(await exchange.body())
        org, currency, amount = new.organisation, checked_currency(new.currency), nano_of(new.amount)
        await self._identities.organisation(org)
        sent = repeat_of(exchange)
        once = None if sent is None else blake3(sent.key_digest + sent.body_digest).hexdigest(ONCE_BYTES)
        if new.kind == "voucher":
            await self._ledger.grant_voucher(org, currency, amount, new.expires_at, new.note, once=once)
        elif new.expires_at is not None:
            raise _wrong("expires_at", "cash does not expire; give it with a voucher")
        else:
            await self._ledger.grant(org, currency, amount, new.note, once=once)
        await self._reply_balance(exchange, org)

    async def kimi_balance(self, exchange: Exchange) -> None:
        """GET /users/me/balance: of the currency that has most available, since Kimi's reply names none."""
        found = await self._ledger.balance(exchange.principal.organisation)
        best = max(found, key=lambda one: one.available_nano, default=Balance("", 0, 0, 0))
        body = render_balance(
            available_nano=best.available_nano, voucher_nano=best.voucher_nano, cash_nano=best.cash_nano
        )
        await exchange.reply(body)

    async def _report(self, asked: UsageQuery) -> UsageReport:
        """One after another. Raises ApiError(OVERLOADED) when some wait already."""
        if self._n_reports >= REPORTS_MAX:
            message = f"{self._n_reports} reports are being made, limit {REPORTS_MAX}; try again shortly"
            raise ApiError(ErrorKind.OVERLOADED, message, retry_after_s=RETRY_AFTER_S)
        self._n_reports += 1
        try:
            async with self._reading:
                return await usage(self._storage, asked)
        finally:
            self._n_reports -= 1

    def _parsed(self, exchange: Exchange, text: BudgetText) -> Budget:
        return Budget(
            _scope(_organisation(exchange, text.organisation), text.project, text.key),
            checked_currency(text.currency),
            Period(text.period),
            None if text.soft is None else nano_of(text.soft, "soft"),
            None if text.hard is None else nano_of(text.hard, "hard"),
        )

    async def _check_scope(self, exchange: Exchange, scope: Scope) -> None:
        """Whether the caller may change budgets of it.

        Raises ApiError: UNKNOWN_ROUTE for an organisation, project or key that is not there, PERMISSION_DENIED for an
        admin where it is the operator's to say: of the whole organisation, and of an operator's key.
        """
        is_operator = exchange.principal.is_operator
        await self._identities.organisation(scope.organisation)
        if scope.project is not None:
            await self._identities.project(scope.organisation, scope.project)
        elif scope.key_id is not None:
            key = await self._identities.key(scope.organisation, scope.key_id)
            if key.role is Role.OPERATOR and not is_operator:
                raise ApiError(ErrorKind.PERMISSION_DENIED, "budgets of an operator's key are set by operators only")
        elif not is_operator:
            message = (
                "an organisation's budget is set by whoever runs the server; an admin sets its projects' and keys'"
            )
            raise ApiError(ErrorKind.PERMISSION_DENIED, message)

    async def _reply_balance(self, exchange: Exchange, org: str) -> None:
        found = [
            BalanceItem(
                one.currency, *map(decimal_text, (one.available_nano, one.cash_nano, one.voucher_nano, one.held_nano))
            )
            for one in await self._ledger.balance(org)
        ]
        await exchange.reply(self._encoder.encode(BalanceList(org, found)))

    async def _reply_budgets(self, exchange: Exchange, org: str) -> None:
        found = [_item(state) for state in await self._ledger.budgets(org)]
        await exchange.reply(self._encoder.encode(BudgetList(org, found)))


def billing_entries(storage: Storage, ledger: Ledger, identities: Identities, clock: Clock) -> list[Entry]:
    """At the root."""
    calls = BillingCalls(storage, ledger, identities, clock)
    of_budget = (ORG, Param("project", "of this project"), Param("key", "of the key with this id", int))
    removed = (*of_budget, Param("currency", "such as USD"), Param("period", "day, month or total"))
    read, admin, operator = Access.READ, Access.ADMIN, Access.OPERATOR
    table: list[Entry] = [
        (
            Route("GET", "/admin/usage", read, "What was used and cost", response=UsageReply, params=USAGE_PARAMS),
            calls.usage,
        ),
        (
            Route(
                "GET", "/admin/invoice", admin, "A month as an HTML page",
                params=(ORG, Param("month", "such as 2026-11, in UTC")),
            ),
            calls.invoice,
        ),
        (Route("GET", "/admin/balance", read, "What there is", response=BalanceList, params=(ORG,)), calls.balance),
        (
            Route("GET", "/admin/budgets", read, "Budgets, as they stand", response=BudgetList, params=(ORG,)),
            calls.budgets,
        ),
        (
            Route("PUT", "/admin/budgets", admin, "Set or change one", request=BudgetText, response=BudgetList),
            calls.set_budget,
        ),
        (
            Route("DELETE", "/admin/budgets", admin, "Remove one", response=BudgetList, params=removed),
            calls.remove_budget,
        ),
        (
            Route("POST", "/admin/grants", operator, "Bring credit in", request=NewGrant, response=BalanceList),
            calls.grant,
        ),
    ]  # fmt: skip
    return [(route.tagged(TAG, ErrorBody), call) for route, call in table]


def kimi_balance_entries(storage: Storage, ledger: Ledger, identities: Identities, clock: Clock) -> list[Entry]:
    """Below Kimi's mounts."""
    calls = BillingCalls(storage, ledger, identities, clock)
    route = Route("GET", "/users/me/balance", Access.READ, "What the organisation has", response=BalanceReply)
    return [(route.tagged(TAG, ErrorBody), calls.kimi_balance)]


def _organisation(exchange: Exchange, named: str | None) -> str:
    """Raises ApiError(UNKNOWN_ROUTE) when it is not the caller's, who is no operator."""
    org = named or exchange.principal.organisation
    check_sees(exchange.principal, org)
    return org


def _parts(text: str) -> tuple[By, ...]:
    known = {by.value: by for by in By}
    names = [name for name in text.split(",") if name]
    for name in names:
        if name not in known:
            raise _wrong("by", f"{name[:40]!r} is none of {', '.join(known)}")
    return tuple(dict.fromkeys(known[name] for name in names))


def _day(given: dict[str, str], name: str) -> date | None:
    if name not in given:
        return None
    try:
        return date.fromisoformat(given[name])
    except ValueError as exc:
        raise _wrong(name, f"{given[name][:40]!r} is not a day such as 2026-11-01") from exc


def _key_id(text: str) -> int:
    found = key_id_of(text)
    if found is None:
        raise _wrong("key", f"{text[:40]!r} is no key's id; those are numbers")
    return found


def _scope(org: str, project: str | None, key_id: int | None) -> Scope:
    if project is not None and key_id is not None:
        raise _wrong("key", "give a project or a key, not both")
    return Scope(org, project, key_id)


def _item(state: BudgetState) -> BudgetItem:
    budget = state.budget
    return BudgetItem(
        budget.scope.organisation,
        budget.scope.project,
        budget.scope.key_id,
        budget.currency,
        budget.period.value,
        state.period_start,
        None if budget.soft_nano is None else decimal_text(budget.soft_nano),
        None if budget.hard_nano is None else decimal_text(budget.hard_nano),
        decimal_text(state.spent_nano),
        decimal_text(state.held_nano),
    )


def _wrong(param: str, problem: str) -> ApiError:
    return ApiError(ErrorKind.INVALID_REQUEST, f"{param}: {problem}", param=param)
