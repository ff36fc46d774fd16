"""The tenant's recent prompts and what became of its recent turns: what a miss is explained by, and GET /admin/turns/{id}.

In memory only, bounded in turns and in bytes of token ids over all tenants; the oldest leave first. A restart begins with
none, and a miss is then "first seen". Nothing here is ever looked up but by tenant.
"""

from collections import OrderedDict
from collections.abc import Iterator

from msgspec import Struct

from keepwarm.cache.misses import Asked, Decode, Facts, explain
from keepwarm.core.cache_lookup import CacheLookup
from keepwarm.core.event import Usage

PROMPTS_PER_TENANT_MAX = 32  # a coding agent with its helpers has a handful of conversations at a time
PROMPT_BYTES_MAX = 64 << 20  # token ids of all tenants' prompts: 160 of 100,000 tokens
RECORDS_MAX = 10_000  # turns of all tenants, about a kilobyte each


class TurnRecord(Struct, frozen=True):
    """What is remembered of a turn. `at` is when it began, unix seconds; `usage` and `lookup` are null until known."""

    id: str
    dialect: str
    model: str
    at: float
    status: str  # "running", "finished", or the kind of the error it ended with
    usage: Usage | None = None
    lookup: CacheLookup | None = None
    rewritten: tuple[str, ...] = ()  # what normalisers changed in the prompt


class History:
    """Recent prompts and turns. Used from the event loop only."""

    def __init__(self, decode: Decode) -> None:
        self._decode = decode
        self._prompts: OrderedDict[tuple[str, str], Asked] = OrderedDict()  # by tenant and turn, oldest first
        self._n_bytes = 0
        self._records: OrderedDict[tuple[str, str], TurnRecord] = OrderedDict()

    def look(self, tenant: str, asked: Asked, facts: Facts, compare_with: str | None) -> CacheLookup:
        """What the look-up of a turn came to, against the tenant's other prompts."""
        recent = [one for one in self._of(tenant) if one.turn_id != asked.turn_id]
        return explain(asked, recent, facts, self._decode, compare_with=compare_with)

    def asked(self, tenant: str, asked: Asked) -> None:
        """A turn with this prompt has begun, or (`is_finished`) its prompt is stored now."""
        key = tenant, asked.turn_id
        known = self._prompts.pop(key, None)
        self._prompts[key] = asked
        self._n_bytes += asked.tokens.nbytes - (known.tokens.nbytes if known is not None else 0)
        mine = [one for one in self._prompts if one[0] == tenant]
        for old in mine[: len(mine) - PROMPTS_PER_TENANT_MAX]:
            self._drop(old)
        while self._n_bytes > PROMPT_BYTES_MAX and len(self._prompts) > 1:
            self._drop(next(iter(self._prompts)))

    def record(self, tenant: str, record: TurnRecord) -> None:
        """Remember a turn, or what is new of it."""
        self._records[tenant, record.id] = record
        while len(self._records) > RECORDS_MAX:
            self._records.popitem(last=False)

    def turn(self, tenant: str, turn_id: str) -> TurnRecord | None:
        """The tenant's own turn."""
        return self._records.get((tenant, turn_id))

    def _of(self, tenant: str) -> Iterator[Asked]:
        """The newest first."""
        return (asked for (owner, _), asked in reversed(self._prompts.items()) if owner == tenant)

    def _drop(self, key: tuple[str, str]) -> None:
        self._n_bytes -= self._prompts.pop(key).tokens.nbytes
