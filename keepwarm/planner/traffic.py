"""Prompts as schemes see them: chains of numbered prefixes with times, and places where a mark could stand."""

from collections.abc import Iterable, Sequence
from itertools import pairwise

from msgspec import Struct

COMMON, SHARED, END = "common beginning", "shared prefix", "end"  # places in a trace, which knows no messages
TOOLS, SYSTEM, LAST = "tools", "system", "last message"  # places in a log, beside "message 1" and so on


class Spot(Struct, frozen=True, gc=False):
    """A prefix of a prompt where an entry can end: its first `end` tokens.

    `key` is the same in two prompts if these tokens are. `position` counts the request's blocks (tools, texts, calls) up
    to there; 0 where that is not known.
    """

    key: int
    end: int
    position: int = 0


class Prompt(Struct, frozen=True, gc=False):
    """One request. `n_output` None: the log does not say.

    `blocks` are whole blocks of `Traffic.block_tokens` from the start, each number naming all up to its end; `spots` are
    ascending in `end`; `places` maps names such as "system" or "message 2" to indices of `spots`.
    """

    at_s: float
    n_tokens: int
    blocks: tuple[int, ...]
    spots: tuple[Spot, ...]
    places: dict[str, int]
    n_output: int | None = None

    def spot(self, place: str) -> Spot | None:
        index = self.places.get(place)
        return None if index is None else self.spots[index]


class Traffic(Struct, frozen=True):
    """Requests in the order of their times."""

    name: str
    block_tokens: int
    prompts: tuple[Prompt, ...]

    @property
    def n_tokens(self) -> int:
        return sum(prompt.n_tokens for prompt in self.prompts)

    @property
    def places(self) -> tuple[str, ...]:
        """Names of all places, in the order in which they come up."""
        return tuple(dict.fromkeys(place for prompt in self.prompts for place in prompt.places))


class Chain(Struct, frozen=True, gc=False):
    """A request of a trace: block numbers and lengths, without messages."""

    at_s: float
    n_tokens: int
    blocks: tuple[int, ...]
    n_output: int | None = None


def traced(name: str, block_tokens: int, chains: Sequence[Chain]) -> Traffic:
    """A trace as traffic. A mark may stand after any whole block; three places have names:

    `COMMON` is where requests that begin alike first part, `SHARED` the longest prefix that another request of the trace
    begins with too, `END` the end of the last whole block. Only one who knows the whole trace can mark `SHARED`.
    """
    whole = [chain.blocks[: chain.n_tokens // block_tokens] for chain in chains]
    n_users: dict[int, int] = {}
    for blocks in whole:
        for block in blocks:
            n_users[block] = n_users.get(block, 0) + 1
    commons = _forks(whole)
    prompts = []
    for chain, blocks in zip(chains, whole, strict=True):
        spots = tuple(Spot(block, (k + 1) * block_tokens) for k, block in enumerate(blocks))
        places = {}
        n_shared = sum(1 for block in blocks if n_users[block] > 1)  # users only get fewer along a chain
        n_common = next((k for k, block in enumerate(blocks) if block in commons), len(blocks) - 1) + 1
        if 0 < n_common <= n_shared:
            places[COMMON] = n_common - 1
        if n_shared:
            places[SHARED] = n_shared - 1
        if blocks:
            places[END] = len(blocks) - 1
        prompts.append(Prompt(chain.at_s, chain.n_tokens, blocks, spots, places, chain.n_output))
    return Traffic(name, block_tokens, tuple(prompts))


def _forks(chains: Iterable[Sequence[int]]) -> set[int]:
    """Blocks that more than one block comes after."""
    follower: dict[int, int] = {}
    forks = set()
    for chain in chains:
        for block, after in pairwise(chain):
            if follower.setdefault(block, after) != after:
                forks.add(block)
    return forks
