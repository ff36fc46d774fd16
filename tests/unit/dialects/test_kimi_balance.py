import json
from decimal import Decimal

import pytest

from keepwarm.dialects.kimi_balance import render_balance


def test_the_body_is_as_kimi_shows_it() -> None:
    body = render_balance(available_nano=49_588_940_000, voucher_nano=46_588_930_000, cash_nano=3_000_010_000)
    assert body == (
        b'{"code":0,"data":{"available_balance":49.58894,"voucher_balance":46.58893,"cash_balance":3.00001},'
        b'"scode":"0x0","status":true}'
    )


@pytest.mark.parametrize("nano", [0, 1, -1, -1_500_000_000, 123_456_789_012_345_678_901, 10**9, -999_999_999])
def test_amounts_are_exact_numbers_with_five_decimals_or_more(nano: int) -> None:
    body = render_balance(available_nano=nano, voucher_nano=0, cash_nano=0)
    text = body.partition(b'"available_balance":')[2].partition(b",")[0].decode()
    assert Decimal(text) * 10**9 == nano
    assert len(text.partition(".")[2]) >= 5
    assert "E" not in text
    json.loads(body)
