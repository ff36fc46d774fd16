"""Frames between gateway and engine process: a u32 length (little-endian) and one msgpack value of a closed union.

Token ids travel as raw little-endian int32 bytes. The two processes are one version of one program and start together,
so there is no compatibility to keep; an unknown frame is a bug and ends the process that meets it.
"""

import struct
from typing import Any

import msgspec
import numpy as np
from msgspec import Struct

from keepwarm.config import Config
from keepwarm.core.event import Event
from keepwarm.core.prompt import Lease, Plan, Prompt
from keepwarm.engine import EngineStatus

LENGTH = struct.Struct("<I")
FRAME_BYTES_MAX = 256 * 1024 * 1024  # far above a 128k-token prompt (0.5 MB); a larger length is a broken stream


class Configure(Struct, frozen=True, tag="configure"):
    """First frame to the worker: what to load. `template_digest` is part of every block's key."""

    config: Config
    epoch: int
    template_digest: str


class LookUp(Struct, frozen=True, tag="look_up"):
    """Find and lock the longest usable prefix of a prompt under this lease id; answered by `LeaseFound`."""

    lease_id: str
    prompt: Prompt


class Release(Struct, frozen=True, tag="release"):
    """Give a lease back."""

    lease_id: str


class RunPlan(Struct, frozen=True, tag="run"):
    """Run a plan; answered by `Events` up to a terminal one."""

    plan: Plan


class Cancel(Struct, frozen=True, tag="cancel"):
    """Nobody reads this turn any more; no more events are sent for it."""

    turn_id: str


class Drop(Struct, frozen=True, tag="drop"):
    """End the lease that a plan with this pin id took."""

    pin_id: str


class LeaseFound(Struct, frozen=True, tag="lease_found"):
    """Answer to `LookUp`."""

    lease: Lease


class Events(Struct, frozen=True, tag="events"):
    """Events of one step, in order, for any turns."""

    events: tuple[tuple[str, Event], ...]


class StatusChanged(Struct, frozen=True, tag="status"):
    """The engine's state and counters, sent when they change (at most a few times a second)."""

    status: EngineStatus


class LeasesHeld(Struct, frozen=True, tag="leases_held"):
    """Sent once, before the first READY: the pin ids whose leases are whole after the start."""

    pin_ids: tuple[str, ...]


class LeaseDamaged(Struct, frozen=True, tag="lease_damaged"):
    """A block of this lease was found damaged: what it names must be computed again, with the same pin id."""

    pin_id: str


class LoadFailed(Struct, frozen=True, tag="load_failed"):
    """The engine cannot serve this configuration; a restart would not help."""

    message: str


ToWorker = Configure | LookUp | Release | RunPlan | Cancel | Drop
FromWorker = LeaseFound | Events | StatusChanged | LeasesHeld | LeaseDamaged | LoadFailed


def _to_builtin(value: Any) -> Any:  # noqa: ANN401 - msgspec's hook is untyped
    if isinstance(value, np.ndarray):
        return value.astype("<i4", copy=False).tobytes()
    raise NotImplementedError(f"no wire form for {type(value).__name__}")


def _from_builtin(_kind: type, value: Any) -> Any:  # noqa: ANN401 - msgspec's hook is untyped
    return np.frombuffer(value, "<i4")  # the one foreign type is Tokens; read-only, as Prompt promises


_ENCODER = msgspec.msgpack.Encoder(enc_hook=_to_builtin)
_TO_WORKER: msgspec.msgpack.Decoder[ToWorker] = msgspec.msgpack.Decoder(ToWorker, dec_hook=_from_builtin)
_FROM_WORKER: msgspec.msgpack.Decoder[FromWorker] = msgspec.msgpack.Decoder(FromWorker, dec_hook=_from_builtin)


def encode(frame: ToWorker | FromWorker) -> bytes:
    """The frame with its length in front."""
    body = _ENCODER.encode(frame)
    return LENGTH.pack(len(body)) + body


class FrameBuffer:
    """Bytes as they come from the socket, to whole frames' bodies."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def feed(self, read: bytes) -> list[bytes]:
        """The bodies that are complete now, in order."""
        data = self._bytes
        data += read
        bodies, at = [], 0
        while len(data) - at >= LENGTH.size:
            (n,) = LENGTH.unpack_from(data, at)
            assert n <= FRAME_BYTES_MAX, n
            end = at + LENGTH.size + n
            if len(data) < end:
                break
            bodies.append(bytes(data[at + LENGTH.size : end]))
            at = end
        del data[:at]
        return bodies


def decode_to_worker(body: bytes) -> ToWorker:
    """One frame's body as the worker reads it."""
    return _TO_WORKER.decode(body)


def decode_from_worker(body: bytes) -> FromWorker:
    """One frame's body as the gateway reads it."""
    return _FROM_WORKER.decode(body)
