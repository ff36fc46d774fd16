"""The gateway's side of the engine, with the scripted model in a real process: turns, cancelling, crashes, refusals."""

import asyncio
import gc
import os
import signal
import warnings
from contextlib import AsyncExitStack, aclosing, asynccontextmanager

import msgspec
import numpy as np
import psutil
import pytest

from keepwarm.config import CacheConfig, Config, Limits, ModelConfig
from keepwarm.core.clock import RandomIds, SystemClock
from keepwarm.core.errors import ApiError, ErrorKind
from keepwarm.core.event import Failed, Finished, Started, TextDelta, Usage
from keepwarm.core.prompt import OutputRules, Plan, Prompt
from keepwarm.core.request import Sampling
from keepwarm.engine import EngineState, EngineStatus, StoreStatus
from keepwarm.engine.local import EngineFault, LocalEngine, open_tokenizer
from keepwarm.engine.scripted import ScriptedVocab
from keepwarm.engine.wire import LeaseDamaged, LeasesHeld, StatusChanged, encode
from tests.unit.engine.conftest import tokens

WAIT_S = 60.0  # a hang is a failure
LONG = Sampling(temperature=1e9, seed=1154)  # a seed whose first 1,000 draws end no answer
N_LONG = 1000


def config_of(data_dir, **limits):
    return Config(
        data_dir=str(data_dir),
        model=ModelConfig(engine="scripted", n_ctx=2048, n_threads=1),
        cache=CacheConfig(host_bytes=8 << 20),
        limits=Limits(**limits),
    )


@pytest.fixture
def config(tmp_path):
    return config_of(tmp_path)


@asynccontextmanager
async def running(config):
    """An engine that has come up, and its supervisor."""
    engine = LocalEngine(config, "template", SystemClock(), RandomIds())
    async with asyncio.timeout(WAIT_S), asyncio.TaskGroup() as tasks:
        supervisor = tasks.create_task(engine.supervise())
        try:
            await epoch_after(engine, 0)
            yield engine
        finally:
            supervisor.cancel()


async def epoch_after(engine, seen):
    async with aclosing(engine.epochs()) as epochs:
        epoch = seen
        while epoch <= seen:
            epoch = await anext(epochs)
        return epoch


async def until(engine, wanted):
    """The first status for which `wanted` is true."""
    while not wanted(engine.status()):  # noqa: ASYNC110 - there is nothing to wait on but the status
        await asyncio.sleep(0.005)
    return engine.status()


def idle(status):
    return status.state is EngineState.READY and not status.n_running and not status.n_queued


def plan(turn_id, n=300, *, seed=0, n_out=8, sampling=None, **more):
    prompt = Prompt("a", tokens(n, seed))
    return Plan(turn_id, prompt, OutputRules(n_out), sampling or Sampling(temperature=0.0), **more)


def long_plan(turn_id):
    return plan(turn_id, n_out=N_LONG, sampling=LONG)


async def events_of(engine, plan):
    return [event async for event in engine.run(plan)]


def text_of(events):
    assert isinstance(events[-1], Finished), events[-1]
    return "".join(event.text for event in events if isinstance(event, TextDelta))


def worker_pids():
    children = psutil.Process().children()
    return [child.pid for child in children if "keepwarm.engine.worker" in child.cmdline()]


async def stopped(pid):
    """Keep a process from computing; its sockets stay open."""
    os.kill(pid, signal.SIGSTOP)
    while psutil.Process(pid).status() != psutil.STATUS_STOPPED:  # noqa: ASYNC110 - the kernel tells nobody
        await asyncio.sleep(0.001)


async def test_a_turn_a_lease_and_a_warm_turn(config):
    async with running(config) as engine:
        assert engine.status().model.granularity == 1
        cold = await events_of(engine, plan("t1"))
        assert cold[0] == Started(300, 0, usage=Usage(300, 0, 0, 0))
        await until(engine, lambda s: idle(s) and s.n_tokens_evaluated == 300)
        async with engine.lease(plan("t2").prompt) as lease:
            assert (lease.n_tokens, lease.tier) == (298, "host")
        async with engine.lease(Prompt("b", tokens(300))) as lease:
            assert (lease.n_tokens, lease.tier) == (0, None)
        warm = await events_of(engine, plan("t2"))
        assert warm[0] == Started(300, 298, "host", Usage(2, 298, 0, 0), n_found=298)
        assert text_of(warm) == text_of(cold) != ""
        status = await until(engine, lambda s: idle(s) and s.n_tokens_evaluated == 302)
        assert status.n_tokens_restored == 298
        assert status.host_bytes_resident > 0


