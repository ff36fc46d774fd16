"""What the engine's loop needs of a model: evaluate, decode, sample, forget, save, load. No policy.

Two implementations: `llama.LlamaModel` and `scripted.ScriptedModel`. All calls come from the one compute thread.
A *stream* is one sequence's own KV buffer, 0..n_streams-1; a *row* is one token's place in the last call's output.
"""

from collections.abc import Sequence
from typing import Literal, Protocol

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from keepwarm.core.prompt import Tokens
from keepwarm.core.request import Sampling

Blob = NDArray[np.uint8]  # one stream's state as llama.cpp writes it, shape (n_bytes,)


class DecodeStep(Struct, frozen=True):
    """One token to evaluate at position `pos` of `stream`."""

    stream: int
    token: int
    pos: int


class ModelFault(Exception):
    """The model could not do what was asked (no cell free, state refused). The turn fails; the engine goes on."""


class GrammarFault(Exception):
    """llama.cpp refused the grammar: the client's schema is at fault."""


class LoadFault(Exception):
    """The model cannot be served as configured, and trying again would not help; one line that says what to do."""


class Sampler(Protocol):
    """Chooses tokens for one choice of one turn; keeps its own history, random state and grammar state."""

    def sample(self, row: int) -> int:
        """The next token by the logits of `row`; it counts as produced from then on."""
        ...

    def close(self) -> None:
        """Free what llama.cpp holds. Safe to call twice."""
        ...


class Model(Protocol):
    """A loaded model with `n_streams` streams of `n_ctx` cells each."""

    n_ctx: int
    n_streams: int
    n_ubatch: int
    n_vocab: int

    def evaluate(self, stream: int, tokens: Tokens, pos: int, *, want_logits: bool) -> None:
        """Evaluate `tokens` (≤ n_ubatch) as one ubatch at positions pos..; logits of the last go to row -1 if wanted."""
        ...

    def decode(self, steps: Sequence[DecodeStep]) -> None:
        """Evaluate one token for each of several streams in one call; row i belongs to steps[i]."""
        ...

    def logits(self, row: int) -> NDArray[np.float32]:
        """Logits of a row, shape (n_vocab,); a view that the next call overwrites."""
        ...

    def sampler(self, sampling: Sampling, grammar: str | None, seed: int) -> Sampler:
        """Raises GrammarFault."""
        ...

    def piece(self, token: int) -> bytes:
        """The token's bytes; control tokens give b""."""
        ...

    def is_end(self, token: int) -> bool:
        """Whether the token ends the answer."""
        ...

    def forget(self, stream: int, start: int, end: int) -> None:
        """Drop the cells of positions start..end-1 (end -1: to the end)."""
        ...

    def n_held(self, stream: int) -> int:
        """One more than the last position in the stream; 0 when it is empty."""
        ...

    def save(self, stream: int) -> Blob:
        """The stream's state; a view into a buffer that the next `save` overwrites."""
        ...

    def load(self, stream: int, blob: Blob) -> None:
        """Replace the stream's state. Raises ModelFault."""
        ...


Reuse = Literal["blocks", "snapshots", "none"]  # which store a model's state fits (docs/decisions/0015)
KvType = Literal["f16", "bf16", "f32", "q8_0", "q4_0"]  # how K and V are kept, in llama.cpp's names


class Prepared(Struct):
    """A model ready to compute and what was found out about it. `granularity` None: no caching, `detail` says why."""

    model: Model
    digest: str
    weights: str
    attention: Literal["plain", "flash"]
    determinism: Literal["strict", "fast"]
    granularity: int | None
    detail: str = "ready"
    kv_type: str = "f16"
    reuse: Reuse = "blocks"  # "none" exactly when `granularity` is None
