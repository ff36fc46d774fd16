"""A month of an organisation as one HTML page that needs nothing else: no script, no font, no link."""

from datetime import UTC, datetime
from decimal import Decimal

from jinja2 import Environment, StrictUndefined
from msgspec import Struct

from keepwarm.billing.report import DAY_S, By, UsageLine, UsageQuery, UsageReport, begin_of, month_days
from keepwarm.billing.sheet import decimal_text
from keepwarm.core.errors import ApiError, ErrorKind

PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ organisation }}, {{ month }}</title>
<style>
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 52rem; margin: 2rem auto; padding: 0 1rem; color: #111; }
table { border-collapse: collapse; width: 100%; margin: 1rem 0 2rem; }
th, td { text-align: left; padding: .25rem .5rem; border-bottom: 1px solid #ccc; }
.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
tfoot td { font-weight: 600; }
</style>
</head>
<body>
<h1>{{ organisation }}</h1>
<p>Use from {{ first_day }} to {{ last_day }} (UTC). Made {{ made_at }}.\
{% if is_running %} The month is not over: this is what it has come to so far.{% endif %}</p>
{% if not bills and not unpriced %}<p>Nothing was used.</p>
{% endif %}
{% for bill in bills %}
<h2>{{ bill.currency }}</h2>
<table>
<thead><tr><th>model</th><th>price sheet</th><th>what</th><th class="n">quantity</th>\
<th class="n">{{ bill.currency }}</th></tr></thead>
<tbody>
{% for item in bill.items %}<tr><td>{{ item.model }}</td><td>{{ item.sheet }}</td><td>{{ item.what }}</td>\
<td class="n">{{ item.quantity }}</td><td class="n">{{ item.amount }}</td></tr>
{% endfor %}</tbody>
<tfoot>
{% for label, amount in bill.sums %}<tr><td colspan="4">{{ label }}</td><td class="n">{{ amount }}</td></tr>
{% endfor %}</tfoot>
</table>
<p>The same use without caching: {{ bill.uncached }} {{ bill.currency }}. Caching \
{% if bill.has_saved %}saved{% else %}cost{% endif %} {{ bill.saved }} {{ bill.currency }}.</p>
{% endfor %}
{% if unpriced %}
<h2>Without prices</h2>
<p>These models had no prices; their use is not in the amounts above.</p>
<table>
<thead><tr><th>model</th><th>what</th><th class="n">quantity</th></tr></thead>
<tbody>
{% for item in unpriced %}<tr><td>{{ item.model }}</td><td>{{ item.what }}</td><td class="n">{{ item.quantity }}</td></tr>
{% endfor %}</tbody>
</table>
{% endif %}
</body>
</html>
"""

_CLASSES = (  # what it is called, the amount's name and the quantity's
    ("input", "fresh", "n_fresh"),
    ("read from the cache", "read", "n_read"),
    ("written to the cache", "write", "n_write"),
    ("output", "output", "n_output"),
    ("calls that read a cache object", "call", None),
    ("cache objects made", "creation", "n_object_tokens"),
    ("cache objects kept", "storage", "storage_token_s"),
)


class Item(Struct, frozen=True):
    """A row of the page. `amount` is absent without prices."""

    model: str
    sheet: str
    what: str
    quantity: str
    amount: str | None


class Bill(Struct, frozen=True):
    """What is owed in one currency; amounts as text. `saved` has no sign."""

    currency: str
    items: tuple[Item, ...]
    sums: tuple[tuple[str, str], ...]
    uncached: str
    saved: str
    has_saved: bool


def invoice_query(organisation: str, month: str) -> UsageQuery:
    """The report that an invoice for "2026-11" is made of. Raises ApiError(INVALID_REQUEST)."""
    try:
        first_day, last_day = month_days(month)
    except (ValueError, OverflowError) as exc:
        message = f"month: {month[:40]!r} is not a month such as '2026-11'"
        raise ApiError(ErrorKind.INVALID_REQUEST, message, param="month") from exc
    return UsageQuery((By.MODEL, By.SHEET), first_day, last_day, organisation)


def invoice(report: UsageReport, now: float) -> str:
    """The page of a report that `invoice_query` asked for, as of `now`."""
    query = report.query
    first_day, last_day = query.first_day, query.last_day
    assert first_day is not None and last_day is not None and query.by == (By.MODEL, By.SHEET)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    return environment.from_string(PAGE).render(
        organisation=query.organisation,
        month=first_day.isoformat()[:7],
        first_day=first_day,
        last_day=last_day,
        made_at=datetime.fromtimestamp(now, UTC).strftime("%Y-%m-%d %H:%M UTC"),
        is_running=now < begin_of(last_day) + DAY_S,
        bills=[_bill(total, report.lines) for total in report.totals if total.money is not None],
        unpriced=[item for line in report.lines if line.money is None for item in _items(line)],
    )


def _bill(total: UsageLine, lines: tuple[UsageLine, ...]) -> Bill:
    money = total.money
    assert money is not None and total.currency is not None
    sums = [("Total of the lines", money.cost)]
    if money.repeated:
        sums.append(("Paid already by an earlier attempt of the same request", money.repeated))
        sums.append(("Charged", money.charged))
    sums += [("Paid from vouchers", money.from_vouchers), ("Paid from cash", money.from_cash)]
    return Bill(
        total.currency,
        tuple(item for line in lines if line.currency == total.currency for item in _items(line)),
        tuple((label, decimal_text(nano)) for label, nano in sums),
        decimal_text(money.uncached),
        decimal_text(abs(money.saved)),
        money.saved >= 0,
    )


def _items(line: UsageLine) -> list[Item]:
    """Classes that were used. A line of one currency and sheet; a class used at no price costs "0"."""
    model, sheet = (str(line.of[by]) if line.of[by] is not None else "" for by in (By.MODEL, By.SHEET))
    items = []
    for what, name, quantity in _CLASSES:
        nano = None if line.money is None else getattr(line.money, name)
        n_used = 0 if quantity is None else getattr(line.use, quantity)
        if not n_used and not nano:
            continue
        if quantity is None:
            shown = ""
        else:
            shown = _token_hours(n_used) if name == "storage" else f"{n_used:,} tokens"
        items.append(Item(model, sheet, what, shown, None if nano is None else decimal_text(nano)))
    return items


def _token_hours(token_s: int) -> str:
    """To three decimals; the exact number, token-seconds, is in the report."""
    return f"{Decimal(token_s) / 3600:,.3f} token-hours"