async def test_turns_at_the_same_time_get_their_own_events(config):
    async with running(config) as engine:
        alone = [text_of(await events_of(engine, plan(f"a{i}", seed=i))) for i in range(4)]
        together = await asyncio.gather(*(events_of(engine, plan(f"b{i}", seed=i)) for i in range(4)))
        assert [text_of(events) for events in together] == alone
        assert len(set(alone)) == 4


async def test_closing_the_iterator_cancels_and_gives_the_stream_back(config):
    async with running(config) as engine:
        assert text_of(await events_of(engine, long_plan("whole")))  # it is as long as it should be
        status = await until(engine, lambda s: idle(s) and s.n_tokens_decoded)
        assert status.n_tokens_decoded == N_LONG - 1

        async def first_words(turn_id):
            async with aclosing(engine.run(long_plan(turn_id))) as events:
                async for event in events:
                    if isinstance(event, TextDelta):
                        return

        await asyncio.gather(*(first_words(f"t{i}") for i in range(8)))
        # All eight had begun; whether they read the prompt or computed it is for the engine to judge by its speeds.
        after = await until(engine, lambda s: idle(s) and s.n_tokens_restored + s.n_tokens_evaluated == 9 * 300)
        assert after.n_tokens_decoded < status.n_tokens_decoded + 8 * (N_LONG - 1)
        assert text_of(await events_of(engine, plan("next")))


async def test_a_run_that_is_closed_early_tells_what_it_had_counted(config):
    async with running(config) as engine:
        counts = asyncio.get_running_loop().create_future()
        n_read = 0
        async with aclosing(engine.run(long_plan("early"), counts)) as events:
            async for event in events:
                n_read += isinstance(event, TextDelta)
                if n_read == 3:
                    break
        usage = await counts
        assert usage.prompt == 300
        assert 3 <= usage.output < N_LONG


async def test_a_run_that_is_closed_before_it_began_used_nothing(config):
    async with running(config) as engine:
        counts = asyncio.get_running_loop().create_future()
        task = asyncio.ensure_future(anext(engine.run(long_plan("early"), counts)))
        await asyncio.sleep(0)  # it has been sent, and is cancelled in the same breath
        task.cancel()
        usage = await counts
        assert usage.output == 0
        assert usage.prompt <= 300


async def test_the_counts_of_a_run_closed_while_the_engine_dies_are_not_known(config):
    async with running(config) as engine:
        counts = asyncio.get_running_loop().create_future()
        async with aclosing(engine.run(long_plan("early"), counts)) as events:
            await anext(events)
            engine.restart()
        assert await counts is None or counts.result().prompt <= 300


async def test_cancelling_the_reader_cancels_the_turn(config):
    async with running(config) as engine:
        reading = [asyncio.ensure_future(events_of(engine, long_plan(f"t{i}"))) for i in range(8)]
        await until(engine, lambda s: s.n_running)
        for task in reading:
            task.cancel()
        await asyncio.gather(*reading, return_exceptions=True)
        after = await until(engine, idle)
        assert after.n_tokens_decoded < 8 * (N_LONG - 1)


async def test_a_turn_that_is_not_read_is_cancelled_when_its_queue_is_full(tmp_path):
    async with running(config_of(tmp_path, event_queue_max=4)) as engine, AsyncExitStack() as stack:
        turns = [await stack.enter_async_context(aclosing(engine.run(long_plan(f"t{i}")))) for i in range(8)]
        got = await asyncio.gather(*(anext(events) for events in turns))
        assert len(got) == 8
        status = await until(engine, lambda s: idle(s) and s.n_tokens_decoded)
        assert status.n_tokens_decoded < 8 * (N_LONG - 1)
        for first, events in zip(got, turns, strict=True):
            rest = [event async for event in events]
            last = [first, *rest][-1]
            assert len(rest) <= 4
            assert isinstance(last, Failed)
            assert last.kind is ErrorKind.CLIENT_CLOSED
            assert "4 events were not read" in last.message
            assert last.usage.prompt == 300


async def test_drop_gives_back_what_was_leased(config):
    async with running(config) as engine:
        await events_of(engine, plan("t1", 128, n_out=0, pin_id="object"))
        status = await until(engine, lambda s: s.store and on_disk(s).bytes_leased)
        n_bytes = on_disk(status).bytes_leased
        assert (on_disk(status).n_blocks, on_disk(status).bytes_resident, status.store.n_leases) == (2, 0, 1)
        await engine.drop("never heard of")
        await engine.drop("object")
        status = await until(engine, lambda s: not on_disk(s).bytes_leased)
        assert (on_disk(status).bytes_resident, status.store.n_leases) == (n_bytes, 0)


