"""What a request's cache breakpoints read and write, by Anthropic's rules. Pure.

A breakpoint with a lifetime leaves an `Entry`: "the first n tokens are known until then". A later request may read a
prefix only where an earlier one left an entry that still lives:

    blocks     1   2   3   4 …        look back at most 20 blocks from each breakpoint, itself the first
    entries        E1      E2         the longest of them that begins this prompt is read: `read_end`
    request    ────────────────B1──B2     what lies between it and the last breakpoint is written

With lifetimes mixed, longer ones come first: A is what is read, B the last breakpoint of an hour, C the last of all; A to B
is written for an hour, B to C for five minutes, what follows C is neither. Lifetimes slide: the entry that is read, and
those that are marked again, live on for their own lifetime or the longer one they are marked with now. Prefixes shorter
than the minimum leave no entry and are no error. Source: Anthropic's prompt caching guide.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence

from blake3 import blake3
from msgspec import Struct
from msgspec.structs import replace

from keepwarm.core.prompt import Breakpoint, Tokens

LOOK_BACK_POSITIONS = 20  # Anthropic's, the breakpoint itself included
LONG_TTL_S = 3600  # from this lifetime on a write is a long one
TOKEN_BYTES = 4


class Entry(Struct, frozen=True):
    """A prefix that a breakpoint wrote. `digest` names its tokens and everything its state depends on."""

    digest: bytes
    n_tokens: int
    position: int  # blocks up to its end, as in `Breakpoint`
    ttl_s: int
    expires_at: float


class Chosen(Struct, frozen=True):
    """What one request reads and writes, in tokens from the prompt's start; 0: nothing.

    At most `read_end` tokens are read (A). `write_end` is where the last breakpoint that is long enough ends (C) and
    `write_long_end` the last of an hour (B): what the engine has to compute up to there is written, also where less was
    read than could be. `kept` are the entries that live on or are new. `n_expired` is the longest prefix that would have
    been read had it still lived, `n_too_far` the same for the look-back.
    """

    read_end: int
    write_end: int
    write_long_end: int
    kept: tuple[Entry, ...] = ()
    n_expired: int = 0
    n_too_far: int = 0


def choose(
    breakpoints: Sequence[Breakpoint],
    tokens: Tokens,
    known: Mapping[int, Mapping[bytes, Entry]],
    *,
    root: bytes,
    tokens_min: int,
    now: float,
) -> Chosen:
    """Apply the rules. `known` are the tenant's entries by length and digest, living or not; `root` goes into each digest.

    Breakpoints without a lifetime do not count here.
    """
    marked = _by_end(one for one in breakpoints if one.ttl_s is not None and one.end >= tokens_min)
    last = max(marked, default=0)
    digests = dict(_digests(root, tokens, sorted({n for n in known if n <= last} | marked.keys())))
    there = {n: entry for n, digest in digests.items() if (entry := known.get(n, {}).get(digest)) is not None}
    near = {n for n, entry in there.items() if _is_near(entry, marked.values())}
    living = {n for n, entry in there.items() if entry.expires_at > now}
    read_end = max(near & living, default=0)
    kept = [_entry(one, digests[end], there.get(end), now) for end, one in marked.items()]
    if read_end and read_end not in marked:
        kept.append(replace(there[read_end], expires_at=now + there[read_end].ttl_s))
    return Chosen(
        read_end=read_end,
        write_end=last,
        write_long_end=max((end for end, one in marked.items() if _ttl_s(one) >= LONG_TTL_S), default=0),
        kept=tuple(kept),
        n_expired=max((n for n in near - living if n > read_end), default=0),
        n_too_far=max((n for n in living - near if n > read_end), default=0),
    )


def _by_end(breakpoints: Iterable[Breakpoint]) -> dict[int, Breakpoint]:
    """One breakpoint for each end, ascending: the longest lifetime and the last position where several end together."""
    found: dict[int, Breakpoint] = {}
    for one in sorted(breakpoints, key=lambda one: one.end):
        other = found.get(one.end, one)
        ttl_s, position = max(_ttl_s(one), _ttl_s(other)), max(one.position, other.position)
        found[one.end] = Breakpoint(one.end, ttl_s, position)
    return found


def _entry(one: Breakpoint, digest: bytes, known: Entry | None, now: float) -> Entry:
    """The entry that a breakpoint leaves, or goes on with: one that is marked again for less keeps its own lifetime."""
    lives = known is not None and known.expires_at > now
    ttl_s = max(_ttl_s(one), known.ttl_s if known is not None and lives else 0)
    return Entry(digest, one.end, one.position, ttl_s, now + ttl_s)


def _is_near(entry: Entry, breakpoints: Iterable[Breakpoint]) -> bool:
    """Whether some breakpoint looks back as far as this entry's end."""
    return any(entry.n_tokens <= one.end and one.position - entry.position < LOOK_BACK_POSITIONS for one in breakpoints)


def _ttl_s(one: Breakpoint) -> int:
    return one.ttl_s or 0


def _digests(root: bytes, tokens: Tokens, lengths: Sequence[int]) -> Iterator[tuple[int, bytes]]:
    """The digest of each prefix of these ascending lengths, in one pass over the tokens."""
    hasher, at = blake3(root), 0
    raw = memoryview(tokens[: lengths[-1] if lengths else 0].astype("<i4").tobytes())
    for n in lengths:
        hasher.update(raw[at * TOKEN_BYTES : n * TOKEN_BYTES])
        at = n
        yield n, hasher.digest()
