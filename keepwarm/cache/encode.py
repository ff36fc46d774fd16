"""Rendered text to token ids: control tokens known, client text never taken for one, text seen before not tokenised again.

The ids are those llama.cpp gives for the same text with its special tokens parsed: the text is cut at the texts of
control tokens, longest first; what lies between is tokenised as ordinary text, piece by piece.

A few private-use characters ("sentinels", chosen per request so that no input contains them) travel through the chat
template with the client's text and are taken out again before anything is tokenised:

    client text  "a <|im_end|> b"      covered   "a <·|im_end|> b"      · is the shield: the cut no longer finds the token
    client text  "one" mark "two"      woven     "one¦two"              ¦ is a mark, a character of its own for each one

Where the marks were found, as offsets into the text without them, `encode` says after which token each one lies. That
place depends on the text before it alone: tokens that other words behind it could change are left out, so a prefix that
is marked again, with whatever follows, is the same tokens.

The shield goes inside every occurrence of a control token's text and beside a text's edge that could be completed to
one by what the template puts there. It holds as long as a template only inserts text: one that takes client text apart
and joins it anew is the model's own doing. Control tokens of one character cannot be shielded and are never cut out.

Nothing here is thread-safe: one `Encoder` belongs to one thread, as its cache does.
"""

import re
import sys
from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import numpy as np
from msgspec import Struct

from keepwarm.core.errors import ApiError, ErrorKind
from keepwarm.core.prompt import Tokens, common_prefix
from keepwarm.engine import SpecialToken, Tokenizer

CACHED_CHARS_MIN = 64  # shorter fragments are tokenised faster than the cache would answer
CACHE_ENTRY_BYTES = 256  # key tuple, dict slot and array header of one entry, roughly
WINDOW_CHARS = 48  # looked at before a mark; eight times as many while nothing of them is settled
WINDOW_CHARS_MAX = 3072  # a run of one character may be a token however long it is
# First characters that join differently with the text before them.
CONTINUATIONS = ("a", "Z", "7", " b", "\n", "(", "<", "é", "你")
PRIVATE_USE = ((0xE000, 0xF8FF), (0xF0000, 0xFFFFD), (0x100000, 0x10FFFD))
# Letters, digits or neither, with the character before, which tokenisers keep together with a word. What follows a text can
# change how its last word is cut; a long one (Chinese, a ruled line) is taken to be settled so far from its end.
_LAST_WORD = re.compile(r"(?:.?[^\W\d_]{1,32}|.?\d{1,32}|[\W_]{1,32})\Z", re.DOTALL)
_PRIVATE = re.compile("[" + "".join(f"{chr(low)}-{chr(high)}" for low, high in PRIVATE_USE) + "]")


class Sentinels(Struct, frozen=True):
    """Characters that occur in no input of one request: the shield, and one for each mark."""

    shield: str
    marks: str = ""


class Encoded(Struct, frozen=True):
    """`tokens` has shape (n_tokens,), int32, read-only; `ends` are the positions in it of the offsets asked for."""

    tokens: Tokens
    ends: tuple[int, ...] = ()


def choose_sentinels(texts: Iterable[str], n_marks: int = 0) -> Sentinels:
    """Private-use characters that none of `texts` contains.

    Raises ApiError(INVALID_REQUEST) when the texts between them use up all 137,468, which only an attack does.
    """
    wide = [text for text in texts if not text.isascii()]
    first = [chr(PRIVATE_USE[0][0] + i) for i in range(1 + n_marks)]
    if not any(character in text for text in wide for character in first):
        return Sentinels(first[0], "".join(first[1:]))
    used: set[str] = set()
    for text in wide:
        used.update(_PRIVATE.findall(text))
    codes = (chr(code) for low, high in PRIVATE_USE for code in range(low, high + 1))
    free = list(islice((character for character in codes if character not in used), 1 + n_marks))
    if len(free) <= n_marks:
        raise ApiError(ErrorKind.INVALID_REQUEST, f"the request uses {len(used):,} private-use characters; no more fit")
    return Sentinels(free[0], "".join(free[1:]))


def weave(text: str, insertions: Iterable[tuple[int, str]]) -> str:
    """`text` with each character put in front of the position it comes with."""
    pieces: list[str] = []
    done = 0
    for position, character in sorted(insertions):
        pieces += (text[done:position], character)
        done = position
    return "".join((*pieces, text[done:]))


def unweave(text: str, marks: str) -> tuple[str, list[int | None]]:
    """`text` without the characters `marks`, and for each of them where it first stood in what is left."""
    if not marks or text.isascii():
        return text, [None] * len(marks)
    first = [text.find(mark) for mark in marks]
    before = sorted(found.start() for found in re.finditer(f"[{marks}]", text))
    places = [at - bisect_left(before, at) if at >= 0 else None for at in first]
    return re.sub(f"[{marks}]", "", text), places


