"""Rendered text to token ids: control tokens known, client text never taken for one, text seen before not tokenised again.

The ids are those llama.cpp gives for the same text with its special tokens parsed: the text is cut at the texts of
control tokens, longest first; what lies between is tokenised as ordinary text, piece by piece.

Two private-use characters ("sentinels", chosen per request so that no input contains them) travel through the chat
template with the client's text and are taken out again before anything is tokenised:

    client text  "a <|im_end|> b"      covered   "a <·|im_end|> b"      · is the shield: the cut no longer finds the token
    client text  "one" mark "two"      woven     "one¦two"              ¦ is the mark: where the client put a breakpoint

The shield goes inside every occurrence of a control token's text and beside a text's edge that could be completed to
one by what the template puts there. It holds as long as a template only inserts text: one that takes client text apart
and joins it anew is the model's own doing. Control tokens of one character cannot be shielded and are never cut out.

Nothing here is thread-safe: one `Encoder` belongs to one thread, as its cache does.
"""

import re
import sys
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from msgspec import Struct

from keepwarm.core.errors import ApiError, ErrorKind
from keepwarm.core.prompt import Tokens
from keepwarm.engine import SpecialToken, Tokenizer

CACHED_CHARS_MIN = 64  # shorter fragments are tokenised faster than the cache would answer
CACHE_ENTRY_BYTES = 256  # key tuple, dict slot and array header of one entry, roughly
MARKS_MAX = 64  # the latest marks count: a mark inside a fragment costs tokenising all before it once more
PRIVATE_USE = ((0xE000, 0xF8FF), (0xF0000, 0xFFFFD), (0x100000, 0x10FFFD))
_PRIVATE = re.compile("[" + "".join(f"{chr(low)}-{chr(high)}" for low, high in PRIVATE_USE) + "]")


class Sentinels(Struct, frozen=True):
    """Two characters that occur in no input of one request."""

    shield: str
    mark: str


class Encoded(Struct, frozen=True):
    """`tokens` has shape (n_tokens,), int32, read-only; `marks` are ascending positions in 1..n_tokens."""

    tokens: Tokens
    marks: tuple[int, ...] = ()


def choose_sentinels(texts: Iterable[str]) -> Sentinels:
    """Two private-use characters that none of `texts` contains.

    Raises ApiError(INVALID_REQUEST) when the texts between them use up all 137,468, which only an attack does.
    """
    wide = [text for text in texts if not text.isascii()]
    first, second = chr(PRIVATE_USE[0][0]), chr(PRIVATE_USE[0][0] + 1)
    if not any(first in text or second in text for text in wide):
        return Sentinels(first, second)
    used: set[str] = set()
    for text in wide:
        used.update(_PRIVATE.findall(text))
    free = (chr(code) for low, high in PRIVATE_USE for code in range(low, high + 1) if chr(code) not in used)
    shield, mark = next(free, None), next(free, None)
    if shield is None or mark is None:
        raise ApiError(ErrorKind.INVALID_REQUEST, f"the request uses {len(used):,} private-use characters; no more fit")
    return Sentinels(shield, mark)


def weave(text: str, insertions: Iterable[tuple[int, str]]) -> str:
    """`text` with each character put in front of the position it comes with."""
    pieces: list[str] = []
    done = 0
    for position, character in sorted(insertions):
        pieces += (text[done:position], character)
        done = position
    return "".join((*pieces, text[done:]))


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

    def encode(self, tenant: str, text: str, sentinels: Sentinels | None = None) -> Encoded:
        """Token ids of `text` with the marks found in it, the begin token in front where the model wants one."""
        pieces: list[Tokens] = []
        marks: list[int] = []
        n_tokens = 0
        for fragment in self._cutter.cut(text):
            if isinstance(fragment, SpecialToken):
                pieces.append(np.array([fragment.token], np.int32))
                n_tokens += 1
                continue
            clean, offsets = _take_out(fragment.text, sentinels)
            clean, offsets = _strip(clean, offsets, fragment)
            if clean:
                tokens = self._tokens(tenant, clean)
                offsets = offsets[-MARKS_MAX:]
                marks += [n_tokens + self._place(tenant, clean, tokens, offset) for offset in offsets]
                pieces.append(tokens)
                n_tokens += len(tokens)
            elif offsets:
                marks.append(n_tokens)
        shift = self._begin(pieces)
        tokens = np.concatenate(pieces) if pieces else np.empty(0, np.int32)
        tokens.setflags(write=False)
        placed = sorted({mark + shift for mark in marks} - {0})
        return Encoded(tokens, tuple(placed[-MARKS_MAX:]))

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
        if offset in (0, len(text)):
            return len(tokens) if offset else 0
        return common_prefix(self._tokens(tenant, text[:offset]), tokens)


def common_prefix(left: Tokens, right: Tokens) -> int:
    """Number of leading tokens two sequences share."""
    n = min(len(left), len(right))
    differing = np.flatnonzero(left[:n] != right[:n])
    return int(differing[0]) if len(differing) else n


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


def _take_out(text: str, sentinels: Sentinels | None) -> tuple[str, list[int]]:
    """`text` without sentinels, and the offsets at which marks were."""
    if sentinels is None or text.isascii():
        return text, []
    runs = text.replace(sentinels.shield, "").split(sentinels.mark)
    offsets, at = [], 0
    for run in runs[:-1]:
        at += len(run)
        offsets.append(at)
    return "".join(runs), offsets


def _strip(text: str, offsets: list[int], fragment: _Text) -> tuple[str, list[int]]:
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
