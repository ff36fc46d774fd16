"""Price sheets as TOML: text gives a draft, drafts give sheets. What cannot be meant is refused with the key's path.

An amount is a decimal string of the sheet's currency per million tokens ("0.30"), or a multiple of the input price of the
same tier ("1.25x"). Both must come to a whole number of nano: nothing is rounded here, so a sheet means what it says.

    model's rates   a tier's own, else the model's, else those of the terms that it names
    terms           part of a model's prices, published without the rest: NAME@VERSION/TERMS, or TERMS of the same sheet

A sheet may have terms only: a vendor's multiples, to be used with the input price of an operator's own sheet.
"""

import re
import tomllib
from collections.abc import Iterable, Mapping
from datetime import date
from fractions import Fraction
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Any, TypeVar

import msgspec
from msgspec import Struct

from keepwarm.billing.sheet import NANO, ModelPrices, ObjectRates, PriceSheet, Rates, StorageRate

MULTIPLE_ONE = "1x"
STORAGE_UNITS_S = {"minute": 60, "hour": 3600}
STORAGE_COUNTS = ("begun", "exact")
_AMOUNT = re.compile(r"\d{1,9}(\.\d{1,9})?")  # nine decimals are a nano; nine digits keep every cost far below 2⁶³ nano
_MULTIPLE = re.compile(r"(\d{1,4}(\.\d{1,9})?)x")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_CURRENCY = re.compile(r"[A-Z]{3}")
_AT = re.compile(r" - at `\$\.?(?P<path>[^`]*)`$")
_Part = TypeVar("_Part", bound=Struct)


class SheetError(Exception):
    """A price sheet cannot be used; the message is one line with the file and the key."""


class _RatesText(Struct, frozen=True, forbid_unknown_fields=True):
    input: str | None = None
    output: str | None = None
    read: str | None = None
    write: str | None = None
    write_long: str | None = None


class _TierText(_RatesText, frozen=True, forbid_unknown_fields=True):
    prompt_tokens_max: int | None = None


class _ObjectsText(Struct, frozen=True, forbid_unknown_fields=True):
    creation: str | None = None
    storage: str | None = None
    storage_per: str | None = None
    storage_counts: str | None = None
    call: str | None = None
    read: str | None = None


class _ModelText(_RatesText, frozen=True, forbid_unknown_fields=True):
    terms: str | None = None
    batch: str | None = None
    objects: _ObjectsText = _ObjectsText()
    tiers: tuple[_TierText, ...] = ()


