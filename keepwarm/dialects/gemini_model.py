"""The models list in Gemini's shape, page by page.

`inputTokenLimit` is the window that is really served and holds the answer, too; a name such as "gemini-2.5-flash" is an alias
of the model that is loaded, not a promise. Both limits are absent until the engine has loaded it. A page's token is the place
where the next one begins, in a form that invites nobody to count.
"""

from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Mapping, Sequence

import msgspec
from msgspec import UNSET, Struct, UnsetType

from keepwarm.core.request import Sampling
from keepwarm.dialects.body import invalid, quoted

METHODS = ("generateContent", "countTokens", "createCachedContent")
TEMPERATURE_MAX = 2.0
PAGE_SIZE_DEFAULT = 50
PAGE_SIZE_MAX = 1000
VERSION = "001"
MODEL_PREFIX = "models/"

_TOKEN_PREFIX = b"models from "
_DEFAULTS = Sampling()


class GeminiModel(Struct, rename="camel"):
    """A model name that requests may use."""

    name: str
    version: str
    display_name: str
    description: str
    supported_generation_methods: tuple[str, ...]
    temperature: float
    top_p: float
    max_temperature: float
    input_token_limit: int | UnsetType = UNSET
    output_token_limit: int | UnsetType = UNSET


class GeminiModelList(Struct, rename="camel"):
    """The body of GET /models. No token: there are no more."""

    models: tuple[GeminiModel, ...]
    next_page_token: str | UnsetType = UNSET


class ModelsPage(Struct, frozen=True):
    """So many models from place `first` on."""

    size: int = PAGE_SIZE_DEFAULT
    first: int = 0


def parse_models_page(query: Sequence[tuple[str, str]]) -> ModelsPage:
    """The page that `pageSize` and `pageToken` ask for. Raises ApiError(INVALID_REQUEST)."""
    members: Mapping[str, str] = dict(query)
    size = members.get("pageSize", members.get("page_size", ""))
    token = members.get("pageToken", members.get("page_token", ""))
    return ModelsPage(_page_size(size), _first(token))


def gemini_model(name: str, n_ctx: int | None) -> GeminiModel:
    """One model; `n_ctx` in tokens or None when not known yet."""
    n_max = UNSET if n_ctx is None else n_ctx
    return GeminiModel(
        name=MODEL_PREFIX + name,
        version=VERSION,
        display_name=name,
        description="Served by Keepwarm",
        supported_generation_methods=METHODS,
        temperature=_DEFAULTS.temperature,
        top_p=_DEFAULTS.top_p,
        max_temperature=TEMPERATURE_MAX,
        input_token_limit=n_max,
        output_token_limit=n_max,
    )


def render_gemini_models(names: Sequence[str], n_ctx: int | None, page: ModelsPage) -> bytes:
    end = page.first + page.size
    models = tuple(gemini_model(name, n_ctx) for name in names[page.first : end])
    return msgspec.json.encode(GeminiModelList(models, _token(end) if end < len(names) else UNSET))


def _page_size(text: str) -> int:
    """None and 0 mean the default, and more than the most is the most, as in Google's lists."""
    if not text:
        return PAGE_SIZE_DEFAULT
    if not (text.isascii() and text.isdecimal()):
        raise invalid("pageSize", f"{quoted(text)} is not a number of models")
    return min(int(text[:9]), PAGE_SIZE_MAX) or PAGE_SIZE_DEFAULT


def _token(first: int) -> str:
    return urlsafe_b64encode(_TOKEN_PREFIX + str(first).encode()).decode()


def _first(token: str) -> int:
    if not token:
        return 0
    try:
        place = urlsafe_b64decode(token.encode()).removeprefix(_TOKEN_PREFIX)[:9]
        first = int(place)
    except ValueError as exc:
        raise invalid("pageToken", "is not one of this list") from exc
    if first < 0 or _token(first) != token:
        raise invalid("pageToken", "is not one of this list")
    return first