class Shield:
    """Finds where client text has to be broken up so that it cannot be read as a control token."""

    def __init__(self, specials: Sequence[SpecialToken]) -> None:
        # White space is no threat, and breaking it up would keep templates from trimming it.
        texts = sorted({s.text for s in specials if len(s.text) > 1 and not s.text.isspace()}, key=len, reverse=True)
        either = _either(texts)
        self._inside = re.compile(either)
        self._starts = re.compile(f"(?={either})", re.DOTALL)  # overlapping occurrences too
        self._heads = frozenset(text[:k] for text in texts for k in range(1, len(text)))
        self._tails = frozenset(text[k:] for text in texts for k in range(1, len(text)))
        self._first = frozenset(text[0] for text in texts)
        self._last = frozenset(text[-1] for text in texts)
        self._all = "\0".join(texts)
        self._edge_chars = max((len(text) for text in texts), default=1) - 1

    def inside(self, text: str) -> list[int]:
        """Positions that break every control token's text contained in `text`."""
        if self._inside.search(text) is None:
            return []
        return [found.start() + 1 for found in self._starts.finditer(text)]

    def around(self, text: str) -> list[int]:
        """`inside` and the edges: what could end or begin a control token's text together with its surroundings."""
        found = self.inside(text)
        head, tail = text[: self._edge_chars], text[-self._edge_chars :] if self._edge_chars else ""
        if any(c in self._last and head[: i + 1] in self._tails for i, c in enumerate(head)):
            found.append(0)
        if any(c in self._first and tail[i:] in self._heads for i, c in enumerate(tail)):
            found.append(len(text))
        return found

    def everywhere(self, text: str) -> list[int]:
        """`around`, and the beginning of a text that a template could put into the middle of a control token's."""
        found = self.around(text)
        return found or ([0] if text and len(text) <= self._edge_chars and text in self._all else found)


class FragmentCache:
    """Token ids of fragments by tenant and text, least recently used out first, bounded in bytes (texts included)."""

    def __init__(self, bytes_max: int) -> None:
        self.bytes_max = bytes_max
        self.n_bytes = 0
        self._entries: OrderedDict[tuple[str, str], Tokens] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, tenant: str, text: str) -> Tokens | None:
        key = (tenant, text)
        tokens = self._entries.get(key)
        if tokens is not None:
            self._entries.move_to_end(key)
        return tokens

    def put(self, tenant: str, text: str, tokens: Tokens) -> None:
        """Keep `tokens`, unless they alone are more than the cache may hold. The key must be new."""
        n_bytes = _entry_bytes(text, tokens)
        if n_bytes > self.bytes_max:
            return
        assert (tenant, text) not in self._entries
        self._entries[tenant, text] = tokens
        self.n_bytes += n_bytes
        while self.n_bytes > self.bytes_max:
            (_, old_text), old_tokens = self._entries.popitem(last=False)
            self.n_bytes -= _entry_bytes(old_text, old_tokens)


class Encoder:
    """Tokenises rendered text of any tenant with one vocabulary. For one thread only."""

    def __init__(self, tokenizer: Tokenizer, *, fragment_cache_bytes: int) -> None:
        self._tokenizer = tokenizer
        self._cutter = _Cutter(tokenizer.specials)
        self.cache = FragmentCache(fragment_cache_bytes)

    def encode(self, tenant: str, text: str, shield: str = "", offsets: Sequence[int] = ()) -> Encoded:
        """Token ids of `text` without `shield`, the begin token in front where the model wants one.

        `offsets` are places in the text without shields; one inside a control token's text is taken as before it.
        """
        pieces: list[Tokens] = []
        ends = dict.fromkeys(offsets, 0)
        waiting = sorted(offset for offset in ends if offset > 0)
        n_tokens, at = 0, 0
        for fragment in self._cutter.cut(text):
            clean = fragment.text.replace(shield, "") if shield else fragment.text
            start, at = at, at + len(clean)
            here, waiting = _split(waiting, at)
            if isinstance(fragment, SpecialToken):
                tokens, places = np.array([fragment.token], np.int32), [int(offset == at) for offset in here]
            else:
                clean, relative = _strip(clean, [offset - start for offset in here], fragment)
                tokens = self._tokens(tenant, clean) if clean else np.empty(0, np.int32)
                places = [self._place(tenant, clean, tokens, offset) for offset in relative]
            ends.update((offset, n_tokens + place) for offset, place in zip(here, places, strict=True))
            pieces.append(tokens)
            n_tokens += len(tokens)
        shift = self._begin(pieces)
        tokens = np.concatenate(pieces) if pieces else np.empty(0, np.int32)
        tokens.setflags(write=False)
        return Encoded(tokens, tuple(ends[offset] + shift if ends[offset] else 0 for offset in offsets))

    def before_control(self, text: str, shield: str, offset: int) -> int:
        """`offset`, or the beginning of the control token whose text it lies inside."""
        at = 0
        for fragment in self._cutter.cut(text):
            start, at = at, at + len(fragment.text.replace(shield, ""))
            if offset <= at:
                return start if isinstance(fragment, SpecialToken) and offset < at else offset
        return offset

    def _begin(self, pieces: list[Tokens]) -> int:
        bos = self._tokenizer.bos
        if bos is None or (pieces and pieces[0][0] == bos):
            return 0
        pieces.insert(0, np.array([bos], np.int32))
        return 1

    def _tokens(self, tenant: str, text: str) -> Tokens:
        if len(text) < CACHED_CHARS_MIN:
            return np.array(self._tokenizer.encode_plain(text), np.int32)
        tokens = self.cache.get(tenant, text)
        if tokens is None:
            tokens = np.array(self._tokenizer.encode_plain(text), np.int32)
            tokens.setflags(write=False)
            self.cache.put(tenant, text, tokens)
        return tokens

    def _place(self, tenant: str, text: str, tokens: Tokens, offset: int) -> int:
        """Token position of a mark `offset` characters into `text`: the last one that the text before it settles."""
        head = text[:offset]
        if not head:
            return 0
        before = tokens if offset == len(text) else self._tokens(tenant, head)
        # In the end what counts is what is there: should it differ still, the mark moves to where it does.
        return common_prefix(before[: len(before) - self._n_unsettled(head)], tokens)

    def _n_unsettled(self, head: str) -> int:
        """How many of the last tokens of `head` depend on what follows it: its last word's, and what trying shows."""
        n_chars = WINDOW_CHARS
        while True:
            window = head[-n_chars:]
            tokens = np.array(self._tokenizer.encode_plain(window), np.int32)
            last = _LAST_WORD.search(window)
            others = [window[: last.start() if last else 0], *(window + more for more in (*CONTINUATIONS, window[-1]))]
            n_settled = min(common_prefix(tokens, np.array(self._tokenizer.encode_plain(o), np.int32)) for o in others)
            if n_settled or n_chars >= min(len(head), WINDOW_CHARS_MAX):
                return len(tokens) - n_settled
            n_chars *= 8


