"""What the engine says while a turn runs, and what it counted.

A turn's stream is: `Started`, any number of deltas, one `ChoiceFinished` per choice, then exactly one terminal event,
`Finished` or `Failed`. `Failed` may come at any time.
"""

from typing import Literal

from msgspec import Struct

from keepwarm.core.cache_lookup import CacheLookup
from keepwarm.core.errors import ErrorKind

FinishReason = Literal["stop", "length", "tool_calls"]


class Usage(Struct, frozen=True):
    """The engine's counts in tokens, disjoint: prompt = fresh + cache_read + cache_write.

    `cache_read` was restored, `cache_write` evaluated and stored because an object or a breakpoint asked for it, `fresh`
    evaluated otherwise (automatic storing is not a write). `cache_write_long` is the part of `cache_write` that was asked
    to stay for an hour (Anthropic's ttl "1h"). `output` counts sampled tokens, the end token included.
    """

    fresh: int
    cache_read: int
    cache_write: int
    output: int
    cache_write_long: int = 0

    @property
    def prompt(self) -> int:
        return self.fresh + self.cache_read + self.cache_write


class TokenLogprob(Struct, frozen=True):
    """One token with its natural-log probability and the most likely ones at that place."""

    token: bytes
    logprob: float
    top: tuple[tuple[bytes, float], ...] = ()


class Started(Struct, frozen=True, tag="started"):
    """The prompt was looked up and restored; evaluation of the rest begins.

    `n_found` tokens were stored and could have been read: more than `cache_read` where computing was expected to be faster,
    or a block was damaged. `usage` is what the prompt comes to if the turn gets to its answer, without output. `lookup`,
    which the gateway adds, says what the look-up came to.
    """

    n_prompt: int
    cache_read: int
    tier: str | None = None
    usage: Usage | None = None
    n_found: int = 0
    lookup: CacheLookup | None = None


class TextDelta(Struct, frozen=True, tag="text"):
    """Text of the answer: whole UTF-8 characters, never part of a stop string. May be empty when only logprobs came."""

    text: str
    choice: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()


class ReasoningDelta(Struct, frozen=True, tag="reasoning"):
    """Text between the model's thinking tags."""

    text: str
    choice: int = 0


class ToolCallDelta(Struct, frozen=True, tag="tool_call"):
    """Part of tool call number `index`. The first delta of a call carries `name`; arguments are JSON text pieces."""

    index: int
    name: str | None = None
    arguments: str = ""
    choice: int = 0


class ChoiceFinished(Struct, frozen=True, tag="choice_finished"):
    """A choice is complete. `stop` is the stop string that ended it, if one did. `n_output` are its sampled tokens."""

    reason: FinishReason
    n_output: int
    choice: int = 0
    stop: str | None = None


class Timings(Struct, frozen=True):
    """Milliseconds by phase as the engine measured them; 0.0 means the phase did not take place."""

    queue_ms: float = 0.0
    lookup_ms: float = 0.0
    restore_ms: float = 0.0
    evaluate_ms: float = 0.0
    decode_ms: float = 0.0


class Finished(Struct, frozen=True, tag="finished"):
    """The terminal event of a turn that went well."""

    usage: Usage
    timings: Timings = Timings()


class Failed(Struct, frozen=True, tag="failed"):
    """The terminal event of a turn that did not. `usage` is what had been evaluated and produced by then."""

    kind: ErrorKind
    message: str
    usage: Usage | None = None
    retry_after_s: int | None = None


Delta = TextDelta | ReasoningDelta | ToolCallDelta
Event = Started | Delta | ChoiceFinished | Finished | Failed
