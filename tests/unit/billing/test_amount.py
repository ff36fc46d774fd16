import pytest

from keepwarm.billing.amount import checked_currency, nano_of
from keepwarm.billing.sheet import decimal_text
from keepwarm.core.errors import ApiError


@pytest.mark.parametrize(
    "text, nano",
    [("1", 10**9), ("12.50", 12_500_000_000), ("-0.000000001", -1), ("0", 0), ("999999999.999999999", 10**18 - 1)],
)
def test_a_decimal_is_nano(text: str, nano: int) -> None:
    assert nano_of(text) == nano
    assert nano_of(decimal_text(nano)) == nano


@pytest.mark.parametrize("text", ["", "1e3", "1.", ".5", "1.0000000001", "1234567890", "+1", "nan", " 1", "1,000", "١"])
def test_what_is_no_amount_is_refused(text: str) -> None:
    with pytest.raises(ApiError, match="is not an amount"):
        nano_of(text)


@pytest.mark.parametrize("text", ["usd", "US", "EURO", "U5D", ""])
def test_a_currency_is_three_capital_letters(text: str) -> None:
    assert checked_currency("USD") == "USD"
    with pytest.raises(ApiError, match="three capital letters"):
        checked_currency(text)