class _SheetText(Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    version: str
    currency: str
    effective_from: date
    source: str
    terms: dict[str, dict[str, Any]] = {}
    models: dict[str, dict[str, Any]] = {}


class Draft(Struct, frozen=True):
    """A sheet as it is written, before terms are put in. `where` names the file in messages."""

    where: str
    name: str
    version: str
    currency: str
    effective_from: date
    source: str
    terms: dict[str, _ModelText]
    models: dict[str, _ModelText]

    @property
    def id(self) -> str:
        """As PriceSheet.id."""
        return f"{self.name}@{self.version}"


def drafted(text: str, where: str) -> Draft:
    """A TOML text as a draft. Raises SheetError."""
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as exc:
        raise SheetError(f"{where}: not valid TOML: {exc}") from exc
    sheet = _part(raw, _SheetText, where, "")
    for key, value in (("name", sheet.name), ("version", sheet.version)):
        if not _NAME.fullmatch(value):
            raise SheetError(f"{where}: {key}: {value!r} is not made of letters, digits, '.', '_' and '-'")
    if not _CURRENCY.fullmatch(sheet.currency):
        raise SheetError(f"{where}: currency: {sheet.currency!r} is not a code of three capital letters such as 'USD'")
    if not sheet.source.strip():
        raise SheetError(f"{where}: source is empty; say where these prices are from")
    if not (sheet.models or sheet.terms):
        raise SheetError(f"{where}: the sheet has no [models.NAME] and no [terms.NAME]")
    return Draft(
        where=where,
        name=sheet.name,
        version=sheet.version,
        currency=sheet.currency,
        effective_from=sheet.effective_from,
        source=sheet.source,
        terms=_parts(sheet.terms, where, "terms"),
        models=_parts(sheet.models, where, "models"),
    )


def priced_sheets(drafts: Iterable[Draft]) -> tuple[PriceSheet, ...]:
    """All drafts as sheets, by id. Raises SheetError, also where two have one id or one name and day."""
    by_id: dict[str, Draft] = {}
    days: dict[tuple[str, date], Draft] = {}
    for draft in drafts:
        for other in (by_id.get(draft.id), days.get((draft.name, draft.effective_from))):
            if other is not None:
                day = draft.effective_from
                raise SheetError(f"{draft.where}: {draft.id} from {day} is also in {other.where} as {other.id}")
        by_id[draft.id] = days[draft.name, draft.effective_from] = draft
    return tuple(_sheet(by_id[id_], by_id) for id_ in sorted(by_id))


def shipped_drafts() -> tuple[Draft, ...]:
    """The sheets that come with Keepwarm."""
    return drafts_in(files("keepwarm.billing") / "sheets", "shipped ")


def drafts_in(folder: Traversable, called: str = "") -> tuple[Draft, ...]:
    """Every *.toml file of a folder, `called` this before its name in messages.

    Raises SheetError, also when the folder or a file cannot be read.
    """
    try:
        found = sorted((entry for entry in folder.iterdir() if entry.name.endswith(".toml")), key=lambda e: e.name)
        texts = [(entry.name, entry.read_text(encoding="utf-8")) for entry in found]
    except (OSError, UnicodeDecodeError) as exc:
        raise SheetError(f"cannot read the price sheets in {folder}: {exc}") from exc
    return tuple(drafted(text, f"{called}{name}") for name, text in texts)


def _sheet(draft: Draft, by_id: Mapping[str, Draft]) -> PriceSheet:
    models: dict[str, ModelPrices] = {}
    for name, model in draft.models.items():
        where = f"{draft.where}: models.{name}"
        models[name] = _model(_with_terms(model, draft, by_id, where), where)
    for name, terms in draft.terms.items():  # an input price of one unit shows whether all in them can be read
        whole = {"input": "1000", "output": "1000", "read": MULTIPLE_ONE}
        _model(_ModelText(**{**whole, **_given(terms)}), f"{draft.where}: terms.{name}")
    return PriceSheet(draft.name, draft.version, draft.currency, draft.effective_from, draft.source, models)


def _with_terms(model: _ModelText, draft: Draft, by_id: Mapping[str, Draft], where: str) -> _ModelText:
    if model.terms is None:
        return model
    sheet_id, _, name = model.terms.rpartition("/")
    of = by_id.get(sheet_id) if sheet_id else draft
    if of is None:
        raise SheetError(f"{where}.terms: there is no sheet {sheet_id!r}; known: {', '.join(sorted(by_id))}")
    terms = of.terms.get(name)
    if terms is None:
        raise SheetError(
            f"{where}.terms: sheet {of.id} has no terms {name!r}; it has {', '.join(sorted(of.terms)) or 'none'}"
        )
    if of.currency != draft.currency and any(_AMOUNT.fullmatch(text) for text in _texts(terms)):
        raise SheetError(
            f"{where}.terms: {model.terms} has amounts in {of.currency}, this sheet is in {draft.currency}"
        )
    if model.tiers and terms.tiers:
        raise SheetError(f"{where}.tiers: {model.terms} has tiers too; give them in one place")
    objects = _ObjectsText(**{**_given(terms.objects), **_given(model.objects)})
    return _ModelText(**{**_given(terms), **_given(model), "objects": objects})


def _model(model: _ModelText, where: str) -> ModelPrices:
    texts = model.tiers or (_TierText(),)
    for number, (tier, following) in enumerate(zip(texts, (*texts[1:], None), strict=True)):
        bound, at = tier.prompt_tokens_max, f"{where}.tiers[{number}].prompt_tokens_max"
        if following is None and bound is not None:
            raise SheetError(
                f"{at}: the last tier has no bound, so that every prompt has a price; this one ends at {bound:,}"
            )
        if following is not None and bound is None:
            raise SheetError(f"{at} is missing; only the last tier has no bound")
        if bound is not None and bound <= (texts[number - 1].prompt_tokens_max or 0 if number else 0):
            raise SheetError(f"{at}: {bound:,} is not above the tier before it; tiers go from the shortest prompt on")
    tiers = tuple(
        _rates(
            _TierText(**{**_rate_texts(model), **_given(tier)}), f"{where}.tiers[{number}]" if model.tiers else where
        )
        for number, tier in enumerate(texts)
    )
    batch = Fraction(1) if model.batch is None else _multiple(model.batch, f"{where}.batch")
    return ModelPrices(tiers, _objects(model.objects, tiers, f"{where}.objects"), batch)


def _rates(texts: _TierText, where: str) -> Rates:
    for key, text in (("input", texts.input), ("output", texts.output), ("read", texts.read)):
        if text is None:
            raise SheetError(f'{where}.{key} is missing; give an amount per million tokens such as "0.30"')
    base = _nano(texts.input or "", f"{where}.input", None)
    write = _nano(texts.write or MULTIPLE_ONE, f"{where}.write", base)
    return Rates(
        input=base,
        output=_nano(texts.output or "", f"{where}.output", base),
        read=_nano(texts.read or "", f"{where}.read", base),
        write=write,
        write_long=write if texts.write_long is None else _nano(texts.write_long, f"{where}.write_long", base),
        prompt_tokens_max=texts.prompt_tokens_max,
    )


def _objects(texts: _ObjectsText, tiers: tuple[Rates, ...], where: str) -> ObjectRates:
    base = tiers[0].input if len({tier.input for tier in tiers}) == 1 else None  # else a multiple would be of which?
    is_input = texts.creation == "input"
    storage = None
    if texts.storage is not None:
        unit = _one_of(texts.storage_per, tuple(STORAGE_UNITS_S), f"{where}.storage_per")
        counts = _one_of(texts.storage_counts, STORAGE_COUNTS, f"{where}.storage_counts")
        rate = _nano(texts.storage, f"{where}.storage", None)
        storage = StorageRate(rate, 60 if unit == "minute" else 3600, begun_counts=counts == "begun")
    elif texts.storage_per is not None or texts.storage_counts is not None:
        raise SheetError(f"{where}.storage is missing beside storage_per and storage_counts")
    return ObjectRates(
        creation=0 if texts.creation is None or is_input else _nano(texts.creation, f"{where}.creation", base),
        creation_is_input=is_input,
        storage=storage,
        call_nano=0 if texts.call is None else _nano(texts.call, f"{where}.call", None),
        read=None if texts.read is None else _nano(texts.read, f"{where}.read", base),
    )


def _nano(text: str, where: str, base: int | None) -> int:
    """Nano for an amount, or for a multiple of `base` (None: no multiple is allowed here)."""
    if _AMOUNT.fullmatch(text):
        exact = Fraction(text) * NANO
    elif base is not None and _MULTIPLE.fullmatch(text):
        exact = _multiple(text, where) * base
    else:
        multiple = "" if base is None else ', or a multiple of the input price such as "1.25x"'
        raise SheetError(f'{where}: {text!r} is not an amount such as "0.30" with at most nine decimals{multiple}')
    if exact.denominator != 1:
        raise SheetError(
            f"{where}: {text!r} comes to {float(exact)} nano, not to a whole number; write the amount itself"
        )
    return exact.numerator


def _multiple(text: str, where: str) -> Fraction:
    found = _MULTIPLE.fullmatch(text)
    if found is None:
        raise SheetError(f'{where}: {text!r} is not a multiple such as "0.5x"')
    return Fraction(found[1])


def _one_of(text: str | None, allowed: tuple[str, ...], where: str) -> str:
    if text not in allowed:
        given = "it is missing" if text is None else f"{text!r} is none of them"
        raise SheetError(f"{where}: one of {', '.join(allowed)} is needed; {given}")
    return text


def _parts(raw: Mapping[str, dict[str, Any]], where: str, section: str) -> dict[str, _ModelText]:
    for name in raw:
        if not _NAME.fullmatch(name):
            raise SheetError(f"{where}: {section}: {name!r} is not made of letters, digits, '.', '_' and '-'")
    parts = {name: _part(value, _ModelText, where, f"{section}.{name}") for name, value in raw.items()}
    for name, part in parts.items():
        if section == "terms" and part.terms is not None:
            raise SheetError(f"{where}: terms.{name}.terms: terms stand on no other terms")
    return parts


def _part(raw: object, kind: type[_Part], where: str, under: str) -> _Part:
    """`raw` as a struct; msgspec's message with the whole path and, where it helps, what would be right."""
    try:
        return msgspec.convert(raw, kind)
    except msgspec.ValidationError as exc:
        found = _AT.search(str(exc))
        path = ".".join(part for part in (under, found["path"] if found else "") if part)
        said = _AT.sub("", str(exc)).replace("`", "'")
        if "got 'float'" in said or "got 'int'" in said:
            said += '; amounts are strings such as "0.30", since a binary fraction is not exact'
        if "unknown field" in said:
            inner = _ObjectsText if path.endswith("objects") else _TierText if path.endswith("]") else kind
            said += f"; known: {', '.join(inner.__struct_fields__)}"
        raise SheetError(f"{where}: {path}{': ' if path else ''}{said}") from exc


def _given(part: Struct) -> dict[str, Any]:
    """What the text says, without what it leaves out."""
    return {key: value for key, value in msgspec.structs.asdict(part).items() if value is not None and value != ()}


def _rate_texts(model: _ModelText) -> dict[str, str]:
    return {key: value for key in _RatesText.__struct_fields__ if (value := getattr(model, key)) is not None}


def _texts(terms: _ModelText) -> list[str]:
    parts = (terms, terms.objects, *terms.tiers)
    return [value for part in parts for value in _given(part).values() if isinstance(value, str)]
