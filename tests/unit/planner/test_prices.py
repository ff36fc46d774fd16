import pytest

from keepwarm.billing.price_book import shipped_prices
from keepwarm.billing.sheet_file import shipped_drafts
from keepwarm.planner import PlanError
from keepwarm.planner.plan import SCHEMES
from keepwarm.planner.prices import Catalogue

NOW = 1_780_000_000  # in May 2026


def test_every_scheme_has_its_prices_in_one_currency():
    catalogue = Catalogue(shipped_drafts(), NOW)
    assert {catalogue.shown(scheme.prices).currency for scheme in SCHEMES} == {"USD"}


def test_a_models_prices_are_the_sheets():
    shown = Catalogue(shipped_drafts(), NOW).shown("kimi/moonshot-v1-8k")
    assert (shown.label, shown.currency) == ("kimi@2024-08-07/moonshot-v1-8k", "CNY")
    assert shown.prices == shipped_prices("kimi@2024-08-07", "moonshot-v1-8k")


def test_terms_stand_on_the_base_models_input_and_output():
    shown = Catalogue(shipped_drafts(), NOW).shown("anthropic/standard")
    base = shipped_prices("minimax-international@2026", "MiniMax-M2.1").tiers[0]
    [rates] = shown.prices.tiers
    assert (rates.input, rates.output) == (base.input, base.output)
    assert (rates.read * 10, rates.write * 4, rates.write_long) == (base.input, base.input * 5, base.input * 2)
    assert "on minimax-international@2026/MiniMax-M2.1" in shown.label


@pytest.mark.parametrize(
    "target, words",
    [
        ("anthropic", 'are not "SHEET/MODEL"'),
        ("nobody/x", "no price sheet 'nobody'"),
        ("kimi/x", "no model and no terms 'x'"),
        ("kimi@1999/x", "no price sheet 'kimi@1999'"),
    ],
)
def test_prices_that_are_not_there_are_refused(target, words):
    with pytest.raises(PlanError, match=words):
        Catalogue(shipped_drafts(), NOW).shown(target)


def test_amounts_in_another_currency_than_the_bases_are_refused():
    with pytest.raises(PlanError, match="amounts in USD"):
        Catalogue(shipped_drafts(), NOW, base="minimax/MiniMax-M2.1").shown("gemini/2.5-flash")


def test_a_sheet_that_is_not_effective_yet_is_refused():
    with pytest.raises(PlanError, match="effective today"):
        Catalogue(shipped_drafts(), 1_720_000_000)  # in July 2024: the base's first day is in 2026
