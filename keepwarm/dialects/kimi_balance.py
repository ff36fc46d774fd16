"""Kimi's GET /users/me/balance. Amounts are JSON numbers, exact to the nano: their text has as many decimals as it takes."""

import msgspec
from msgspec import Raw, Struct


class BalanceAmounts(Struct, frozen=True):
    """Of one currency, which the reply does not name. Cash may be below 0; available is cash and vouchers less holds."""

    available_balance: float
    voucher_balance: float
    cash_balance: float


class BalanceReply(Struct, frozen=True):
    """The body: `code` 0, `scode` "0x0" and `status` true."""

    code: int
    data: BalanceAmounts
    scode: str
    status: bool


def render_balance(*, available_nano: int, voucher_nano: int, cash_nano: int) -> bytes:
    """The body for amounts in nano. Not by way of floats, which would round them."""
    data = {
        "available_balance": _number(available_nano),
        "voucher_balance": _number(voucher_nano),
        "cash_balance": _number(cash_nano),
    }
    return msgspec.json.encode({"code": 0, "data": data, "scode": "0x0", "status": True})


def _number(nano: int) -> Raw:
    """With five decimals or more, as Kimi shows them."""
    whole, part = divmod(abs(nano), 10**9)
    text = f"{whole}.{part:09d}"
    return Raw(("-" if nano < 0 else "").encode() + (text[:-4] + text[-4:].rstrip("0")).encode())
