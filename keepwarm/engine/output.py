"""Reads an answer as it is sampled: bytes of tokens to text, reasoning and tool calls; finds stop strings.

    bytes ─ UTF-8 decoder ─ stop strings ─ segments (text | reasoning | tool call) ─ deltas

Each stage holds back only what it cannot decide yet: part of a character, the beginning of a stop string, the beginning
of a tag, a call that is not complete. Where the bytes were split never matters: the deltas, joined, are the same.

- The first stop string is the one that is complete first (of two that end together, the longer one). Neither it nor
  anything after it is told. It is looked for in everything the model writes, reasoning and calls included.
- A call is told when its JSON is complete: name first, then the arguments exactly as the model wrote them. What looked
  like a call and is none is told as text. White space around calls is told only where text follows it.
- Everything else is told as it was written, tags of reasoning and calls excepted.

An answer that begins inside reasoning because the generation prompt ends with <think> is not recognised as such.
"""

import codecs
from collections import deque
from collections.abc import Iterable

from msgspec.structs import replace

from keepwarm.core.event import Delta, TextDelta, TokenLogprob
from keepwarm.core.prompt import OutputRules
from keepwarm.engine.segments import Segments, begun, joined


class OutputReader:
    """Reads one answer. `feed` each sampled token's bytes, then `finish` once."""

    def __init__(self, rules: OutputRules) -> None:
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self._stops = StopFinder(rules.stop)
        self._segments = Segments(rules.tool_format, reasoning=rules.reasoning)
        self._n_chars = 0  # decoded so far
        self._logprobs: deque[tuple[int, TokenLogprob]] = deque()  # with the first character of their token
        self._stop: str | None = None

    @property
    def saw_tool_call(self) -> bool:
        """Whether a complete tool call has been told."""
        return self._segments.n_calls > 0

    def feed(self, piece: bytes, logprob: TokenLogprob | None = None) -> tuple[list[Delta], str | None]:
        """Deltas that this token settles, and the stop string if one has been hit: then only `finish` may follow."""
        if self._stop is not None:
            return [], self._stop
        if logprob is not None:
            self._logprobs.append((self._n_chars, logprob))
        deltas = joined(self._read(self._decode(piece), final=False))
        self._attach(deltas, told=self._n_chars - self._stops.n_held - self._segments.n_held)
        return deltas, self._stop

    def finish(self) -> list[Delta]:
        """What was held back. An incomplete character becomes U+FFFD; logprobs left over come with an empty text."""
        deltas: list[Delta] = []
        if self._stop is None:
            deltas += self._read(self._decode(b"", True), final=True)
        deltas = joined([*deltas, *self._segments.finish()])
        if self._logprobs and not any(isinstance(delta, TextDelta) for delta in deltas):
            deltas.append(TextDelta(""))
        self._attach(deltas, told=self._n_chars + 1)
        return deltas

    def _read(self, text: str, *, final: bool) -> list[Delta]:
        self._n_chars += len(text)
        clear, self._stop = self._stops.feed(text)
        if final and self._stop is None:
            clear += self._stops.finish()
        return self._segments.feed(clear)

    def _attach(self, deltas: list[Delta], told: int) -> None:
        """Give the last text the logprobs of all tokens that begin in the first `told` characters; no text, no logprobs."""
        for i in reversed(range(len(deltas))):
            delta = deltas[i]
            if isinstance(delta, TextDelta):
                due = []
                while self._logprobs and self._logprobs[0][0] < told:
                    due.append(self._logprobs.popleft()[1])
                deltas[i] = replace(delta, logprobs=tuple(due))
                return


class StopFinder:
    """Passes text through up to the first stop string."""

    def __init__(self, stops: Iterable[str]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""

    @property
    def n_held(self) -> int:
        """Characters held back."""
        return len(self._held)

    def feed(self, text: str) -> tuple[str, str | None]:
        """Text that certainly comes before any stop string, and the stop string when it is complete."""
        if not self._stops:
            return text, None
        text = self._held + text
        found = [(start + len(stop), start, stop) for stop in self._stops if (start := text.find(stop)) >= 0]
        if found:
            _, start, stop = min(found)
            self._held = ""
            return text[:start], stop
        n_clear = len(text) - begun(text, self._stops)
        self._held = text[n_clear:]
        return text[:n_clear], None

    def finish(self) -> str:
        """What was held back and has turned out to be text."""
        text, self._held = self._held, ""
        return text