async def test_without_a_disk_tier_a_lease_stays_in_memory(config):
    config = msgspec.structs.replace(config, cache=CacheConfig(host_bytes=8 << 20, disk_bytes=0))
    async with running(config) as engine:
        await events_of(engine, plan("t1", 128, n_out=0, pin_id="object"))
        status = await until(engine, lambda s: s.host_bytes_pinned)
        assert status.host_bytes_pinned == 2 * 64 * status.model.bytes_per_token
        await engine.drop("object")
        status = await until(engine, lambda s: not s.host_bytes_pinned)
        assert status.host_bytes_resident == 2 * 64 * status.model.bytes_per_token


def on_disk(status):
    (pool,) = [pool for pool in status.store.pools if pool.name == "disk"]
    return pool


@pytest.mark.parametrize("how", ["restart", "kill"])
async def test_a_crash_fails_the_turns_in_flight_and_begins_a_new_epoch(config, how):
    async with running(config) as engine:
        (pid,) = worker_pids()
        model = engine.status().model
        await events_of(engine, plan("t0"))
        await stopped(pid)  # so that the turns are in flight for sure
        turns = [asyncio.ensure_future(events_of(engine, plan(f"t{i}"))) for i in (1, 2)]
        leasing = asyncio.ensure_future(engine.lease(plan("t3").prompt).__aenter__())
        await asyncio.sleep(0)
        if how == "restart":
            engine.restart()
        else:
            os.kill(pid, signal.SIGKILL)
        for events in await asyncio.gather(*turns):
            assert [type(event) for event in events] == [Failed]
            assert events[0].kind is ErrorKind.ENGINE_DOWN
            assert events[0].retry_after_s
        with pytest.raises(ApiError) as caught:
            await leasing
        assert caught.value.kind is ErrorKind.ENGINE_DOWN

        down = engine.status()
        assert down.state is EngineState.DOWN
        assert down.model == model  # what was loaded is still known
        assert "status -9" in down.detail
        with pytest.raises(ApiError) as caught:
            await events_of(engine, plan("t4"))
        assert caught.value.kind is ErrorKind.ENGINE_DOWN
        assert caught.value.retry_after_s
        await engine.drop("object")  # nothing to give back, and no error

        assert await epoch_after(engine, 1) == 2
        assert worker_pids() not in ([], [pid])
        assert (await events_of(engine, plan("t5")))[0] == Started(
            300, 0, usage=Usage(300, 0, 0, 0)
        )  # a new process has nothing stored


async def test_an_epoch_is_told_when_it_is_ready_and_when_it_is_gone(config):
    async with running(config) as engine, aclosing(engine.epochs()) as epochs:
        assert await anext(epochs) == 1
        engine.restart()
        await epoch_after(engine, 1)
        engine.restart()  # told late, but told in order
        await epoch_after(engine, 2)
        assert [await anext(epochs) for _ in range(2)] == [1, 3]


async def test_leases_held_and_damaged_are_passed_on(config):
    engine = LocalEngine(config, "template", SystemClock(), RandomIds())
    assert engine.held_leases() == frozenset()
    reader = asyncio.StreamReader()
    ready = EngineStatus(EngineState.READY, 1, "ready", store=StoreStatus((), "cost", 2))
    for frame in (LeasesHeld(("a", "b")), StatusChanged(ready), *map(LeaseDamaged, ("b", "a", "b"))):
        reader.feed_data(encode(frame))
    reader.feed_eof()
    async with asyncio.timeout(WAIT_S), aclosing(engine.damaged()) as damaged:
        waiting = asyncio.ensure_future(anext(damaged))
        await asyncio.sleep(0)
        assert await engine._read(reader) is None
        assert engine.held_leases() == {"a", "b"}
        assert engine.status().store == ready.store
        assert [await waiting, await anext(damaged)] == ["b", "a"], "each once"
        await engine._take(LeaseDamaged("b"))
        assert await anext(damaged) == "b"


async def test_a_new_process_holds_the_leases_that_were_durable_and_not_dropped(config):
    async with running(config) as engine:
        assert engine.held_leases() == frozenset()
        for pin_id, seed in (("kept", 1), ("dropped", 2)):
            events = await events_of(engine, plan(f"t-{pin_id}", 128, seed=seed, n_out=0, pin_id=pin_id))
            assert isinstance(events[-1], Finished), events
        await engine.drop("dropped")
        async with asyncio.timeout(WAIT_S):
            while len(list((config.store_dir() / "leases").iterdir())) > 1:  # noqa: ASYNC110 - the writer deletes it later
                await asyncio.sleep(0.01)
        engine.restart()
        assert await epoch_after(engine, 1) == 2
        assert engine.held_leases() == {"kept"}
        assert (await events_of(engine, plan("t4", 128, seed=1, n_out=0)))[0].cache_read == 128
    async with running(config) as engine:  # as after a restart of the gateway
        assert engine.held_leases() == {"kept"}


