"""Frames between the processes: each comes out as it went in."""

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from keepwarm.config import Config, ModelConfig
from keepwarm.core.errors import ErrorKind
from keepwarm.core.event import (
    ChoiceFinished,
    Failed,
    Finished,
    ReasoningDelta,
    Started,
    TextDelta,
    Timings,
    TokenLogprob,
    ToolCallDelta,
    Usage,
)
from keepwarm.core.prompt import Lease, OutputRules, Plan, Priority, Prompt, ToolFormat
from keepwarm.core.request import Sampling
from keepwarm.engine import EngineState, EngineStatus, ModelInfo, wire

PROMPT = Prompt("tenant", np.array([0, 1, 31999, 2**31 - 1], np.int32), (2, 4))
PLAN = Plan(
    "chatcmpl-1",
    PROMPT,
    OutputRules(7, ("\n\n", "é"), "root ::= [a-z]", ToolFormat.MISTRAL, 5, reasoning=True),
    Sampling(temperature=0.25, top_p=0.5, seed=3, logit_bias=((5, -100.0),)),
    reuse=False,
    store=False,
    pin_id="cache-1",
    write_end=4,
    lease_id="lease-1",
    priority=Priority.IDLE,
)
EVENTS = (
    Started(4, 2, "host"),
    TextDelta("é", 1, (TokenLogprob(b"\xff\x00", -0.5, ((b"a", -0.5), (b"", -2.0))),)),
    ReasoningDelta("hm"),
    ToolCallDelta(1, "name", '{"a": 1}', 2),
    ChoiceFinished("tool_calls", 3, stop="\n\n"),
    Finished(Usage(1, 2, 3, 4), Timings(1.5, 0.0, 2.25)),
    Failed(ErrorKind.ENGINE_DOWN, "gone", Usage(1, 0, 0, 0), 2),
    Failed(ErrorKind.INTERNAL, "no counts"),
)
MODEL = ModelInfo("ab", 8192, 8, 259, "Q4_0", "plain", "strict", None, "f16", 32)
STATUS = EngineStatus(EngineState.READY, 3, "ready", MODEL, n_running=2, n_tokens_evaluated=2**40)

TO_WORKER = [
    wire.Configure(Config(data_dir="d", model=ModelConfig(engine="scripted", n_ctx=512)), 2, "digest"),
    wire.LookUp("lease-1", PROMPT),
    wire.Release("lease-1"),
    wire.RunPlan(PLAN),
    wire.Cancel("chatcmpl-1"),
    wire.Drop("cache-1"),
]
FROM_WORKER = [
    wire.LeaseFound(Lease("lease-1", 5, "host")),
    wire.LeaseFound(Lease("lease-1", 0)),
    *(wire.Events((("t1", event), ("t2", EVENTS[0]))) for event in EVENTS),
    wire.Events(()),
    wire.StatusChanged(STATUS),
    wire.LeasesHeld(("cache-1", "cache-2")),
    wire.LeaseDamaged("cache-1"),
    wire.LoadFailed("no model file"),
]


def plain(value):
    """Structs as tuples with their type, arrays as lists: what == can compare."""
    if isinstance(value, np.ndarray):
        return value.dtype, value.tolist()
    if isinstance(value, msgspec.Struct):
        return type(value), *(plain(getattr(value, name)) for name in value.__struct_fields__)
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    return value


def body(frame):
    """The encoded frame without its length, which is checked."""
    raw = wire.encode(frame)
    (n,) = wire.LENGTH.unpack(raw[: wire.LENGTH.size])
    assert n == len(raw) - wire.LENGTH.size
    return raw[wire.LENGTH.size :]


@pytest.mark.parametrize("frame", TO_WORKER, ids=lambda f: type(f).__name__)
def test_frames_to_the_worker(frame):
    assert plain(wire.decode_to_worker(body(frame))) == plain(frame)


@pytest.mark.parametrize("frame", FROM_WORKER, ids=lambda f: type(f).__name__)
def test_frames_from_the_worker(frame):
    assert plain(wire.decode_from_worker(body(frame))) == plain(frame)


def test_no_frame_type_is_left_out():
    assert {type(frame) for frame in TO_WORKER} == set(wire.ToWorker.__args__)
    assert {type(frame) for frame in FROM_WORKER} == set(wire.FromWorker.__args__)


@pytest.mark.parametrize(
    "tokens",
    [
        np.array([], np.int32),
        np.arange(10, dtype=np.int32)[::3],  # not contiguous
        np.array([1, 2], ">i4"),
        np.array([1, 2], np.int64),
    ],
    ids=["empty", "strided", "big-endian", "int64"],
)
def test_tokens_arrive_as_read_only_int32(tokens):
    frame = wire.decode_to_worker(body(wire.LookUp("l", Prompt("a", tokens))))
    assert isinstance(frame, wire.LookUp)
    arrived = frame.prompt.tokens
    assert arrived.dtype == np.dtype("<i4")
    assert arrived.tolist() == tokens.tolist()
    assert not arrived.flags.writeable


def test_tokens_cost_four_bytes_each():
    short, long = (len(body(wire.LookUp("l", Prompt("a", np.zeros(n, np.int32))))) for n in (1000, 2000))
    assert long - short == 4000


@pytest.mark.parametrize("raw", [b"", b"\xc1", b"\x80", msgspec.msgpack.encode({"type": "cancel"})])
def test_what_is_no_frame_is_refused(raw):
    with pytest.raises(msgspec.DecodeError):
        wire.decode_to_worker(raw)


def test_the_two_directions_are_not_mixed_up():
    with pytest.raises(msgspec.ValidationError):
        wire.decode_to_worker(body(wire.LoadFailed("x")))
    with pytest.raises(msgspec.ValidationError):
        wire.decode_from_worker(body(wire.Cancel("x")))


@given(st.lists(st.integers(1, 40), max_size=40))
def test_frames_are_found_however_they_arrive(sizes):
    frames = [wire.Cancel("a" * n) for n in (0, 1, 300)]
    raw = b"".join(map(wire.encode, frames))
    buffer, got, at = wire.FrameBuffer(), [], 0
    for size in [*sizes, len(raw)]:
        bodies = buffer.feed(raw[at : at + size])
        at += size
        got += [wire.decode_to_worker(body) for body in bodies]
        assert len(wire.encode(frames[0])) <= at or not got
    assert got == frames
    assert buffer.feed(b"") == []


def test_a_broken_length_is_not_waited_for():
    with pytest.raises(AssertionError):
        wire.FrameBuffer().feed(wire.LENGTH.pack(wire.FRAME_BYTES_MAX + 1))
