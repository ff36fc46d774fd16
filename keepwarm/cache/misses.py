"""Why did I miss? A prompt against the tenant's recent ones and what the store said: one outcome, one cause. Pure.

    too short?  all read?  ──▶ below the minimum; hit
    what the rules and the store know of:  an entry that does not live any more, or lies too far back; a prefix that is
        stored and was not read; one that is promised, or that an earlier prompt has, and is not stored (any more, yet)
    the nearest prompt:  another model, another template, or the first block of the two that differs; none: hit

The nearest prompt is the one the client names, else the one most like this: tokens of common prefix, and blocks in common
for a change near the top, which leaves no prefix and is then what has to be found. A prompt that is less like this one than
what was read explains nothing. Blocks are compared in the order tools, system, messages, whatever order the template puts them in; they
name a change, tokens decide whether there is one. Only prompts of one tenant are ever compared.
"""

from collections.abc import Callable, Sequence
from hashlib import blake2b

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from keepwarm.core.cache_lookup import CacheLookup, MissCause, Outcome, Place
from keepwarm.core.prompt import Tokens, common_prefix
from keepwarm.core.request import ChatRequest, Message, TextPart

SLACK_TOKENS = 66  # a match ends at a multiple of the granularity, 64 at most, and the last two tokens are evaluated
SHARED_MIN = 64  # tokens; less is the template's own beginning. A block in common counts as much
PLACE_TOKENS = 12  # shown on either side
BLOCK_DIGEST_BYTES = 16

Decode = Callable[[Tokens], str]
Miss = tuple[MissCause, int]  # and how many tokens would have been read but for it


class Block(Struct, frozen=True):
    """One block of a request: "tools[0]", "system", "messages[3]", and a digest of what is in it, marks aside."""

    name: str
    digest: bytes


class Asked(Struct, frozen=True):
    """A prompt as it was asked for. `model` is the served one; `template` names how messages became text.

    `is_cached`: it was long enough to be stored. `is_finished`: it is stored now, if it is at all.
    """

    turn_id: str
    model: str
    template: str
    tokens: Tokens
    blocks: tuple[Block, ...]
    is_cached: bool = True
    is_finished: bool = False


