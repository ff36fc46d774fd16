"""Why did I miss? A prompt against the tenant's recent ones and what the store said: one outcome, one cause. Pure.

    recent prompts ──▶ the nearest one ──▶ same blocks so far?   no ──▶ tools, system or messages changed, and where
                                                    │ yes
                                                    ▼
                                           all read that both share? ──▶ yes: hit
                                                    │ no
                                                    ▼
                            below the minimum, expired, evicted, deleted, being written, slower than recomputing

The nearest prompt is the one the client names, else the one with the longest common prefix, else the one with the most
blocks in common: a change near the top leaves no prefix, and is then what has to be found. Blocks are compared in the order
tools, system, messages, whatever order the template puts them in. Only prompts of one tenant are ever compared.
"""

from collections.abc import Callable, Sequence
from hashlib import blake2b

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from keepwarm.cache.encode import common_prefix
from keepwarm.core.cache_lookup import CacheLookup, MissCause, Outcome, Place
from keepwarm.core.prompt import Tokens
from keepwarm.core.request import ChatRequest, Message

SLACK_TOKENS = 64  # a match ends at a multiple of the granularity, and the last two tokens are always evaluated
SHARED_MIN = 64  # less than this is the template's own beginning
PLACE_TOKENS = 12  # shown on either side
BLOCK_DIGEST_BYTES = 16

Decode = Callable[[Tokens], str]


class Block(Struct, frozen=True):
    """One block of a request: "tools[0]", "system", "messages[3]", and a digest of what is in it, marks aside."""

    name: str
    digest: bytes


class Asked(Struct, frozen=True):
    """A prompt as it was asked for. `model` is the served one; `template` names how messages became text."""

    turn_id: str
    model: str
    template: str
    tokens: Tokens
    blocks: tuple[Block, ...]
    is_finished: bool = False


class Facts(Struct, frozen=True):
    """What the store and the rules said of the turn, in tokens.

    `n_found` were stored, of which `n_read` were read from `tier`. At most `end` could be asked for: the last breakpoint, or
    the prompt but its last two. `tokens_min` is the shortest prompt or prefix that is cached. `n_expired` are those of a
    breakpoint that does not live any more. `is_deleted`: the cache object the request names is not there.
    """

    n_found: int
    n_read: int
    tier: str | None
    end: int
    tokens_min: int
    n_expired: int = 0
    is_deleted: bool = False


def blocks_of(request: ChatRequest) -> tuple[Block, ...]:
    """The request's blocks. Leading system messages together are "system"; the others are numbered from there on."""
    n_system = next(
        (i for i, message in enumerate(request.messages) if message.role != "system"), len(request.messages)
    )
    found = [
        Block(f"tools[{i}]", _digest(msgspec.json.encode(replace(tool, mark=None))))
        for i, tool in enumerate(request.tools)
    ]
    if n_system:
        found.append(Block("system", _digest(b"\0".join(_bare(message) for message in request.messages[:n_system]))))
    found += [Block(f"messages[{i}]", _digest(_bare(message))) for i, message in enumerate(request.messages[n_system:])]
    return tuple(found)


def explain(
    asked: Asked, recent: Sequence[Asked], facts: Facts, decode: Decode, *, compare_with: str | None = None
) -> CacheLookup:
    """What the look-up of `asked` came to. `recent` are the tenant's other prompts, the newest first."""
    named = next((one for one in recent if one.turn_id == compare_with), None)
    nearest = named or _nearest(asked, recent)
    n_shared = common_prefix(asked.tokens, nearest.tokens) if nearest is not None else 0
    cause = _cause(asked, nearest, n_shared, facts)
    n_could = min(len(nearest.tokens), facts.end) if nearest is not None else 0
    return CacheLookup(
        outcome=_outcome(facts.n_read, cause),
        n_read=facts.n_read,
        tier=facts.tier if facts.n_read else None,
        cause=cause,
        n_missed=max(0, n_could - facts.n_read) if cause is not None else 0,
        compared_with=nearest.turn_id if nearest is not None else None,
        place=None if nearest is None or cause is None else _place(asked, nearest, n_shared, decode),
        compare_found=None if compare_with is None else named is not None,
    )


