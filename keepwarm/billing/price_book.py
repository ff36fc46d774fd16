"""Which prices a model has, now and at the time a row was made.

A model is mapped to "SHEET/MODEL": the newest version of the sheet that is effective counts; or to "SHEET@VERSION/MODEL":
that version, whatever the day. Days begin at midnight UTC.
"""

from collections.abc import Iterable, Mapping
from datetime import UTC, date, datetime
from pathlib import Path

from keepwarm.billing.row import Priced
from keepwarm.billing.sheet import ModelPrices, PriceSheet
from keepwarm.billing.sheet_file import SheetError, drafts_in, priced_sheets, shipped_drafts
from keepwarm.config import BillingConfig, ConfigError, ModelConfig


class NoSuchPricesError(LookupError):
    """A row was made with a sheet or model that the book no longer has; the message names it."""


class PriceBook:
    """All sheets, and which model of which sheet each served name has.

    `mapping` from served name to "SHEET/MODEL" or "SHEET@VERSION/MODEL". Raises SheetError where one cannot be followed
    from the day of `now` (seconds since 1970) on.
    """

    def __init__(self, sheets: Iterable[PriceSheet], mapping: Mapping[str, str], now: float) -> None:
        self._sheets = {sheet.id: sheet for sheet in sheets}
        self._versions: dict[str, list[PriceSheet]] = {}
        for sheet in sorted(self._sheets.values(), key=lambda sheet: sheet.effective_from):
            self._versions.setdefault(sheet.name, []).append(sheet)
        self._mapping = {served: self._checked(served, target, now) for served, target in mapping.items()}

    @property
    def sheets(self) -> tuple[PriceSheet, ...]:
        """All sheets, by name and day."""
        return tuple(sheet for name in sorted(self._versions) for sheet in self._versions[name])

    def priced(self, model_name: str, now: float) -> tuple[Priced, ModelPrices] | None:
        """What a served name costs now; None where it is mapped to no sheet, so that its use has no price."""
        target = self._mapping.get(model_name)
        if target is None:
            return None
        name, sheet_model = target
        sheet = self._sheets.get(name) or self._effective(name, now)
        if sheet is None:  # the clock went back behind the sheet's first day
            return None
        return Priced(sheet.id, sheet_model, sheet.currency), sheet.models[sheet_model]

    def prices(self, priced: Priced) -> ModelPrices:
        """The prices that a row was made with. Raises NoSuchPricesError."""
        sheet = self._sheets.get(priced.sheet)
        if sheet is None or priced.sheet_model not in sheet.models:
            raise NoSuchPricesError(f"there are no prices {priced.sheet}/{priced.sheet_model}; put the sheet back")
        return sheet.models[priced.sheet_model]

    def prices_or_none(self, priced: Priced) -> ModelPrices | None:
        """The same; None while the sheet is not there."""
        try:
            return self.prices(priced)
        except NoSuchPricesError:
            return None

    def _effective(self, name: str, now: float) -> PriceSheet | None:
        return effective(self._versions.get(name, ()), now)

    def _checked(self, served: str, target: str, now: float) -> tuple[str, str]:
        """(sheet name or id, model): there today and in every version to come."""
        name, slash, sheet_model = target.rpartition("/")
        if not slash:
            raise SheetError(f'{served}: {target!r} is not "SHEET/MODEL" or "SHEET@VERSION/MODEL"')
        pinned, today = self._sheets.get(name), self._effective(name, now)
        if pinned is None and name not in self._versions:
            raise SheetError(f"{served}: there is no sheet {name!r}; known: {', '.join(self._versions)}")
        if pinned is None and today is None:
            first = self._versions[name][0].effective_from
            raise SheetError(f"{served}: sheet {name!r} is effective from {first} on; there is none for today")
        later = [sheet for sheet in self._versions.get(name, ()) if sheet.effective_from > _day(now)]
        for sheet in [sheet for sheet in (pinned, today, *later) if sheet is not None]:
            if sheet_model not in sheet.models:
                known = ", ".join(sheet.models) or "none, only terms for sheets of your own"
                raise SheetError(f"{served}: sheet {sheet.id} has no model {sheet_model!r}; it has {known}")
        return name, sheet_model


def effective(versions: Iterable[PriceSheet], now: float) -> PriceSheet | None:
    """The newest of a sheet's versions whose first day has come."""
    begun = [sheet for sheet in versions if sheet.effective_from <= _day(now)]
    return max(begun, key=lambda sheet: sheet.effective_from, default=None)


def load_price_book(billing: BillingConfig, model: ModelConfig, now: float) -> PriceBook:
    """The shipped sheets, the operator's, and the configured mapping. An alias without a sheet has the model's.

    Raises ConfigError.
    """
    names = (model.name, *model.aliases)
    for served in billing.models:
        if served not in names:
            raise ConfigError(f"billing.models: {served!r} is not served; the names are {', '.join(names)}")
    of_model = billing.models.get(model.name)
    default = {} if of_model is None else dict.fromkeys(names, of_model)
    try:
        return PriceBook(all_sheets(billing.sheets_dir), {**default, **billing.models}, now)
    except SheetError as exc:
        raise ConfigError(f"billing: {exc}") from exc


def all_sheets(sheets_dir: str | None) -> tuple[PriceSheet, ...]:
    """The shipped sheets and those in `sheets_dir`. Raises SheetError."""
    own = () if sheets_dir is None else drafts_in(Path(sheets_dir))
    return priced_sheets((*shipped_drafts(), *own))


def shipped_prices(sheet_id: str, sheet_model: str) -> ModelPrices:
    """Prices of a shipped sheet. Raises KeyError."""
    return {sheet.id: sheet for sheet in priced_sheets(shipped_drafts())}[sheet_id].models[sheet_model]


def _day(now: float) -> date:
    return datetime.fromtimestamp(now, UTC).date()
