"""What a turn may read and write, what its look-up came to, and why not to more: breakpoints and history, side by side.

begin   the prompt is known: its breakpoints are applied, and other turns can be compared with it while it runs
told    the engine has looked: outcome and cause go with its word to the client
        the turn ended well: the prompt is stored; otherwise nobody knows how much of it is, and it is forgotten
"""

from collections.abc import Iterator
from contextlib import contextmanager

from msgspec import Struct
from msgspec.structs import replace

from keepwarm.cache.breakpoints import Chosen
from keepwarm.cache.misses import Asked, Facts, blocks_of
from keepwarm.cache.render import Built
from keepwarm.config import CacheConfig
from keepwarm.core.cache_lookup import MissCause
from keepwarm.core.cache_object import ObjectStatus
from keepwarm.core.event import Started
from keepwarm.core.request import ChatRequest
from keepwarm.gateway.breakpoints import Breakpoints
from keepwarm.gateway.history import History, TurnRecord
from keepwarm.gateway.models import ServedModels
from keepwarm.gateway.object_use import ObjectUse


class Look(Struct, frozen=True):
    """One turn's look-up: its prompt as others may meet it again, and what is known before the engine has looked."""

    tenant: str
    asked: Asked
    chosen: Chosen | None  # what its breakpoints with a lifetime say, if it has any
    facts: Facts
    compare_with: str | None


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

    @contextmanager
    def begin(self, turn_id: str, tenant: str, request: ChatRequest, built: Built, use: ObjectUse) -> Iterator[Look]:
        """For as long as the turn runs; its prompt is rendered. `use` is what became of the cache object it names."""
        chosen = self._breakpoints.choose(tenant, built) if use.object is None else None
        if chosen is not None:
            self._breakpoints.keep(tenant, chosen)
        facts = self._facts(built.prompt.n_tokens, chosen, use)
        served = self._models.resolve(request.model)
        is_cached = chosen is not None or facts.end >= facts.tokens_min
        asked = Asked(
            turn_id, served, self._template, built.prompt.tokens, blocks_of(request), is_cached=is_cached
        )  # fmt: skip
        self._history.asked(tenant, asked)
        is_stored = False
        try:
            yield Look(tenant, asked, chosen, facts, request.compare_with)
            is_stored = True
        finally:
            if is_stored:
                self._history.asked(tenant, replace(asked, is_finished=True))
            else:
                self._history.forget(tenant, turn_id)

    def told(self, look: Look, started: Started) -> Started:
        """The engine's word with what the look-up came to."""
        facts = replace(look.facts, n_found=started.n_found, n_read=started.cache_read, tier=started.tier)
        return replace(started, lookup=self._history.look(look.tenant, look.asked, facts, look.compare_with))

    def note(self, tenant: str, record: TurnRecord) -> None:
        """Remember a turn, or what is new of it."""
        self._history.record(tenant, record)

    def turn(self, tenant: str, turn_id: str) -> TurnRecord | None:
        """The tenant's own recent turn."""
        return self._history.turn(tenant, turn_id)

    def _facts(self, n_prompt: int, chosen: Chosen | None, use: ObjectUse) -> Facts:
        """All but what the engine finds and reads."""
        if chosen is not None:
            return Facts(
                end=chosen.write_end,
                tokens_min=self._cache.mark_tokens_min,
                n_promised=chosen.read_end,
                is_automatic=False,
                n_expired=chosen.n_expired,
                n_too_far=chosen.n_too_far,
                lost=use.lost,
            )
        if use.object is None:
            return Facts(end=n_prompt, tokens_min=self._cache.auto_tokens_min, lost=use.lost)
        return Facts(
            end=n_prompt,
            tokens_min=0,
            n_promised=min(use.object.n_tokens, n_prompt),
            is_pending=use.status is ObjectStatus.PENDING,
            lost=MissCause.EXPIRED if use.status is ObjectStatus.INACTIVE else None,
        )
