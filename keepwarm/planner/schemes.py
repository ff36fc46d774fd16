"""Caching schemes replayed over traffic. Pure; a result names tokens by class for every prompt, and no money.

What all of them suppose: room for everything (an entry goes when its time is over, never sooner), one tenant, and an entry
that is there for every request after the one that made it, also where both arrive in the same second.
"""

from collections.abc import Mapping, Sequence

from msgspec import Struct

from keepwarm.core.event import Usage
from keepwarm.planner.traffic import Prompt, Spot

LONG_S = 3600  # writes that are to stay for this long or longer pay the price of long ones


class Life(Struct, frozen=True):
    """A cache object from its making to `ttl_s` after its last use. `uses` are indices of prompts, in order."""

    n_tokens: int
    lived_s: float
    uses: tuple[int, ...]


def uncached(prompts: Sequence[Prompt]) -> list[Usage]:
    """All of every prompt is computed."""
    return [Usage(prompt.n_tokens, 0, 0, prompt.n_output or 0) for prompt in prompts]


def automatic(
    prompts: Sequence[Prompt], block_tokens: int, ttl_s: float, *, tokens_min: int, step_tokens: int = 1
) -> list[Usage]:  # fmt: skip
    """The longest prefix of whole blocks that was in a prompt of the last `ttl_s` seconds is read.

    Reads begin at `tokens_min`, end at a multiple of `step_tokens`, and leave one token to compute. Writes cost nothing.
    """
    last_s: dict[int, float] = {}
    usages = []
    for prompt in prompts:
        n_blocks = 0
        for block in prompt.blocks:
            seen_s = last_s.get(block)
            if seen_s is None or prompt.at_s - seen_s > ttl_s:
                break
            n_blocks += 1
        n_read = min(n_blocks * block_tokens, prompt.n_tokens - 1) // step_tokens * step_tokens
        if n_read < tokens_min:
            n_read = 0
        for block in prompt.blocks:
            last_s[block] = prompt.at_s
        usages.append(Usage(prompt.n_tokens - n_read, n_read, 0, prompt.n_output or 0))
    return usages


def marked(
    prompts: Sequence[Prompt], marks: Mapping[str, int], *, tokens_min: int, lookback: int | None
) -> list[Usage]:  # fmt: skip
    """Breakpoints at places, each with a lifetime in seconds that begins anew with every use.

    Read is the longest entry that ends at a mark or less than `lookback` blocks of the request before one (None: anywhere
    before); what lies between it and the last mark is written, and what lies behind that is fresh. Prefixes under
    `tokens_min` are neither written nor read.
    """
    known: dict[int, tuple[float, int]] = {}  # key: expires at, lifetime
    usages = []
    for prompt in prompts:
        own = [
            (prompt.spots[index], ttl_s)
            for place, ttl_s in marks.items()
            if (index := prompt.places.get(place)) is not None and prompt.spots[index].end >= tokens_min
        ]
        found = _found(prompt, own, known, lookback)
        n_read = 0 if found is None else found.end
        n_marked = max((spot.end for spot, _ in own), default=0)
        n_long = max((spot.end for spot, ttl_s in own if ttl_s >= LONG_S), default=0)
        if found is not None:
            own.append((found, known[found.key][1]))
        for spot, ttl_s in own:
            expires_s, longest_s = known.get(spot.key, (prompt.at_s, 0))
            if expires_s < prompt.at_s:
                longest_s = 0
            known[spot.key] = max(expires_s, prompt.at_s + ttl_s), max(longest_s, ttl_s)
        usages.append(
            Usage(
                fresh=prompt.n_tokens - n_marked,
                cache_read=n_read,
                cache_write=n_marked - n_read,
                output=prompt.n_output or 0,
                cache_write_long=max(0, n_long - n_read),
            )
        )
    return usages


def lives(prompts: Sequence[Prompt], place: str, ttl_s: float, *, tokens_min: int) -> list[Life]:
    """The cache objects that clients would make of the prefixes at a place.

    One is made by the first request that has the prefix, read by all that have it, and its time set anew by each; a request
    that comes when its time is over makes another one.
    """
    running: dict[int, list[int]] = {}
    ended: list[tuple[int, list[int]]] = []
    ends: dict[int, int] = {}
    for i, prompt in enumerate(prompts):
        spot = prompt.spot(place)
        if spot is None or spot.end < tokens_min:
            continue
        ends[spot.key] = spot.end
        uses = running.get(spot.key)
        if uses is not None and prompt.at_s - prompts[uses[-1]].at_s > ttl_s:
            ended.append((spot.key, uses))
            uses = None
        if uses is None:
            uses = running[spot.key] = []
        uses.append(i)
    found = [
        Life(ends[key], prompts[uses[-1]].at_s - prompts[uses[0]].at_s + ttl_s, tuple(uses))
        for key, uses in (*ended, *running.items())
    ]
    return sorted(found, key=lambda life: life.uses)


def _found(
    prompt: Prompt, own: Sequence[tuple[Spot, int]], known: Mapping[int, tuple[float, int]], lookback: int | None
) -> Spot | None:  # fmt: skip
    """The longest live entry that one of the marks sees."""
    last = max((spot.end for spot, _ in own), default=0)
    for spot in reversed(prompt.spots):
        if spot.end > last:
            continue
        entry = known.get(spot.key)
        if entry is None or entry[0] < prompt.at_s:
            continue
        if lookback is None or any(
            spot.end <= mark.end and mark.position - spot.position < lookback for mark, _ in own
        ):
            return spot
    return None
