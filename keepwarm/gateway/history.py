"""The tenant's recent prompts and what became of its recent turns: what a miss is explained by, and GET /admin/turns/{id}.

In memory only, bounded in turns and in bytes over all tenants; the oldest leave first. A restart begins with none, and a
miss is then "first seen". Nothing here is ever looked up but by tenant. No call takes longer the more is remembered, but
for `look`, which reads the tenant's own prompts.
"""

from collections import OrderedDict

from msgspec import Struct

from keepwarm.cache.misses import Asked, Decode, Facts, explain
from keepwarm.core.cache_lookup import CacheLookup
from keepwarm.core.event import Usage

PROMPTS_PER_TENANT_MAX = 32  # a coding agent with its helpers has a handful of conversations at a time
PROMPT_BYTES_MAX = 64 << 20  # all tenants' prompts: 160 of 100,000 tokens
RECORDS_MAX = 10_000  # turns of all tenants, about a kilobyte each
BLOCK_BYTES = 192  # of memory for a block's name and digest, measured
ASKED_BYTES = 1024  # of memory for a prompt beside its tokens and blocks


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

    def __init__(self, decode: Decode, *, bytes_max: int = PROMPT_BYTES_MAX) -> None:
        self._decode = decode
        self._bytes_max = bytes_max
        self._prompts: dict[str, OrderedDict[str, Asked]] = {}  # by tenant and turn, oldest first
        self._ages: OrderedDict[tuple[str, str], None] = OrderedDict()  # the same, of all tenants in one row
        self._records: OrderedDict[tuple[str, str], TurnRecord] = OrderedDict()
        self._n_bytes = 0

    @property
    def n_bytes(self) -> int:
        """What the prompts take, about."""
        return self._n_bytes

    def look(self, tenant: str, asked: Asked, facts: Facts, compare_with: str | None) -> CacheLookup:
        """What the look-up of a turn came to, against the tenant's other prompts."""
        recent = [one for one in reversed(self._prompts.get(tenant, {}).values()) if one.turn_id != asked.turn_id]
        return explain(asked, recent, facts, self._decode, compare_with=compare_with)

    def asked(self, tenant: str, asked: Asked) -> None:
        """A turn with this prompt has begun, or (`is_finished`) its prompt is stored now."""
        self.forget(tenant, asked.turn_id)
        mine = self._prompts.setdefault(tenant, OrderedDict())
        mine[asked.turn_id] = asked
        self._ages[tenant, asked.turn_id] = None
        self._n_bytes += _n_bytes(asked)
        if len(mine) > PROMPTS_PER_TENANT_MAX:
            self.forget(tenant, next(iter(mine)))
        while self._n_bytes > self._bytes_max and len(self._ages) > 1:
            self.forget(*next(iter(self._ages)))

    def forget(self, tenant: str, turn_id: str) -> None:
        """Nothing can be said any more of what is stored of this turn's prompt. An unknown one is no error."""
        mine = self._prompts.get(tenant, OrderedDict())
        gone = mine.pop(turn_id, None)
        if gone is None:
            return
        del self._ages[tenant, turn_id]
        self._n_bytes -= _n_bytes(gone)
        if not mine:
            del self._prompts[tenant]

    def record(self, tenant: str, record: TurnRecord) -> None:
        """Remember a turn, or what is new of it."""
        self._records[tenant, record.id] = record
        while len(self._records) > RECORDS_MAX:
            self._records.popitem(last=False)

    def turn(self, tenant: str, turn_id: str) -> TurnRecord | None:
        """The tenant's own turn."""
        return self._records.get((tenant, turn_id))


def _n_bytes(asked: Asked) -> int:
    return ASKED_BYTES + BLOCK_BYTES * len(asked.blocks) + asked.tokens.nbytes
