"""Amounts of money as people write them."""

import re

from keepwarm.billing.sheet import NANO
from keepwarm.core.errors import ApiError, ErrorKind

DIGITS_MAX = 9  # before the point: 10⁹ units are 10¹⁸ nano, and a sum's column ends at 9.2 × 10¹⁸

_AMOUNT = re.compile(rf"(?P<sign>-?)(?P<whole>[0-9]{{1,{DIGITS_MAX}}})(?:\.(?P<part>[0-9]{{1,9}}))?")
_CURRENCY = re.compile(r"[A-Z]{3}")


def nano_of(text: str, param: str = "amount") -> int:
    """Nano for "12.5" or "-0.01". Raises ApiError(INVALID_REQUEST) for what is no decimal, or finer than a nano."""
    found = _AMOUNT.fullmatch(text)
    if found is None:
        message = (
            f'{param}: {text[:40]!r} is not an amount such as "12.50", with at most {DIGITS_MAX} digits and 9 decimals'
        )
        raise ApiError(ErrorKind.INVALID_REQUEST, message, param=param)
    nano = int(found["whole"]) * NANO + int((found["part"] or "").ljust(9, "0"))
    return -nano if found["sign"] else nano


def checked_currency(text: str) -> str:
    """The code itself. Raises ApiError(INVALID_REQUEST)."""
    if _CURRENCY.fullmatch(text) is None:
        message = f"currency: {text[:40]!r} is not a code of three capital letters such as 'USD'"
        raise ApiError(ErrorKind.INVALID_REQUEST, message, param="currency")
    return text
