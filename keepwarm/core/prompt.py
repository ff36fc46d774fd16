"""What the engine is asked: token ids with marks (`Prompt`), what is already stored of them (`Lease`), what to do (`Plan`)."""

from enum import Enum

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from keepwarm.core.request import Sampling

Tokens = NDArray[np.int32]  # shape (n_tokens,)


def common_prefix(left: Tokens, right: Tokens) -> int:
    """How many tokens two sequences share from the start."""
    n = min(len(left), len(right))
    differ = np.flatnonzero(left[:n] != right[:n])
    return int(differ[0]) if len(differ) else n


class Prompt(Struct, frozen=True):
    """A rendered, tokenised prompt of one tenant.

    `tokens` has shape (n_tokens,), int32, read-only. `marks` are token positions, ascending, in 1..n_tokens: the end of
    the cache object in use and the request's own breakpoints, nothing else. They decide where evaluation is cut, so
    equal (tokens, marks) always give equal bits.
    """

    tenant: str
    tokens: Tokens
    marks: tuple[int, ...] = ()

    @property
    def n_tokens(self) -> int:
        return len(self.tokens)


class Breakpoint(Struct, frozen=True):
    """A client's cache breakpoint in the prompt: after the first `end` tokens. `ttl_s` as in `request.Mark`.

    `position` is how many blocks of the request (tools, texts, documents, calls) end there or before; a run of calls or of
    their results counts as one.
    """

    end: int
    ttl_s: int | None
    position: int


class Lease(Struct, frozen=True):
    """Blocks found and locked for a prompt: `n_tokens` are stored and stay so until the lease is given back."""

    lease_id: str
    n_tokens: int
    tier: str | None = None  # "host", "disk"; None when nothing was found


class Priority(Enum):
    """IDLE work (settling) runs only when no other turn is there, and gives way at once."""

    FOREGROUND = "foreground"
    IDLE = "idle"


class ToolFormat(Enum):
    """How the model writes a tool call, read off its chat template."""

    HERMES = "hermes"  # <tool_call>\n{"name": …, "arguments": {…}}\n</tool_call>
    LLAMA3 = "llama3"  # {"name": …, "parameters": {…}}
    MISTRAL = "mistral"  # [TOOL_CALLS][{"name": …, "arguments": {…}}]


class OutputRules(Struct, frozen=True):
    """How the answer ends and how its text is read. `max_tokens` 0: evaluate the prompt and produce nothing.

    `grammar` is GBNF with the rule "root". `tool_format` None: text is never read as a tool call.
    """

    max_tokens: int
    stop: tuple[str, ...] = ()
    grammar: str | None = None
    tool_format: ToolFormat | None = None
    top_logprobs: int | None = None
    reasoning: bool = False  # text between <think> and </think> is reasoning


class Plan(Struct, frozen=True):
    """An intention; what was done is in `Usage`.

    `reuse` and `store` allow reading from and writing to the prefix store. `pin_id` names the cache object whose prefix
    (up to the last mark) must stay resident until `Engine.drop(pin_id)`; the turn fails if there is no room for it.
    At most `read_end` tokens are read (None: whatever is there). Tokens evaluated before position `write_end` count as
    cache writes: an object being created, or explicit breakpoints; those before `write_long_end` as writes that were asked
    to stay for an hour.
    """

    turn_id: str
    prompt: Prompt
    output: OutputRules
    sampling: Sampling = Sampling()
    reuse: bool = True
    store: bool = True
    pin_id: str | None = None
    read_end: int | None = None
    write_end: int = 0
    write_long_end: int = 0
    lease_id: str | None = None
    priority: Priority = Priority.FOREGROUND
