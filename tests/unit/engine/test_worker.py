"""The engine's process, spoken to in frames over a socket pair; and the framing itself."""

import socket
import subprocess
import sys
import threading
from contextlib import contextmanager

import numpy as np
import pytest

from keepwarm.config import CacheConfig, Config, ModelConfig
from keepwarm.core.event import Finished, Started, Usage
from keepwarm.core.prompt import Lease, OutputRules, Plan, Prompt
from keepwarm.core.request import Sampling
from keepwarm.engine import EngineState
from keepwarm.engine.scripted import LAYOUT
from keepwarm.engine.store import slot_bytes
from keepwarm.engine.wire import (
    FRAME_BYTES_MAX,
    LENGTH,
    Cancel,
    Configure,
    Drop,
    Events,
    LeaseFound,
    LoadFailed,
    LookUp,
    Release,
    RunPlan,
    StatusChanged,
    decode_from_worker,
    encode,
)
from keepwarm.engine.worker import Channel
from tests.unit.engine.conftest import tokens

BLOCK_BYTES = slot_bytes(LAYOUT)
WAIT_S = 30.0  # a hang is a failure
CONFIG = Config(
    model=ModelConfig(engine="scripted", n_streams=2, n_ctx=1024), cache=CacheConfig(host_bytes=1 << 20, disk_bytes=0)
)


@pytest.fixture
def pair():
    ours, theirs = socket.socketpair()
    ours.settimeout(WAIT_S)
    with ours, theirs:
        yield ours, theirs


# --- framing


def test_frames_arrive_whole_however_they_are_sent(pair):
    ours, theirs = pair
    channel = Channel(theirs)
    frames = [Cancel("a"), LookUp("lease", Prompt("a", tokens(300))), Drop("b"), Release("")]
    raw = b"".join(map(encode, frames))
    for n in (1, 3, len(raw)):
        sender = threading.Thread(target=lambda n=n: [ours.sendall(raw[i : i + n]) for i in range(0, len(raw), n)])
        sender.start()
        got = [channel.receive() for _ in frames]
        sender.join()
        assert [type(frame) for frame in got] == [type(frame) for frame in frames]
        assert got[0] == frames[0]
        assert np.array_equal(got[1].prompt.tokens, tokens(300))


@pytest.mark.parametrize("n_bytes", [0, 2, 4, 7])
def test_the_end_of_the_stream_is_none_even_within_a_frame(pair, n_bytes):
    ours, theirs = pair
    ours.sendall(encode(Cancel("abc"))[:n_bytes])
    ours.shutdown(socket.SHUT_WR)
    assert Channel(theirs).receive() is None


def test_a_broken_length_is_not_waited_for(pair):
    ours, theirs = pair
    ours.sendall(LENGTH.pack(FRAME_BYTES_MAX + 1))
    with pytest.raises(AssertionError):
        Channel(theirs).receive()


def test_two_threads_send_whole_frames(pair):
    ours, theirs = pair
    channel = Channel(theirs)
    frames = {text: LoadFailed(text * 1_000_000) for text in "xy"}  # more than the socket takes at once
    senders = [threading.Thread(target=lambda f=f: [channel.send(f) for _ in range(5)]) for f in frames.values()]
    for sender in senders:
        sender.start()
    got = [receive(ours) for _ in range(10)]
    for sender in senders:
        sender.join()
    assert sorted(frame.message[0] for frame in got) == ["x"] * 5 + ["y"] * 5
    assert all(frame in frames.values() for frame in got)


# --- the process


def receive(sock):
    """One frame as the gateway reads it, None at the end."""
    with_length = exactly(sock, LENGTH.size)
    return decode_from_worker(exactly(sock, LENGTH.unpack(with_length)[0])) if with_length else None


def exactly(sock, n):
    raw = b""
    while len(raw) < n:
        part = sock.recv(n - len(raw))
        if not part:
            assert not raw, "the stream ended within a frame"
            return b""
        raw += part
    return raw


class Spoken:
    """A worker process and our end of its socket."""

    def __init__(self, process, sock):
        self.process, self.sock = process, sock

    def send(self, *frames):
        self.sock.sendall(b"".join(map(encode, frames)))

    def until(self, wanted):
        """Frames up to the first for which `wanted` is true."""
        got = []
        while not (got and wanted(got[-1])):
            got.append(receive(self.sock))
            assert got[-1] is not None, f"the worker went away after {got}"
        return got

    def run(self, plan):
        """All events of one turn."""
        self.send(RunPlan(plan))
        frames = self.until(lambda f: isinstance(f, Events) and isinstance(f.events[-1][1], Finished))
        events = [event for frame in frames if isinstance(frame, Events) for event in frame.events]
        assert {turn_id for turn_id, _ in events} == {plan.turn_id}
        return [event for _, event in events]

    def ready(self):
        return self.until(lambda f: isinstance(f, StatusChanged) and f.status.state is EngineState.READY)

    def idle(self):
        """The next status without running turns: what the last one evaluated is stored by then."""
        return self.until(lambda f: isinstance(f, StatusChanged) and not f.status.n_running)[-1].status


@contextmanager
def worker(config=None):
    ours, theirs = socket.socketpair()
    with ours:
        ours.settimeout(WAIT_S)
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-m", "keepwarm.engine.worker", str(theirs.fileno())],
                pass_fds=(theirs.fileno(),), stderr=subprocess.PIPE,
            )  # fmt: skip
        try:
            spoken = Spoken(process, ours)
            if config:
                spoken.send(Configure(config, 3, "template"))
            yield spoken
        finally:
            process.kill()
            process.communicate()