class Facts(Struct, frozen=True):
    """What the store and the rules said of the turn, in tokens.

    No more than `end` could be asked for: the last breakpoint (0: all were too short), or the whole prompt. `tokens_min` is
    the shortest prompt or prefix that is cached. `n_found` were stored, of which `n_read` were read from `tier`.

    `n_promised` are known by a living breakpoint or belong to the cache object in use; `is_pending`: that one is not ready
    yet. `is_automatic`: whatever earlier prompts have in common may be read, not only what is promised. `n_expired` and
    `n_too_far` as in `Chosen`. `lost` is why the cache object that the request names is of no use: DELETED, EXPIRED.
    """

    end: int
    tokens_min: int
    n_found: int = 0
    n_read: int = 0
    tier: str | None = None
    n_promised: int = 0
    is_pending: bool = False
    is_automatic: bool = True
    n_expired: int = 0
    n_too_far: int = 0
    lost: MissCause | None = None

    @property
    def slack(self) -> int:
        """So many tokens more or less are no loss."""
        return min(SLACK_TOKENS, self.end // 4)

    @property
    def n_enough(self) -> int:
        """Nobody misses anything up to here."""
        return self.n_read + self.slack

    @property
    def has_read(self) -> bool:
        """More than the template's own beginning."""
        return self.n_read >= min(SHARED_MIN, self.end // 2) > 0


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
    beside = _beside(asked, recent if named is None else (named,))
    nearest = _nearest(beside, facts) if named is None else beside[0]
    miss = _miss(asked, beside, nearest, facts)
    cause, n_could = miss if miss is not None else (None, facts.n_read)
    return CacheLookup(
        outcome=_outcome(cause, facts),
        n_read=facts.n_read,
        tier=facts.tier if facts.n_read else None,
        cause=cause,
        n_missed=max(0, n_could - facts.n_read),
        compared_with=nearest.one.turn_id if nearest is not None else None,
        place=_place(asked, nearest, decode) if nearest is not None and n_could > facts.n_read else None,
        compare_found=None if compare_with is None else named is not None,
    )


class _Beside(Struct, frozen=True):
    """A recent prompt beside the asked one: how many leading tokens, and blocks anywhere, they have in common."""

    one: Asked
    n_shared: int
    n_blocks: int
    is_same: bool  # model and template, so that their states are the same

    @property
    def likeness(self) -> int:
        return self.n_shared + SHARED_MIN * self.n_blocks


def _beside(asked: Asked, recent: Sequence[Asked]) -> list[_Beside]:
    mine = {block.digest for block in asked.blocks}
    return [
        _Beside(
            one,
            n_shared=common_prefix(asked.tokens, one.tokens),
            n_blocks=len(mine.intersection(block.digest for block in one.blocks)),
            is_same=(one.model, one.template) == (asked.model, asked.template),
        )
        for one in recent
    ]


def _nearest(beside: Sequence[_Beside], facts: Facts) -> _Beside | None:
    """The recent prompt most like the asked one, the newest of equals; None when none is, or less than what was read."""
    least = max(SHARED_MIN, facts.n_read - facts.slack)
    like = [one for one in beside if one.likeness >= least]
    return max(like, key=lambda one: (one.likeness, one.is_same), default=None)


def _outcome(cause: MissCause | None, facts: Facts) -> Outcome:
    return "hit" if cause is None else "partial" if facts.has_read else "miss"


def _miss(asked: Asked, beside: Sequence[_Beside], nearest: _Beside | None, facts: Facts) -> Miss | None:
    """None: all was read that could be."""
    if facts.end < facts.tokens_min:
        return MissCause.BELOW_MINIMUM, facts.n_read
    if facts.has_read and facts.n_enough >= facts.end:
        return None
    return _lost(beside, facts) or _changed(asked, nearest, facts) or _unknown(facts)


def _lost(beside: Sequence[_Beside], facts: Facts) -> Miss | None:
    """Why less was read than was known; None when all of that was."""
    enough = facts.n_enough
    if facts.n_expired > enough:
        return MissCause.EXPIRED, facts.n_expired
    if facts.n_too_far > enough:  # more than 20 blocks were put between two breakpoints
        return MissCause.MESSAGES_CHANGED, facts.n_too_far
    if facts.n_found > enough:
        return MissCause.SLOWER_THAN_RECOMPUTING, facts.n_found
    same = [one for one in beside if one.is_same and one.one.is_cached]
    n_stored = max((one.n_shared for one in same if one.one.is_finished), default=0)
    n_begun = max((one.n_shared for one in same if not one.one.is_finished), default=0)
    n_could = max(facts.n_promised, n_stored, n_begun) if facts.is_automatic else facts.n_promised
    n_could = min(n_could, facts.end)
    if n_could <= enough:
        return None
    if facts.is_pending or n_stored <= enough < n_begun:
        return MissCause.STILL_BEING_WRITTEN, n_could
    return facts.lost or MissCause.EVICTED, n_could


def _changed(asked: Asked, nearest: _Beside | None, facts: Facts) -> Miss | None:
    """What the nearest prompt has that this one has not; None when this one only goes on where that one ended."""
    if nearest is None:
        return None
    there = nearest.one
    n_whole = min(len(there.tokens), facts.end)
    if n_whole <= facts.n_enough:
        return None
    if there.model != asked.model:
        return MissCause.MODEL_CHANGED, n_whole
    if there.template != asked.template:
        return MissCause.TEMPLATE_CHANGED, n_whole
    if nearest.n_shared + facts.slack >= n_whole:
        return None if there.is_cached else (MissCause.BELOW_MINIMUM, nearest.n_shared)
    name = _differing(asked, there)
    if name is None:  # equal blocks became other text: the template looks at the clock, or at what comes later
        return MissCause.TEMPLATE_CHANGED, n_whole
    if name.startswith("tools"):
        return MissCause.TOOLS_CHANGED, n_whole
    return MissCause.SYSTEM_CHANGED if name == "system" else MissCause.MESSAGES_CHANGED, n_whole


def _unknown(facts: Facts) -> Miss | None:
    """Nothing that is known was missed. What was read though no recent prompt has it is a hit all the same."""
    return None if facts.has_read else (facts.lost or MissCause.FIRST_SEEN, facts.n_read)


def _differing(asked: Asked, there: Asked) -> str | None:
    """The first block that one of the two has and the other has not in its place; None when `asked` only goes on."""
    for here, other in zip(asked.blocks, there.blocks, strict=False):
        if here != other:
            return min(here.name, other.name, key=_order)
    n = len(asked.blocks)
    return there.blocks[n].name if n < len(there.blocks) else None


def _order(name: str) -> int:
    return 0 if name.startswith("tools") else 1 if name == "system" else 2


def _place(asked: Asked, nearest: _Beside, decode: Decode) -> Place:
    there, n = nearest.one, nearest.n_shared
    goes_on = asked.blocks[min(len(there.blocks), len(asked.blocks) - 1)].name if asked.blocks else ""
    return Place(
        n,
        _differing(asked, there) or goes_on,
        before=decode(asked.tokens[max(0, n - PLACE_TOKENS) : n]),
        here=decode(asked.tokens[n : n + PLACE_TOKENS]),
        there=decode(there.tokens[n : n + PLACE_TOKENS]),
    )


def _bare(message: Message) -> bytes:
    """The message without what never changes the prompt: marks, and how its text is cut into parts."""
    return msgspec.json.encode(replace(message, parts=(TextPart(message.text),), mark=None))


def _digest(raw: bytes) -> bytes:
    return blake2b(raw, digest_size=BLOCK_DIGEST_BYTES).digest()
