"""The models list in Anthropic's shape: one page, since a server has a handful of names.

`max_input_tokens` is the window that is really served and holds the answer, too; a name such as "claude-sonnet-4-5" is an
alias of the model that is loaded, not a promise. Both limits are absent until the engine has loaded it.
"""

from collections.abc import Sequence
from datetime import UTC, datetime

import msgspec
from msgspec import UNSET, Struct, UnsetType


class AnthropicModel(Struct, tag="model"):
    """A model name that requests may use. `created_at` is RFC 3339."""

    id: str
    display_name: str
    created_at: str
    lifecycle: str = "active"
    max_input_tokens: int | UnsetType = UNSET
    max_tokens: int | UnsetType = UNSET


class AnthropicModelList(Struct):
    """The body of GET /models."""

    data: tuple[AnthropicModel, ...]
    has_more: bool
    first_id: str | None
    last_id: str | None


def anthropic_model(name: str, created: int, n_ctx: int | None) -> AnthropicModel:
    """One model; `created` in unix seconds, `n_ctx` in tokens or None when not known yet."""
    created_at = datetime.fromtimestamp(created, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    n_max = UNSET if n_ctx is None else n_ctx
    return AnthropicModel(name, name, created_at, max_input_tokens=n_max, max_tokens=n_max)


def render_anthropic_models(names: Sequence[str], created: int, n_ctx: int | None) -> bytes:
    models = tuple(anthropic_model(name, created, n_ctx) for name in names)
    first, last = (names[0], names[-1]) if names else (None, None)
    return msgspec.json.encode(AnthropicModelList(models, has_more=False, first_id=first, last_id=last))