def plan(turn_id, prompt, n_out=5, **more):
    return Plan(turn_id, Prompt("a", prompt), OutputRules(n_out), Sampling(temperature=0.0), **more)


def test_a_life_of_the_process():
    with worker(CONFIG) as spoken:
        statuses = [frame.status for frame in spoken.ready() if isinstance(frame, StatusChanged)]
        assert {status.epoch for status in statuses} == {3}
        assert [status.state for status in statuses[:-1]] == [EngineState.STARTING] * (len(statuses) - 1)
        model = statuses[-1].model
        assert (model.n_ctx, model.n_streams, model.granularity, model.determinism) == (1024, 2, 1, "strict")
        assert statuses[-1].host_bytes_total == (1 << 20) // (64 * model.bytes_per_token) * 64 * model.bytes_per_token

        spoken.send(LookUp("cold", Prompt("a", tokens(300))))
        assert spoken.until(lambda f: isinstance(f, LeaseFound))[-1] == LeaseFound(Lease("cold", 0))
        cold = spoken.run(plan("t1", tokens(300)))
        assert cold[0] == Started(300, 0, usage=Usage(300, 0, 0, 0))
        assert spoken.idle().n_tokens_evaluated == 300
        spoken.send(LookUp("warm", Prompt("a", tokens(300))), Release("cold"), Release("unknown"), Cancel("unknown"))
        assert spoken.until(lambda f: isinstance(f, LeaseFound))[-1] == LeaseFound(Lease("warm", 298, "host"))
        warm = spoken.run(plan("t2", tokens(300)))
        assert warm[0] == Started(300, 298, "host", Usage(2, 298, 0, 0), n_found=298)
        assert warm[1:-1] == cold[1:-1]

        spoken.run(plan("t3", tokens(128, seed=1), n_out=0, pin_id="object"))
        two_blocks = 2 * 64 * model.bytes_per_token
        spoken.until(lambda f: isinstance(f, StatusChanged) and f.status.host_bytes_pinned == two_blocks)
        spoken.send(Drop("object"), Drop("unknown"))
        last = spoken.until(lambda f: isinstance(f, StatusChanged) and f.status.host_bytes_pinned == 0)[-1].status
        assert (last.n_running, last.n_queued) == (0, 0)
        assert last.n_tokens_evaluated == 300 + 2 + 128
        assert last.n_tokens_restored == 298

        spoken.sock.close()
        assert spoken.process.wait(WAIT_S) == 0


def test_a_lease_keeps_its_blocks_until_it_is_given_back():
    config = Config(model=CONFIG.model, cache=CacheConfig(host_bytes=4 * BLOCK_BYTES, disk_bytes=0))
    kept = Prompt("a", tokens(128))
    with worker(config) as spoken:

        def found(lease_id):
            spoken.send(LookUp(lease_id, kept))
            return spoken.until(lambda f: isinstance(f, LeaseFound))[-1].lease.n_tokens

        def fill(turn_id, seed):
            spoken.run(plan(turn_id, tokens(256, seed=seed)))
            spoken.idle()

        spoken.ready()
        spoken.run(plan("t1", kept.tokens))
        spoken.idle()
        assert found("one") == 126
        fill("t2", seed=1)
        assert found("two") == 126
        spoken.send(Release("one"), Release("two"))
        fill("t3", seed=2)
        assert found("three") == 0


def test_it_ends_when_its_socket_does_before_it_was_configured():
    with worker() as spoken:
        spoken.sock.close()
        assert spoken.process.wait(WAIT_S) == 0


def test_it_ends_when_its_socket_does_in_the_middle_of_turns():
    with worker(CONFIG) as spoken:
        spoken.ready()
        spoken.send(*(RunPlan(plan(f"t{i}", tokens(900, seed=i), n_out=100)) for i in range(8)))
        receive(spoken.sock)
        spoken.sock.close()
        spoken.process.wait(WAIT_S)


def test_it_ends_when_its_socket_does_with_frames_unread():
    with worker(CONFIG) as spoken:
        spoken.ready()
        spoken.send(LookUp("lease", Prompt("a", tokens(10))))
        assert spoken.sock.recv(1, socket.MSG_PEEK)  # the answer is here; it is never read
        spoken.sock.close()
        spoken.process.wait(WAIT_S)


def test_what_cannot_be_loaded_is_said_and_ends_it(tmp_path):
    pytest.importorskip("llama_cpp")
    missing = str(tmp_path / "missing.gguf")
    config = Config(data_dir=str(tmp_path), model=ModelConfig(path=missing))
    with worker(config) as spoken:
        failed = spoken.until(lambda f: isinstance(f, LoadFailed))[-1]
        assert missing in failed.message
        assert receive(spoken.sock) is None
        assert spoken.process.wait(WAIT_S) == 0


@pytest.mark.parametrize(
    "raw", [b"\xc1", encode(Configure(CONFIG, 4, "again"))[4:]], ids=["garbage", "configured twice"]
)
def test_a_frame_that_is_a_bug_ends_it(raw):
    with worker(CONFIG) as spoken:
        spoken.ready()
        spoken.sock.sendall(LENGTH.pack(len(raw)) + raw)
        assert spoken.process.wait(WAIT_S) != 0


def test_without_caching_everything_is_evaluated():
    config = Config(
        model=ModelConfig(engine="scripted", n_streams=2, n_ctx=1024), cache=CacheConfig(host_bytes=1, disk_bytes=0)
    )
    with worker(config) as spoken:
        assert spoken.ready()[-1].status.host_bytes_total == 0
        answers = [spoken.run(plan(f"t{i}", tokens(200)))[1:-1] for i in range(2)]
        assert answers[0] == answers[1]
        assert spoken.idle().n_tokens_restored == 0
