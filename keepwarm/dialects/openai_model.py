"""The models list, in OpenAI's shape and with the members Kimi adds.

`context_length` is the window that is really served: a name such as "moonshot-v1-128k" is an alias, not a promise.
"""

from collections.abc import Sequence

import msgspec
from msgspec import UNSET, Struct, UnsetType

OWNER = "keepwarm"


class ModelPermission(Struct):
    """Kimi's list has one such entry per model; nothing here depends on it."""

    id: str
    created: int
    object: str = "model_permission"
    organization: str = "public"
    group: str | None = None
    is_blocking: bool = False
    allow_view: bool = True
    allow_sampling: bool = True
    allow_logprobs: bool = True
    allow_search_indices: bool = False
    allow_create_engine: bool = False
    allow_fine_tuning: bool = False


class ModelItem(Struct):
    """A model name that requests may use. `context_length` is absent until the engine has loaded the model."""

    id: str
    object: str
    created: int
    owned_by: str
    context_length: int | UnsetType = UNSET
    permission: tuple[ModelPermission, ...] | UnsetType = UNSET
    root: str | UnsetType = UNSET
    parent: str | UnsetType = UNSET


class ModelList(Struct):
    """The body of GET /models."""

    object: str
    data: tuple[ModelItem, ...]


def openai_model(name: str, created: int, n_ctx: int | None) -> ModelItem:
    """One model in OpenAI's shape; `created` in unix seconds, `n_ctx` in tokens or None when not known yet."""
    return ModelItem(name, "model", created, OWNER, UNSET if n_ctx is None else n_ctx)


def kimi_model(name: str, created: int, n_ctx: int | None) -> ModelItem:
    """One model with Kimi's members on top."""
    item = openai_model(name, created, n_ctx)
    item.permission = (ModelPermission(f"modelperm-{name}", created),)
    item.root = name
    item.parent = ""
    return item


def render_model_list(items: Sequence[ModelItem]) -> bytes:
    return msgspec.json.encode(ModelList("list", tuple(items)))
