"""The shipped sheets: the vendors' worked examples come out to the nano."""

import re
from pathlib import Path

import pytest

from keepwarm.billing.price import creation_nano, storage_nano, turn_charge, uncached_nano
from keepwarm.billing.price_book import all_sheets, shipped_prices
from keepwarm.billing.sheet import NANO, ModelPrices
from keepwarm.billing.sheet_file import drafted, priced_sheets, shipped_drafts
from keepwarm.core.event import Usage

PAGE = Path(__file__).parents[3] / "docs" / "prices.md"
HOUSE = """
name = "house"
version = "1"
currency = "USD"
effective_from = 2026-01-01
source = "ours"
[models.anthropic]
terms = "anthropic@2026/standard"
input = "3"
output = "15"
[models.openai]
terms = "openai@2026/gpt-5.6"
input = "2"
output = "8"
[models.gemini-pro]
terms = "gemini@2026/2.5-pro"
input = "1.25"
output = "10"
"""


def house(model: str) -> ModelPrices:
    """Terms of a vendor with an input and output price of our own."""
    [sheet] = [sheet for sheet in priced_sheets((*shipped_drafts(), drafted(HOUSE, "house"))) if sheet.name == "house"]
    return sheet.models[model]


def test_which_sheets_are_shipped() -> None:
    assert {(sheet.id, sheet.currency): list(sheet.models) for sheet in all_sheets(None)} == {
        ("anthropic@2026", "USD"): [],
        ("gemini@2026", "USD"): [],
        ("kimi-international@2025", "USD"): ["moonshot-v1-8k", "moonshot-v1-32k", "moonshot-v1-128k"],
        ("kimi-k3-international@2026", "USD"): [],
        ("kimi-k3@2026", "CNY"): [],
        ("kimi@2024-07-01", "CNY"): ["moonshot-v1-8k", "moonshot-v1-32k", "moonshot-v1-128k"],
        ("kimi@2024-08-07", "CNY"): ["moonshot-v1-8k", "moonshot-v1-32k", "moonshot-v1-128k"],
        ("minimax-international@2026", "USD"): ["MiniMax-M2.1", "MiniMax-M2.5", "MiniMax-M2.7"],
        ("minimax@2026", "CNY"): ["MiniMax-M2.1", "MiniMax-M2.5", "MiniMax-M2.7", "worked-example"],
        ("openai@2026", "USD"): [],
    }


