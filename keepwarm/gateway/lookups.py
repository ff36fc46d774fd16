"""What a turn may read and write, what its look-up came to, and why not to more: breakpoints and history, side by side.

begin   the prompt is known: its breakpoints are applied, and other turns can be compared with it from now on
told    the engine has looked: outcome and cause go with its word to the client
end     the prompt is stored
"""

from msgspec import Struct
from msgspec.structs import replace

from keepwarm.cache.breakpoints import Chosen
from keepwarm.cache.misses import Asked, Facts, blocks_of
from keepwarm.cache.render import Built
from keepwarm.config import CacheConfig
from keepwarm.core.cache_object import CacheObject
from keepwarm.core.event import Started
from keepwarm.core.request import ChatRequest
from keepwarm.gateway.breakpoints import Breakpoints
from keepwarm.gateway.history import History, TurnRecord
from keepwarm.gateway.models import ServedModels


class Look(Struct, frozen=True):
    """One turn's look-up: its prompt as others may meet it again, and what its breakpoints with a lifetime say."""

    tenant: str
    request: ChatRequest
    asked: Asked
    chosen: Chosen | None
    tokens_min: int
    is_deleted: bool


class Lookups:
    """One per server. `template` names how messages become text."""

    def __init__(
        self, cache: CacheConfig, models: ServedModels, breakpoints: Breakpoints, history: History, *, template: str
    ) -> None:
        self._cache = cache
        self._models = models
        self._breakpoints = breakpoints
        self._history = history
        self._template = template

    def begin(
        self, turn_id: str, tenant: str, request: ChatRequest, built: Built, used: CacheObject | None
    ) -> Look:  # fmt: skip
        """The turn's prompt is rendered. `used` is the cache object it reads from."""
        chosen = self._breakpoints.choose(tenant, built) if used is None else None
        if chosen is not None:
            self._breakpoints.keep(tenant, chosen)
        served = self._models.resolve(request.model)
        asked = Asked(turn_id, served, self._template, built.prompt.tokens, blocks_of(request))
        self._history.asked(tenant, asked)
        tokens_min = self._cache.auto_tokens_min if chosen is None else self._cache.mark_tokens_min
        is_deleted = request.cache is not None and used is None
        return Look(tenant, request, asked, chosen, 0 if used is not None else tokens_min, is_deleted)

    def told(self, look: Look, started: Started) -> Started:
        """The engine's word with what the look-up came to."""
        chosen = look.chosen
        facts = Facts(
            n_found=started.n_found,
            n_read=started.cache_read,
            tier=started.tier,
            end=started.n_prompt if chosen is None else chosen.end,
            tokens_min=look.tokens_min,
            n_expired=chosen.expired if chosen is not None else 0,
            is_deleted=look.is_deleted,
        )
        return replace(started, lookup=self._history.look(look.tenant, look.asked, facts, look.request.compare_with))

    def end(self, look: Look) -> None:
        """The prompt is stored."""
        self._history.asked(look.tenant, replace(look.asked, is_finished=True))

    def note(self, tenant: str, record: TurnRecord) -> None:
        """Remember a turn, or what is new of it."""
        self._history.record(tenant, record)

    def turn(self, tenant: str, turn_id: str) -> TurnRecord | None:
        """The tenant's own recent turn."""
        return self._history.turn(tenant, turn_id)
