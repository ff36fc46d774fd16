import asyncio
import re
from pathlib import Path

import pytest
import sqlalchemy as sa

from keepwarm.billing.invoice import invoice, invoice_query
from keepwarm.billing.report import usage
from keepwarm.core.errors import ApiError
from keepwarm.storage import Storage
from keepwarm.tables import ledger_rows
from tests import used
from tests.world import FakeClock

AFTER = 1_800_000_000.0


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return used.make(tmp_path, FakeClock())


def page(storage: Storage, organisation: str = "acme", month: str = "2023-11", now: float = AFTER) -> str:
    query = invoice_query(organisation, month)
    return invoice(asyncio.run(usage(storage, query)), now)


def cells(text: str) -> list[list[str]]:
    return [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", text, re.DOTALL)]


def test_lines_have_class_quantity_and_amount(storage: Storage) -> None:
    text = page(storage)
    storage.close()
    found = cells(text)
    sheet = "kimi@2024-07-01"
    assert ["m", sheet, "cache objects made", "100,000 tokens", "2.4"] in found
    assert ["m", sheet, "cache objects kept", "6,388.889 token-hours", "4"] in found
    assert ["m", sheet, "calls that read a cache object", "", "0.02"] in found
    assert ["m", "house@1", "written to the cache", "900 tokens", "0.00405"] in found
    assert ["Paid already by an earlier attempt of the same request", "-0.108012"] in found
    assert ["m", "output", "10 tokens"] in found  # without prices, without an amount
    assert "The month is not over" not in text


def test_amounts_of_lines_add_up_to_the_total(storage: Storage) -> None:
    text = page(storage)
    storage.close()
    for part in text.split("<h2>")[1:-1]:
        amounts = [round(float(row[4]) * 10**9) for row in cells(part) if len(row) == 5]
        [total] = [round(float(row[1]) * 10**9) for row in cells(part) if row and row[0] == "Total of the lines"]
        assert sum(amounts) == total
        assert amounts


def test_a_running_month_says_so_and_an_empty_one_too(storage: Storage) -> None:
    assert "The month is not over" in page(storage, now=1_700_000_000.0)
    assert "Nothing was used." in page(storage, month="2023-10")
    storage.close()


def test_names_are_escaped_and_the_page_needs_nothing_else(storage: Storage) -> None:
    rename = sa.update(ledger_rows).values(model="<script>alert(1)</script>", organisation="<b>&acme")
    storage.run_sync(lambda connection: connection.execute(rename))
    text = page(storage, organisation="<b>&acme")
    storage.close()
    assert "<script" not in text
    assert "<b>" not in text
    assert "&lt;b&gt;&amp;acme" in text
    assert not re.search(r"(src|href|url|@import)\s*[=(]", text)


@pytest.mark.parametrize("month", ["2026", "2026-13", "november", ""])
def test_what_is_no_month_is_refused(month: str) -> None:
    with pytest.raises(ApiError, match="is not a month"):
        invoice_query("acme", month)
