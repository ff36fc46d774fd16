"""Which prices each scheme is shown with.

Some vendors publish multiples of an input price, not prices: the shipped sheets hold those as terms without models. Such
terms are put on the input and output price of one base model, the same for all, so that schemes can be compared.
"""

from collections.abc import Iterable

from msgspec import Struct

from keepwarm.billing.price_book import effective
from keepwarm.billing.sheet import ModelPrices, PriceSheet, decimal_text
from keepwarm.billing.sheet_file import Draft, SheetError, drafted, priced_sheets
from keepwarm.planner import PlanError

BASE = "minimax-international/MiniMax-M2.1"  # the cheapest in USD that the shipped sheets have whole


class Shown(Struct, frozen=True):
    """Prices and what they are called: "kimi@2024-08-07/moonshot-v1-32k"."""

    label: str
    currency: str
    prices: ModelPrices


class Catalogue:
    """Models and terms of sheets, by "SHEET/NAME" (what is effective at `now`) or "SHEET@VERSION/NAME"."""

    def __init__(self, drafts: Iterable[Draft], now: float, base: str = BASE) -> None:
        """Raises PlanError when `base` is no model."""
        self._drafts = tuple(drafts)
        self._now = now
        try:
            self._sheets = priced_sheets(self._drafts)
        except SheetError as exc:
            raise PlanError(str(exc)) from exc
        self._base = self._model(base)

    def shown(self, target: str) -> Shown:
        """Raises PlanError, also for terms in another currency than the base's that hold amounts."""
        sheet, name = self._named(target)
        if name in sheet.models:
            return Shown(f"{sheet.id}/{name}", sheet.currency, sheet.models[name])
        [draft] = [draft for draft in self._drafts if draft.id == sheet.id]
        if name not in draft.terms:
            known = ", ".join((*sheet.models, *draft.terms))
            raise PlanError(f"sheet {sheet.id} has no model and no terms {name!r}; it has {known}")
        rates = self._base.prices.tiers[0]
        text = (
            f'name = "plan"\nversion = "1"\ncurrency = "{self._base.currency}"\neffective_from = 1970-01-01\n'
            f'source = "{sheet.id}"\n[models.shown]\nterms = "{sheet.id}/{name}"\n'
            f'input = "{decimal_text(rates.input)}"\noutput = "{decimal_text(rates.output)}"\n'
        )
        try:
            [made] = [one for one in priced_sheets((*self._drafts, drafted(text, target))) if one.id == "plan@1"]
        except SheetError as exc:
            raise PlanError(str(exc)) from exc
        return Shown(f"{sheet.id}/{name} on {self._base.label}", made.currency, made.models["shown"])

    def _model(self, target: str) -> Shown:
        sheet, name = self._named(target)
        if name not in sheet.models:
            raise PlanError(f"sheet {sheet.id} has no model {name!r} to be the base; it has {', '.join(sheet.models)}")
        return Shown(f"{sheet.id}/{name}", sheet.currency, sheet.models[name])

    def _named(self, target: str) -> tuple[PriceSheet, str]:
        sheet_name, slash, name = target.rpartition("/")
        if not slash:
            raise PlanError(f'prices {target!r} are not "SHEET/MODEL" or "SHEET@VERSION/MODEL"')
        versions = [sheet for sheet in self._sheets if sheet_name in (sheet.name, sheet.id)]
        sheet = versions[0] if versions and "@" in sheet_name else effective(versions, self._now)
        if sheet is None:
            known = ", ".join(dict.fromkeys(sheet.name for sheet in self._sheets))
            raise PlanError(f"there is no price sheet {sheet_name!r} that is effective today; known: {known}")
        return sheet, name
