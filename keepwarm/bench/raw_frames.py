"""What goes through the pipe to the baseline's process: one JSON line each way per question. Times in milliseconds."""

from typing import Literal

import msgspec
from msgspec import Struct

from keepwarm.config import Config


class Load(Struct, frozen=True, tag="load"):
    """Load the model as a server with this configuration would. Answered by `Loaded`."""

    config: Config


class Cold(Struct, frozen=True, tag="cold"):
    """Evaluate a prompt in ubatches of `rows` and choose the first token."""

    tokens: list[int]
    rows: list[int]


class Base(Struct, frozen=True, tag="base"):
    """As `Cold`, and keep the state for `Warm` and `DecodeAll`."""

    tokens: list[int]
    rows: list[int]


class Warm(Struct, frozen=True, tag="warm"):
    """Load the kept state of the first `n_cached` tokens, evaluate `tokens` behind it, choose the first token."""

    n_cached: int
    tokens: list[int]
    rows: list[int]


class Follow(Struct, frozen=True):
    """One stream of `DecodeAll`: what is evaluated behind the kept state, and how many steps are decoded then."""

    n_cached: int
    tokens: list[int]
    rows: list[int]
    n_steps: int


class DecodeAll(Struct, frozen=True, tag="decode"):
    """Fill a stream for each of `follows`, then decode them all; only decoding is timed.

    `strict`: single-stream calls in turn; otherwise all streams in one batch.
    """

    follows: list[Follow]
    strict: bool


class Loaded(Struct, frozen=True):
    """What was loaded, to be compared with what the server says of its model."""

    digest: str
    attention: Literal["plain", "flash"]
    n_ctx: int
    n_streams: int


class Took(Struct, frozen=True):
    """How long a question took, and the parts of it that there were."""

    ms: float
    restore_ms: float | None = None
    evaluate_ms: float | None = None
    restored_bytes: int | None = None


Question = Load | Cold | Base | Warm | DecodeAll


def encoded(frame: Question | Loaded | Took) -> bytes:
    """A frame as a line."""
    return msgspec.json.encode(frame) + b"\n"
