"""What a request's cache breakpoints read and write, by Anthropic's rules. Pure.

A breakpoint with a lifetime, once its prompt was computed, leaves an `Entry`: "the first n tokens are known until then".
A later request may read a prefix only where an earlier one left an entry that still lives:

    blocks     1   2   3   4 …        look back at most 20 blocks from each breakpoint, itself the first
    entries        E1      E2         the longest of them that begins this prompt is read: `read_end`
    request    ────────────────B1──B2     what lies between it and the last breakpoint is written

With lifetimes mixed, longer ones come first: A is what is read, B the last breakpoint of an hour behind A, C the last of
all; A to B is written for an hour, B to C for five minutes, what follows C is neither. Reading an entry renews it.
Prefixes shorter than the minimum leave no entry and are no error. Source: Anthropic's prompt caching guide.
"""

from collections.abc import Iterator, Mapping, Sequence

from blake3 import blake3
from msgspec import Struct
from msgspec.structs import replace

from keepwarm.core.prompt import Breakpoint, Tokens

LOOK_BACK_POSITIONS = 20  # Anthropic's, the breakpoint itself included
LONG_TTL_S = 3600  # from this lifetime on a write is a long one


class Entry(Struct, frozen=True):
    """A prefix that a breakpoint wrote. `digest` names its tokens and everything its state depends on."""

    digest: bytes
    n_tokens: int
    position: int  # blocks up to its end, as in `Breakpoint`
    ttl_s: int
    expires_at: float


class Chosen(Struct, frozen=True):
    """What one request reads and writes.

    `read` lives on for its own lifetime again, and `written` are new or renewed, once the prompt is computed. `expired`
    is the longest prefix that would have been read had it still lived, in tokens; `too_far` the same for the look-back.
    """

    read: Entry | None
    written: tuple[Entry, ...]
    write_end: int
    write_long_end: int
    expired: int = 0
    too_far: int = 0

    @property
    def read_end(self) -> int:
        """At most so many tokens are read."""
        return self.read.n_tokens if self.read is not None else 0

    @property
    def end(self) -> int:
        """Where the last breakpoint that counts ends; 0 when all of them are too short."""
        return max(self.read_end, self.write_end)

    @property
    def kept(self) -> tuple[Entry, ...]:
        """All entries that live on from this request, with their new time of expiry."""
        return self.written if self.read is None else (self.read, *self.written)


def choose(
    breakpoints: Sequence[Breakpoint],
    tokens: Tokens,
    known: Mapping[int, Sequence[Entry]],
    *,
    root: bytes,
    tokens_min: int,
    now: float,
) -> Chosen:
    """Apply the rules. `known` are the tenant's entries by their length, living or not; `root` goes into every digest.

    Breakpoints are ascending; those without a lifetime are not counted here.
    """
    usable = [one for one in breakpoints if one.ttl_s is not None and one.end >= tokens_min]
    lengths = sorted({*known, *(one.end for one in usable)})
    digests = dict(_digests(root, tokens, lengths))
    begins = [entry for n, digest in digests.items() for entry in known.get(n, ()) if entry.digest == digest]
    near = [entry for entry in begins if _is_near(entry, usable)]
    living = [entry for entry in near if entry.expires_at > now]
    read = max(living, key=lambda entry: entry.n_tokens, default=None)
    read_end = read.n_tokens if read is not None else 0
    written = tuple(
        Entry(digests[one.end], one.end, one.position, one.ttl_s, now + one.ttl_s)
        for one in usable
        if one.ttl_s is not None and one.end > read_end
    )
    return Chosen(
        read=None if read is None else replace(read, expires_at=now + _ttl(read, usable)),
        written=written,
        write_end=max((entry.n_tokens for entry in written), default=0),
        write_long_end=max((entry.n_tokens for entry in written if entry.ttl_s >= LONG_TTL_S), default=0),
        expired=_longest(entry for entry in near if entry.expires_at <= now and entry.n_tokens > read_end),
        too_far=_longest(entry for entry in begins if entry.expires_at > now and entry.n_tokens > read_end),
    )


def _ttl(read: Entry, breakpoints: Sequence[Breakpoint]) -> int:
    """A prefix that is marked again, for longer, lives longer."""
    return max([read.ttl_s, *(one.ttl_s or 0 for one in breakpoints if one.end == read.n_tokens)])


def _is_near(entry: Entry, breakpoints: Sequence[Breakpoint]) -> bool:
    """Whether some breakpoint looks back as far as this entry's end."""
    return any(entry.n_tokens <= one.end and one.position - entry.position < LOOK_BACK_POSITIONS for one in breakpoints)


def _longest(entries: Iterator[Entry]) -> int:
    return max((entry.n_tokens for entry in entries), default=0)


def _digests(root: bytes, tokens: Tokens, lengths: Sequence[int]) -> Iterator[tuple[int, bytes]]:
    """The digest of each prefix of these ascending lengths, in one pass over the tokens."""
    hasher, at = blake3(root), 0
    for n in lengths:
        if n > len(tokens):
            return
        hasher.update(tokens[at:n].astype("<i4").tobytes())
        at = n
        yield n, hasher.digest()
