from datetime import UTC, date, datetime
from pathlib import Path

import pytest

from keepwarm.billing.price_book import NoSuchPricesError, PriceBook, effective, load_price_book, shipped_prices
from keepwarm.billing.row import Priced
from keepwarm.billing.sheet import ModelPrices, PriceSheet, Rates
from keepwarm.billing.sheet_file import SheetError
from keepwarm.config import BillingConfig, ConfigError, ModelConfig


def priced_at(amount: int) -> ModelPrices:
    return ModelPrices((Rates(amount, amount, amount, amount, amount),))


def at(day: str) -> float:
    return datetime.fromisoformat(day).replace(tzinfo=UTC).timestamp()


OLD = PriceSheet("s", "old", "EUR", date(2026, 1, 1), "ours", {"m": priced_at(1), "gone": priced_at(1)})
NEW = PriceSheet("s", "new", "EUR", date(2026, 3, 1), "ours", {"m": priced_at(2)})
MODEL = ModelConfig(name="local", aliases=("moonshot-v1-8k", "moonshot-v1-32k"))
JUNE = at("2026-06-01")


def test_the_newest_effective_version_counts_from_midnight_utc_on() -> None:
    book = PriceBook([NEW, OLD], {"a": "s/m"}, at("2026-02-01"))
    assert book.priced("a", at("2026-02-28T23:59:59")) == (Priced("s@old", "m", "EUR"), priced_at(1))
    assert book.priced("a", at("2026-03-01")) == (Priced("s@new", "m", "EUR"), priced_at(2))


def test_a_pinned_version_stays() -> None:
    book = PriceBook([NEW, OLD], {"a": "s@old/gone"}, JUNE)
    assert book.priced("a", JUNE) == (Priced("s@old", "gone", "EUR"), priced_at(1))


def test_a_name_without_a_sheet_has_no_price() -> None:
    assert PriceBook([OLD], {"a": "s/m"}, JUNE).priced("b", JUNE) is None


def test_before_a_sheets_first_day_there_is_no_price() -> None:
    assert PriceBook([OLD], {"a": "s/m"}, JUNE).priced("a", at("2025-12-31")) is None


def test_rows_find_the_prices_that_they_were_made_with() -> None:
    book = PriceBook([NEW, OLD], {}, JUNE)
    assert book.prices(Priced("s@old", "m", "EUR")) == priced_at(1)
    for priced in (Priced("s@older", "m", "EUR"), Priced("s@new", "gone", "EUR")):
        with pytest.raises(NoSuchPricesError, match=f"there are no prices {priced.sheet}/{priced.sheet_model}"):
            book.prices(priced)


@pytest.mark.parametrize(
    "target, day, message",
    [
        ("m", "2026-06-01", "a: 'm' is not \"SHEET/MODEL\""),
        ("t/m", "2026-06-01", "a: there is no sheet 't'; known: s"),
        ("s@older/m", "2026-06-01", "a: there is no sheet 's@older'; known: s"),
        ("s/x", "2026-06-01", "a: sheet s@new has no model 'x'; it has m"),
        ("s/gone", "2026-02-01", "a: sheet s@new has no model 'gone'; it has m"),  # it would end on the first of March
        ("s@new/gone", "2026-02-01", "a: sheet s@new has no model 'gone'; it has m"),
        ("s/m", "2025-12-31", "a: sheet 's' is effective from 2026-01-01 on; there is none for today"),
    ],
)
def test_a_mapping_that_leads_nowhere_is_refused(target: str, day: str, message: str) -> None:
    with pytest.raises(SheetError) as caught:
        PriceBook([OLD, NEW], {"a": target}, at(day))
    assert message in str(caught.value)


def test_sheets_are_told_by_name_and_day() -> None:
    other = PriceSheet("a", "1", "EUR", date(2027, 1, 1), "ours", {})
    assert PriceBook([NEW, other, OLD], {}, JUNE).sheets == (other, OLD, NEW)


def test_the_effective_version_of_none_is_none() -> None:
    assert effective([], JUNE) is None


def test_an_alias_without_a_sheet_has_the_models() -> None:
    models = {"local": "kimi/moonshot-v1-8k", "moonshot-v1-32k": "kimi@2024-07-01/moonshot-v1-32k"}
    book = load_price_book(BillingConfig(models=models), MODEL, JUNE)
    found = {name: book.priced(name, JUNE) for name in ("local", "moonshot-v1-8k", "moonshot-v1-32k", "other")}
    eight = (Priced("kimi@2024-08-07", "moonshot-v1-8k", "CNY"), shipped_prices("kimi@2024-08-07", "moonshot-v1-8k"))
    assert found["local"] == found["moonshot-v1-8k"] == eight
    assert found["moonshot-v1-32k"] is not None
    assert found["moonshot-v1-32k"][0].sheet == "kimi@2024-07-01"
    assert found["other"] is None


def test_without_a_mapping_nothing_has_a_price() -> None:
    assert load_price_book(BillingConfig(), MODEL, JUNE).priced("local", JUNE) is None


def test_own_sheets_stand_beside_the_shipped_ones_and_use_their_terms(tmp_path: Path) -> None:
    text = (
        'name = "house"\nversion = "1"\ncurrency = "EUR"\neffective_from = 2026-01-01\nsource = "ours"\n'
        '[models.m]\nterms = "anthropic@2026/standard"\ninput = "2"\noutput = "8"\n'
    )
    (tmp_path / "house.toml").write_text(text, encoding="utf-8")
    book = load_price_book(BillingConfig(str(tmp_path), {"local": "house/m"}), MODEL, JUNE)
    found = book.priced("local", JUNE)
    assert found is not None
    assert (found[0], found[1].tiers[0].write_long) == (Priced("house@1", "m", "EUR"), 4 * 10**9)


@pytest.mark.parametrize(
    "billing, message",
    [
        (
            BillingConfig(models={"x": "kimi/moonshot-v1-8k"}),
            "billing.models: 'x' is not served; the names are local, moons",
        ),
        (
            BillingConfig(models={"local": "kimi/x"}),
            "billing: local: sheet kimi@2024-08-07 has no model 'x'; it has moonshot",
        ),
        (BillingConfig(models={"local": "anthropic/standard"}), "it has none, only terms for sheets of your own"),
        (BillingConfig(sheets_dir="missing"), "billing: cannot read the price sheets in missing"),
    ],
)
def test_what_cannot_be_configured_is_told(billing: BillingConfig, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_price_book(billing, MODEL, JUNE)
    assert message in str(caught.value)