def _outcome(n_read: int, cause: MissCause | None) -> Outcome:
    if cause is None:
        return "hit"
    return "partial" if n_read >= SHARED_MIN else "miss"


def _cause(asked: Asked, nearest: Asked | None, n_shared: int, facts: Facts) -> MissCause | None:
    """None: all was read that could be."""
    if facts.is_deleted:
        return MissCause.DELETED
    if facts.end < facts.tokens_min:
        return MissCause.BELOW_MINIMUM
    if facts.n_read + SLACK_TOKENS >= facts.end:
        return None
    if facts.n_expired > facts.n_read:
        return MissCause.EXPIRED
    if nearest is None:
        return MissCause.EVICTED if facts.n_found > facts.n_read + SLACK_TOKENS else MissCause.FIRST_SEEN
    if nearest.model != asked.model:
        return MissCause.MODEL_CHANGED
    if nearest.template != asked.template:
        return MissCause.TEMPLATE_CHANGED
    return _lost(nearest, n_shared, facts) or _changed(asked, nearest)


def _lost(nearest: Asked, n_shared: int, facts: Facts) -> MissCause | None:
    """Why less was read than both prompts begin with; None when all of that was."""
    if facts.n_read + SLACK_TOKENS >= min(n_shared, facts.end):
        return None
    if facts.n_found > facts.n_read + SLACK_TOKENS:
        return MissCause.SLOWER_THAN_RECOMPUTING
    return MissCause.EVICTED if nearest.is_finished else MissCause.STILL_BEING_WRITTEN


def _changed(asked: Asked, nearest: Asked) -> MissCause | None:
    """Which block the two do not share; None when `asked` only goes on where `nearest` ended."""
    name = _differing(asked, nearest)
    if name is None:
        return None
    if name.startswith("tools"):
        return MissCause.TOOLS_CHANGED
    return MissCause.SYSTEM_CHANGED if name == "system" else MissCause.MESSAGES_CHANGED


def _differing(asked: Asked, nearest: Asked) -> str | None:
    """The first block of `nearest` that `asked` does not have in its place, or has something before."""
    for here, there in zip(asked.blocks, nearest.blocks, strict=False):
        if here != there:
            return min(here.name, there.name, key=_order)
    n = len(asked.blocks)
    return nearest.blocks[n].name if n < len(nearest.blocks) else None


def _order(name: str) -> int:
    return 0 if name.startswith("tools") else 1 if name == "system" else 2


def _nearest(asked: Asked, recent: Sequence[Asked]) -> Asked | None:
    """The recent prompt that shares most with this one; None when none shares a block or a prefix worth the name."""
    best, n_best = None, SHARED_MIN - 1
    for one in recent:
        n = common_prefix(asked.tokens, one.tokens)
        if n > n_best:
            best, n_best = one, n
    if best is not None:
        return best
    mine = {block.digest for block in asked.blocks}
    common = [sum(block.digest in mine for block in one.blocks) for one in recent]
    most = max(common, default=0)
    return recent[common.index(most)] if most else None


def _place(asked: Asked, nearest: Asked, n_shared: int, decode: Decode) -> Place:
    start = max(0, n_shared - PLACE_TOKENS)
    return Place(
        n_shared,
        _differing(asked, nearest) or (asked.blocks[-1].name if asked.blocks else ""),
        before=decode(asked.tokens[start:n_shared]),
        here=decode(asked.tokens[n_shared : n_shared + PLACE_TOKENS]),
        there=decode(nearest.tokens[n_shared : n_shared + PLACE_TOKENS]),
    )


def _bare(message: Message) -> bytes:
    """The message without what never changes the prompt."""
    parts = tuple(replace(part, mark=None) for part in message.parts)
    return msgspec.json.encode(replace(message, parts=parts, mark=None))


def _digest(raw: bytes) -> bytes:
    return blake2b(raw, digest_size=BLOCK_DIGEST_BYTES).digest()