async def test_what_a_lost_process_said_of_its_leases_is_forgotten(config):
    engine = LocalEngine(config, "template", SystemClock(), RandomIds())
    await engine._take(LeasesHeld(("a",)))
    await engine._take(LeaseDamaged("a"))
    async with asyncio.timeout(WAIT_S), asyncio.TaskGroup() as tasks:
        supervisor = tasks.create_task(engine.supervise())
        await epoch_after(engine, 0)
        assert engine.held_leases() == frozenset()
        async with aclosing(engine.damaged()) as damaged:
            await engine._take(LeaseDamaged("c"))
            assert await anext(damaged) == "c"
        supervisor.cancel()


async def test_what_cannot_be_loaded_is_an_engine_fault(tmp_path):
    pytest.importorskip("llama_cpp")
    missing = str(tmp_path / "missing.gguf")
    config = Config(data_dir=str(tmp_path), model=ModelConfig(engine="llama", path=missing, n_threads=1))
    engine = LocalEngine(config, "template", SystemClock(), RandomIds())
    async with asyncio.timeout(WAIT_S):
        with pytest.raises(EngineFault, match="no model file at") as caught:
            await engine.supervise()
    assert missing in str(caught.value)
    assert worker_pids() == []


@pytest.mark.parametrize("cancelled_s", [0.0, 0.001, 0.003, 0.01, 0.03, 0.1])
async def test_a_start_that_is_given_up_leaves_no_socket_open(config, cancelled_s):
    """An open one is a ResourceWarning when it is collected."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        engine = LocalEngine(config, "template", SystemClock(), RandomIds())
        supervisor = asyncio.create_task(engine.supervise())
        await asyncio.sleep(cancelled_s)
        supervisor.cancel()
        await asyncio.wait([supervisor])
        del engine, supervisor
        gc.collect()
    assert [str(warning.message) for warning in caught] == []
    assert worker_pids() == []


async def test_before_it_is_ready_everything_is_refused(config):
    engine = LocalEngine(config, "template", SystemClock(), RandomIds())
    assert engine.status().state is EngineState.STARTING
    with pytest.raises(ApiError) as caught:
        await events_of(engine, plan("t1"))
    assert caught.value.kind is ErrorKind.ENGINE_DOWN
    with pytest.raises(ApiError):
        async with engine.lease(plan("t1").prompt):
            pass
    engine.restart()
    await engine.drop("object")


async def test_stopping_ends_the_turns_and_the_process(config):
    async with running(config) as engine:
        (pid,) = worker_pids()
        await stopped(pid)
        turn = asyncio.ensure_future(events_of(engine, plan("t1")))
        await asyncio.sleep(0)
    (failed,) = await turn
    assert failed.kind is ErrorKind.ENGINE_DOWN
    assert worker_pids() == []
    assert not psutil.pid_exists(pid)


async def test_its_last_words_are_in_the_status(config, tmp_path):
    async with running(config) as engine:
        (tmp_path / "engine.log").write_text("first line\nGGML_ASSERT(x) failed\n")
        engine.restart()
        status = await until(engine, lambda s: s.state is EngineState.DOWN)
        assert "GGML_ASSERT(x) failed" in status.detail
        assert "first line" not in status.detail


async def test_starting_without_a_word_on_threads_does_not_block_the_loop(tmp_path):
    async with running(Config(data_dir=str(tmp_path), model=ModelConfig(engine="scripted"))) as engine:
        assert engine.status().state is EngineState.READY


def test_the_scripted_models_tokenizer(config):
    assert isinstance(open_tokenizer(config), ScriptedVocab)


def test_a_tokenizer_that_cannot_be_opened_is_an_engine_fault(tmp_path):
    pytest.importorskip("llama_cpp")
    missing = tmp_path / "missing.gguf"
    config = Config(model=ModelConfig(engine="llama", path=str(missing)))
    with pytest.raises(EngineFault, match="no model file at"):
        open_tokenizer(config)
    missing.write_bytes(b"not a model")
    with pytest.raises(EngineFault, match="GGUF"):
        open_tokenizer(config)


def test_the_long_answer_is_long():
    draws = np.random.Generator(np.random.PCG64(LONG.seed)).choice(259, N_LONG, p=np.full(259, 1 / 259))
    assert (draws < 257).all()
