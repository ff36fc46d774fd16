from fractions import Fraction
from pathlib import Path

import pytest

from keepwarm.billing.sheet import ModelPrices, ObjectRates, PriceSheet, Rates, StorageRate, decimal_text
from keepwarm.billing.sheet_file import SheetError, drafted, drafts_in, priced_sheets

HEAD = 'name = "house"\nversion = "1"\ncurrency = "EUR"\neffective_from = 2026-02-01\nsource = "ours"\n'
MODEL = '[models.m]\ninput = "2"\noutput = "8"\nread = "0.5"\n'
TERMS_OF_OTHERS = """
name = "vendor"
version = "7"
currency = "USD"
effective_from = 2026-01-01
source = "theirs"
[terms.multiples]
read = "0.1x"
write = "1.25x"
write_long = "2x"
[terms.amounts]
input = "1"
read = "0.1x"
[terms.amounts.objects]
storage = "4.50"
storage_per = "hour"
storage_counts = "exact"
[terms.tiered]
output = "1"
read = "1x"
tiers = [{ prompt_tokens_max = 10, input = "1" }, { input = "2" }]
"""


def sheet(text: str, *others: str) -> PriceSheet:
    sheets = priced_sheets([drafted(text, "house.toml"), *(drafted(other, "vendor.toml") for other in others)])
    [found] = [each for each in sheets if each.name == "house"]
    return found


def model(text: str, *others: str) -> ModelPrices:
    return sheet(HEAD + text, *others).models["m"]


def refused(text: str, *others: str) -> str:
    with pytest.raises(SheetError) as caught:
        sheet(text, *others)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_smallest_sheet() -> None:
    found = sheet(HEAD + MODEL)
    assert (found.id, found.currency, str(found.effective_from), found.source) == (
        "house@1",
        "EUR",
        "2026-02-01",
        "ours",
    )
    assert found.models == {"m": ModelPrices((Rates(2 * 10**9, 8 * 10**9, 5 * 10**8, 2 * 10**9, 2 * 10**9),))}


def test_everything_a_model_can_say() -> None:
    found = model(
        """
        [models.m]
        output = "8"
        read = "0.1x"
        write = "1.25x"
        batch = "0.5x"
        tiers = [
          { prompt_tokens_max = 128000, input = "2" },
          { prompt_tokens_max = 200000, input = "4", write_long = "9.5" },
          { input = "6", output = "12" },
        ]
        [models.m.objects]
        creation = "input"
        storage = "4.50"
        storage_per = "hour"
        storage_counts = "exact"
        call = "0.0015"
        read = "0"
        """
    )
    assert found == ModelPrices(
        tiers=(
            Rates(2_000_000_000, 8_000_000_000, 200_000_000, 2_500_000_000, 2_500_000_000, 128_000),
            Rates(4_000_000_000, 8_000_000_000, 400_000_000, 5_000_000_000, 9_500_000_000, 200_000),
            Rates(6_000_000_000, 12_000_000_000, 600_000_000, 7_500_000_000, 7_500_000_000),
        ),
        objects=ObjectRates(0, True, StorageRate(4_500_000_000, 3600, begun_counts=False), 1_500_000, 0),
        batch_multiple=Fraction(1, 2),
    )


def test_multiples_of_another_vendors_terms_count_in_any_currency() -> None:
    [rates] = model('[models.m]\nterms = "vendor@7/multiples"\ninput = "2"\noutput = "8"\n', TERMS_OF_OTHERS).tiers
    assert rates == Rates(2_000_000_000, 8_000_000_000, 200_000_000, 2_500_000_000, 4_000_000_000)


def test_a_models_own_prices_win_over_its_terms() -> None:
    text = '[terms.t]\ninput = "2"\noutput = "8"\nread = "0.1x"\n[terms.t.objects]\ncreation = "3"\ncall = "0.1"\n'
    found = model(text + '[models.m]\nterms = "t"\nread = "0.2x"\n[models.m.objects]\ncall = "0.2"\n')
    assert found.tiers[0].read == 400_000_000
    assert (found.objects.creation, found.objects.call_nano) == (3_000_000_000, 200_000_000)