def test_the_page_names_every_shipped_sheet_with_its_models_or_terms() -> None:
    rows = {
        line.split("`")[1]: line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| `")
    }
    for draft in shipped_drafts():
        names = [name.removeprefix("moonshot-v1") for name in draft.models or draft.terms]
        row = rows[draft.id]
        assert "the same" in row or all(f"{name}`" in row for name in names), row


def test_the_pages_example_is_a_good_sheet() -> None:
    [text] = re.findall(r"^```toml\n(name = .*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    [sheet] = [sheet for sheet in priced_sheets((*shipped_drafts(), drafted(text, "house"))) if sheet.name == "house"]
    short, long = sheet.models["large"].tiers
    assert (short.input, short.output, short.write) == (600_000_000, 2_400_000_000, 750_000_000)
    assert (long.input, long.output, long.read) == (900_000_000, 3_600_000_000, 90_000_000)


def test_minimaxs_example_of_45k_read_5k_fresh_and_1k_output() -> None:
    prices = shipped_prices("minimax@2026", "worked-example")
    usage = Usage(fresh=5_000, cache_read=45_000, cache_write=0, output=1_000)
    assert turn_charge(prices, usage).total == 135_000_000  # 0.135
    assert uncached_nano(prices, usage) == 540_000_000  # 0.54


@pytest.mark.parametrize(
    "sheet, model, amounts",
    [
        ("minimax@2026", "MiniMax-M2.5", (2_100, 8_400, 210, 2_625)),
        ("minimax@2026", "MiniMax-M2.7", (2_100, 8_400, 420, 2_625)),
        ("minimax-international@2026", "MiniMax-M2.5", (300, 1_200, 30, 375)),
        ("minimax-international@2026", "MiniMax-M2.7", (300, 1_200, 60, 375)),
    ],
)
def test_minimaxs_prices_of_a_token(sheet: str, model: str, amounts: tuple[int, int, int, int]) -> None:
    [rates] = shipped_prices(sheet, model).tiers
    assert (rates.input, rates.output, rates.read, rates.write) == tuple(1_000_000 * amount for amount in amounts)
    assert rates.write * 4 == rates.input * 5  # 1.25 times, as the vendor says in words


def test_kimis_example_of_100k_tokens_ten_minutes_and_five_calls() -> None:
    prices = shipped_prices("kimi@2024-07-01", "moonshot-v1-128k")
    calls = [turn_charge(prices, Usage(0, 100_000, 0, 0), n_object=100_000).total for _ in range(5)]
    assert creation_nano(prices, 100_000) == 2_400_000_000  # ¥2.4
    assert storage_nano(prices, 100_000, 10 * 60) == 10_000_000_000  # ¥10
    assert sum(calls) == 100_000_000  # ¥0.1


def test_kimis_storage_was_halved_five_weeks_later_and_nothing_else() -> None:
    launch, later = (shipped_prices(f"kimi@{day}", "moonshot-v1-128k") for day in ("2024-07-01", "2024-08-07"))
    assert storage_nano(launch, 100_000, 600) == 2 * storage_nano(later, 100_000, 600)
    assert launch.tiers == later.tiers
    assert (launch.objects.creation, launch.objects.call_nano) == (later.objects.creation, later.objects.call_nano)


@pytest.mark.parametrize(
    "sheet, size, input_nano, output_nano",
    [
        ("kimi@2024-07-01", "8k", 12_000, 12_000),
        ("kimi@2024-07-01", "32k", 24_000, 24_000),
        ("kimi@2024-07-01", "128k", 60_000, 60_000),
        ("kimi-international@2025", "8k", 200, 2_000),
        ("kimi-international@2025", "32k", 1_000, 3_000),
        ("kimi-international@2025", "128k", 2_000, 5_000),
    ],
)
def test_kimis_ordinary_calls(sheet: str, size: str, input_nano: int, output_nano: int) -> None:
    prices = shipped_prices(sheet, f"moonshot-v1-{size}")
    charge = turn_charge(prices, Usage(5_016, 0, 0, 48))
    assert (charge.fresh, charge.output, charge.call) == (5_016 * input_nano, 48 * output_nano, 0)
    assert turn_charge(prices, Usage(16, 5_000, 0, 0)).read == 5_000 * input_nano  # reused without an object: ordinary
    assert turn_charge(prices, Usage(16, 5_000, 0, 0), n_object=5_000).read == 0


def test_kimis_international_objects() -> None:
    prices = shipped_prices("kimi-international@2025", "moonshot-v1-8k")
    assert creation_nano(prices, 1_000_000) == 1 * NANO
    assert storage_nano(prices, 1_000_000, 61) == 300_000_000
    assert turn_charge(prices, Usage(0, 10, 0, 0), n_object=10).total == 1_500_000


def test_anthropics_writes_of_both_lifetimes_and_reads() -> None:
    prices = house("anthropic")  # $3 a million, so a token is 3,000 nano
    usage = Usage(fresh=100, cache_read=10_000, cache_write=3_000, output=200, cache_write_long=1_000)
    charge = turn_charge(prices, usage)
    assert charge.write == 2_000 * 3_750 + 1_000 * 6_000  # 1.25 and 2 times
    assert charge.read == 10_000 * 300  # a tenth
    assert (charge.fresh, charge.output) == (100 * 3_000, 200 * 15_000)
    assert charge.total == 19_800_000  # $0.0198
    assert uncached_nano(prices, usage) == 13_100 * 3_000 + 200 * 15_000


def test_openais_writes_and_reads() -> None:
    charge = turn_charge(house("openai"), Usage(0, 2_000, 1_000, 0))
    assert (charge.read, charge.write) == (2_000 * 200, 1_000 * 2_500)


def test_geminis_storage_by_the_token_hour_and_reads_at_a_tenth() -> None:
    prices = house("gemini-pro")
    assert creation_nano(prices, 40_000) == 50_000_000  # 40,000 tokens as input at $1.25: $0.05
    assert storage_nano(prices, 40_000, 90 * 60) == 270_000_000  # 60,000 token-hours at $4.50: $0.27
    charge = turn_charge(prices, Usage(fresh=1_000, cache_read=40_000, cache_write=0, output=500), n_object=40_000)
    assert charge.read == 5_000_000  # 40,000 at $0.125: $0.005
    assert (charge.fresh, charge.output, charge.call) == (1_250_000, 5_000_000, 0)
    assert storage_nano(prices, 40_000, 1) == 50_000  # a second is a 3,600th of an hour, not a begun hour