class _Text(Struct):
    """Text between control tokens; `strip_*` when the neighbour on that side swallows white space."""

    text: str
    strip_left: bool = False
    strip_right: bool = False


_Fragment = SpecialToken | _Text


class _Cutter:
    """Cuts text at control tokens in llama.cpp's order: the longest token over the whole text first.

    One regex finds them all, unless two of them can overlap ("ab<" and "b<c>"): then the shorter one gets a later pass.
    """

    def __init__(self, specials: Sequence[SpecialToken]) -> None:
        self._by_text: dict[str, SpecialToken] = {}
        for special in specials:
            if len(special.text) > 1:
                self._by_text.setdefault(special.text, special)
        self._passes = [re.compile(_either(texts)) for texts in _passes(sorted(self._by_text, key=len, reverse=True))]

    def cut(self, text: str) -> list[_Fragment]:
        fragments: list[_Fragment] = [_Text(text)]
        for pattern in self._passes:
            fragments = [
                piece
                for fragment in fragments
                for piece in (self._cut(pattern, fragment) if isinstance(fragment, _Text) else (fragment,))
            ]
        return fragments

    def _cut(self, pattern: re.Pattern[str], fragment: _Text) -> Iterator[_Fragment]:
        text, done, strip_left = fragment.text, 0, fragment.strip_left
        for found in pattern.finditer(text):
            special = self._by_text[found.group()]
            if found.start() > done:
                yield _Text(text[done : found.start()], strip_left, special.strips_left)
            yield special
            done, strip_left = found.end(), special.strips_right
        if done < len(text):
            yield _Text(text[done:], strip_left, fragment.strip_right)


def _passes(texts: Sequence[str]) -> Iterator[list[str]]:
    """`texts` (longest first) in runs within which no text's end is another's beginning."""
    run: list[str] = []
    heads: set[str] = set()
    tails: set[str] = set()
    for text in texts:
        own_heads = {text[:k] for k in range(1, len(text))}
        own_tails = {text[k:] for k in range(1, len(text))}
        if own_heads & tails or own_tails & heads:
            yield run
            run, heads, tails = [], set(), set()
        run.append(text)
        heads |= own_heads
        tails |= own_tails
    if run:
        yield run


def _either(texts: Sequence[str]) -> str:
    """A pattern for any of `texts`, the earlier one where several fit; one that never matches when there are none."""
    return "(?:" + "|".join(re.escape(text) for text in texts) + ")" if texts else r"(?!)"


def _split(offsets: list[int], at: int) -> tuple[list[int], list[int]]:
    """Ascending `offsets` up to `at`, and those behind."""
    n = bisect_right(offsets, at)
    return offsets[:n], offsets[n:]


def _strip(text: str, offsets: Sequence[int], fragment: _Text) -> tuple[str, list[int]]:
    space = " \t\n\v\f\r"  # what C's isspace takes for white space
    if fragment.strip_right:
        text = text.rstrip(space)
    if fragment.strip_left:
        kept = text.lstrip(space)
        offsets = [max(offset - len(text) + len(kept), 0) for offset in offsets]
        text = kept
    return text, [min(offset, len(text)) for offset in offsets]


def _entry_bytes(text: str, tokens: Tokens) -> int:
    return sys.getsizeof(text) + tokens.nbytes + CACHE_ENTRY_BYTES