@pytest.mark.parametrize(
    "text, message",
    [
        ("name = ", "house.toml: not valid TOML: Invalid value (at end of document)"),
        (HEAD, "house.toml: the sheet has no [models.NAME] and no [terms.NAME]"),
        (
            HEAD.replace('"EUR"', '"euro"') + MODEL,
            "house.toml: currency: 'euro' is not a code of three capital letters",
        ),
        (HEAD.replace('"ours"', '" "') + MODEL, "house.toml: source is empty"),
        (HEAD.replace('"1"', '"a/b"') + MODEL, "house.toml: version: 'a/b' is not made of letters"),
        (HEAD.replace("2026-02-01", '"soon"') + MODEL, "house.toml: effective_from: "),
        (HEAD.replace('source = "ours"\n', "") + MODEL, "house.toml: Object missing required field 'source'"),
        ("model = 1\n" + HEAD + MODEL, "house.toml: Object contains unknown field 'model'; known: name, version, "),
        (HEAD + MODEL.replace("models.m", "models.'a/b'"), "house.toml: models: 'a/b' is not made of letters"),
        (HEAD + MODEL + 'wirte = "1"\n', "house.toml: models.m: Object contains unknown field 'wirte'; known: input, "),
        (HEAD + MODEL.replace('"2"', "2.5"), "house.toml: models.m.input: Expected 'str | null', got 'float'; amounts"),
        (HEAD + MODEL.replace('"2"', "2"), "house.toml: models.m.input: Expected 'str | null', got 'int'; amounts"),
        (HEAD + MODEL.replace('"2"', '"-2"'), "house.toml: models.m.input: '-2' is not an amount such as \"0.30\""),
        (HEAD + MODEL.replace('"2"', '"1e3"'), "house.toml: models.m.input: '1e3' is not an amount"),
        (HEAD + MODEL.replace('"2"', '"2x"'), "house.toml: models.m.input: '2x' is not an amount"),
        (HEAD + MODEL.replace('"2"', '"0.0000000001"'), "house.toml: models.m.input: '0.0000000001' is not an amount"),
        (
            HEAD + MODEL.replace('"0.5"', '"half"'),
            "'half' is not an amount such as \"0.30\" with at most nine decimals, or",
        ),
        (
            HEAD + MODEL.replace('"2"', '"0.000000001"').replace('"0.5"', '"0.5x"'),
            "house.toml: models.m.read: '0.5x' comes to 0.5 nano, not to a whole number",
        ),
        (HEAD + MODEL.replace('output = "8"\n', ""), "house.toml: models.m.output is missing"),
        (HEAD + MODEL + 'batch = "0.5"\n', "house.toml: models.m.batch: '0.5' is not a multiple such as \"0.5x\""),
        (
            HEAD + MODEL + 'terms = "vendor@7/x"\n',
            "house.toml: models.m.terms: there is no sheet 'vendor@7'; known: house@1",
        ),
        (HEAD + MODEL + 'terms = "x"\n', "house.toml: models.m.terms: sheet house@1 has no terms 'x'; it has none"),
        (HEAD + '[terms.t]\nterms = "u"\n', "house.toml: terms.t.terms: terms stand on no other terms"),
        (HEAD + '[terms.t]\nread = "a tenth"\n', "house.toml: terms.t.read: 'a tenth' is not an amount"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_its_path(text: str, message: str) -> None:
    assert message in refused(text)


@pytest.mark.parametrize(
    "tiers, message",
    [
        ("{ prompt_tokens_max = 10 }", "models.m.tiers[0].prompt_tokens_max: the last tier has no bound"),
        (
            "{ prompt_tokens_max = 10 }, { prompt_tokens_max = 5 }, {}",
            "tiers[1].prompt_tokens_max: 5 is not above the tier",
        ),
        (
            "{ prompt_tokens_max = 10 }, { prompt_tokens_max = 10 }, {}",
            "tiers[1].prompt_tokens_max: 10 is not above the",
        ),
        ("{ prompt_tokens_max = 0 }, {}", "tiers[0].prompt_tokens_max: 0 is not above the tier before it"),
        ("{}, {}", "tiers[0].prompt_tokens_max is missing; only the last tier has no bound"),
        (
            "{ prompt_tokens_min = 10 }, {}",
            "tiers[0]: Object contains unknown field 'prompt_tokens_min'; known: input, ",
        ),
        ('{ prompt_tokens_max = 10, read = "x" }, {}', "models.m.tiers[0].read: 'x' is not an amount"),
    ],
)
def test_tiers_go_from_the_shortest_prompt_to_one_without_a_bound(tiers: str, message: str) -> None:
    assert message in refused(f"{HEAD}{MODEL}tiers = [{tiers}]\n")


@pytest.mark.parametrize(
    "objects, message",
    [
        ('storage = "1"\nstorage_counts = "begun"', "storage_per: one of minute, hour is needed; it is missing"),
        (
            'storage = "1"\nstorage_per = "day"\nstorage_counts = "begun"',
            "storage_per: one of minute, hour is needed; 'day' is none of them",
        ),
        ('storage = "1"\nstorage_per = "hour"', "storage_counts: one of begun, exact is needed; it is missing"),
        ('storage_per = "hour"', "storage is missing beside storage_per and storage_counts"),
        ('storage = "1x"\nstorage_per = "hour"\nstorage_counts = "exact"', "storage: '1x' is not an amount"),
        ('call = "1x"', "call: '1x' is not an amount"),
        ('creation = "output"', "creation: 'output' is not an amount"),
        ('creating = "1"', "Object contains unknown field 'creating'; known: creation, storage, "),
    ],
)
def test_mistakes_in_what_objects_cost(objects: str, message: str) -> None:
    said = refused(f"{HEAD}{MODEL}[models.m.objects]\n{objects}\n")
    assert said.startswith("house.toml: models.m.objects")
    assert message in said


def test_a_multiple_for_objects_needs_one_input_price() -> None:
    objects = '[models.m.objects]\nread = "0.1x"\n'
    assert model(MODEL + objects).objects.read == 200_000_000
    tiers = 'tiers = [{ prompt_tokens_max = 10, input = "1" }, {}]\n'
    assert "models.m.objects.read: '0.1x' is not an amount" in refused(HEAD + MODEL + tiers + objects)


def test_amounts_of_terms_stay_in_their_currency() -> None:
    text = HEAD + '[models.m]\nterms = "vendor@7/amounts"\noutput = "8"\n'
    assert "vendor@7/amounts has amounts in USD, this sheet is in EUR" in refused(text, TERMS_OF_OTHERS)
    assert sheet(text.replace("EUR", "USD"), TERMS_OF_OTHERS).models["m"].objects.storage is not None


def test_tiers_are_given_by_a_model_or_by_its_terms() -> None:
    text = HEAD.replace("EUR", "USD") + '[models.m]\nterms = "vendor@7/tiered"\n'
    assert [tier.input for tier in sheet(text, TERMS_OF_OTHERS).models["m"].tiers] == [10**9, 2 * 10**9]
    said = refused(text + 'tiers = [{ prompt_tokens_max = 5, input = "1" }, {}]\n', TERMS_OF_OTHERS)
    assert "models.m.tiers: vendor@7/tiered has tiers too" in said


def test_one_id_and_one_day_belong_to_one_sheet() -> None:
    with pytest.raises(SheetError, match=r"^b: house@1 from 2026-02-01 is also in a as house@1$"):
        priced_sheets([drafted(HEAD + MODEL, "a"), drafted(HEAD + MODEL, "b")])
    with pytest.raises(SheetError, match=r"^b: house@2 from 2026-02-01 is also in a as house@1$"):
        priced_sheets([drafted(HEAD + MODEL, "a"), drafted(HEAD.replace('"1"', '"2"') + MODEL, "b")])


def test_a_folders_sheets_are_its_toml_files(tmp_path: Path) -> None:
    (tmp_path / "house.toml").write_text(HEAD + MODEL, encoding="utf-8")
    (tmp_path / "notes.txt").write_text("no sheet", encoding="utf-8")
    assert [(draft.where, draft.id) for draft in drafts_in(tmp_path)] == [("house.toml", "house@1")]


def test_a_folder_that_is_not_there_and_a_file_that_is_no_text_are_told(tmp_path: Path) -> None:
    with pytest.raises(SheetError, match=r"cannot read the price sheets in .*missing"):
        drafts_in(tmp_path / "missing")
    (tmp_path / "house.toml").write_bytes(b"\xff")
    with pytest.raises(SheetError, match="cannot read the price sheets in "):
        drafts_in(tmp_path)


@pytest.mark.parametrize("nano, text", [(0, "0"), (1, "0.000000001"), (1_500_000, "0.0015"), (60 * 10**9, "60")])
def test_amounts_are_shown_exactly(nano: int, text: str) -> None:
    assert decimal_text(nano) == text
