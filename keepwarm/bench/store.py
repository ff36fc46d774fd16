"""`keepwarm bench store`: what the prefix store costs and saves, with its disk tier, through HTTP and beside plain reading.

In order: prompts nobody asked before; cache objects made with a disk tier and without; prompts that are never asked again,
with caching and without; questions behind an object after the server was killed and the page cache dropped; restoring in
a process of its own, beside reading one file (store_restore.py); the index by itself (store_index.py).

Servers that are compared do the same work in turn, in changing order, and never compute at the same time.
"""

import asyncio
import tempfile
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import uvloop
from msgspec import Struct
from msgspec.structs import replace
from rich.console import Console

from keepwarm.bench import BenchError
from keepwarm.bench.client import Connection
from keepwarm.bench.machine import these_versions, this_machine
from keepwarm.bench.prompts import Ask, Stored
from keepwarm.bench.prose import Prose
from keepwarm.bench.report import Report, publish, shown, timestamp
from keepwarm.bench.service import CacheObject, Service, chat_body
from keepwarm.bench.sse import until_first_token
from keepwarm.bench.store_disk import drop_page_cache, filesystem
from keepwarm.bench.store_index import measure_index
from keepwarm.bench.store_report import (
    ColdSample,
    NoReusePair,
    ObjectPair,
    RestartSample,
    Samples,
    flat_medians,
    ratios,
    tier_read,
)
from keepwarm.bench.store_restore import Question, measure
from keepwarm.bench.store_scan import measure_scan
from keepwarm.bench.store_servers import Running, Servers
from keepwarm.core.clock import Clock, RandomIds, SystemClock
from keepwarm.demo import DemoError
from keepwarm.demo.corpus import documentation
from keepwarm.engine import ModelInfo
from keepwarm.engine.local import EngineFault, open_tokenizer
from keepwarm.launch import ending_on_sigterm

T = TypeVar("T")

TEMPLATE_TOKENS = 40  # what a chat template puts around a context and a question, at most
SHORT_TOKENS = 96  # less than automatic reuse begins at: nothing of it is stored
ONE_SHOT_TOKENS = (600, 1000)
SEED = 11


class Plan(Struct, frozen=True):
    """How much is measured."""

    n_tokens: int
    quick: bool
    question_tokens: int = 16
    lookup_tokens: int = 100_000

    @property
    def n_cold(self) -> int:
        return 1 if self.quick else 3

    @property
    def n_objects(self) -> int:
        """Pairs."""
        return 1 if self.quick else 6

    @property
    def n_blocks(self) -> int:
        """Pairs of blocks of prompts that are never asked again."""
        return 2 if self.quick else 12

    @property
    def block_prompts(self) -> int:
        return 2 if self.quick else 4

    @property
    def n_restarts(self) -> int:
        return 2 if self.quick else 8

    @property
    def n_restores(self) -> int:
        return 1 if self.quick else 8

    @property
    def index_blocks(self) -> int:
        return 2_000 if self.quick else 20_000

    @property
    def n_look_ups(self) -> int:
        return 5 if self.quick else 100

    @property
    def scan_blocks(self) -> int:
        return 1_000 if self.quick else 10_000

    @property
    def n_scans(self) -> int:
        return 1 if self.quick else 5


class Measurement:
    """One run: the servers, and what they came to so far."""

    def __init__(
        self,
        plan: Plan,
        servers: Servers,
        prose: Prose,
        runner: asyncio.Runner,
        console: Console,
        clock: Clock,
    ) -> None:
        self._plan, self._servers, self._prose = plan, servers, prose
        self._runner, self._console, self._clock = runner, console, clock
        self._key = RandomIds().new("bench-")  # one tenant, and a new one
        self._n_texts = 0
        self._random = np.random.default_rng(SEED)
        self.samples = Samples()
        self.dropped = ""

    def run(self) -> ModelInfo:
        """Everything, in order; the model that was served."""
        with self._servers.running("disk", self._key) as disk:
            model = self._do(self._warm_up(disk.service))
            self._do(self._cold(disk.service))
            with self._servers.running("host", self._key) as host:
                self._do(self._warm_up(host.service))
                self._do(self._objects(disk.service, host.service))
            with self._servers.running("off", self._key) as off:
                self._do(self._warm_up(off.service))
                self._do(self._no_reuse(disk.service, off.service))
            stored = self._do(self._store(disk.service))
            disk.kill()
        for number in range(self._plan.n_restarts):
            self._restart(stored, number)
        self._restore()
        self._index()
        self._scan()
        return model

    # --- texts

    def _seed(self) -> int:
        self._n_texts += 1
        return self._n_texts

    def _context(self, n_tokens: int) -> str:
        return self._prose.passage(self._seed(), max(1, n_tokens - self._plan.question_tokens - TEMPLATE_TOKENS))

    def _question(self) -> str:
        return self._prose.question(self._seed(), self._plan.question_tokens)

    def _short(self) -> Ask:
        return Ask(self._context(SHORT_TOKENS), self._question())

    # --- the parts

    def _do(self, part: Coroutine[Any, Any, T]) -> T:
        with self._console.status("measuring"):
            return self._runner.run(part)

    def _say(self, line: str) -> None:
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    async def _warm_up(self, service: Service) -> ModelInfo:
        """The first calls pay for pages and threads."""
        await service.ask(self._short().messages(), 4)
        model = (await service.idle()).model
        assert model is not None
        if model.granularity is None:
            raise BenchError("this model is not exact here, so the server does not cache; run: keepwarm verify")
        return model

    async def _cold(self, service: Service) -> None:
        for _ in range(self._plan.n_cold):
            ask = Ask(self._context(self._plan.n_tokens), self._question())
            answer = await service.ask(ask.messages(), 1)
            await service.idle()
            phases = until_first_token(answer.ttft_ms, answer.timings)
            usage = answer.usage
            self.samples.cold.append(ColdSample(usage.prompt_tokens, usage.cached_tokens, answer.ttft_ms, phases))
            self._say(f"cold, {usage.prompt_tokens:,} tokens: {shown(answer.ttft_ms)} ms")

    async def _in_turn(
        self, number: int, work: Callable[[Service], Awaitable[float]], first: Service, second: Service
    ) -> tuple[float, float]:
        """The same work for both, one after the other; odd rounds begin with the second."""
        if number % 2:
            took = await work(second)
            return await work(first), took
        return await work(first), await work(second)

    async def _objects(self, disk: Service, host: Service) -> None:
        for number in range(self._plan.n_objects):
            made: list[CacheObject] = []
            work = partial(self._object, self._context(self._plan.n_tokens), made)
            pair = ObjectPair(0, *await self._in_turn(number, work, disk, host))
            pair = replace(pair, n_tokens=made[0].tokens)
            self.samples.objects.append(pair)
            self._say(
                f"object of {pair.n_tokens:,} tokens: {shown(pair.disk_ms)} ms on disk, "
                f"{shown(pair.host_ms)} ms in RAM alone"
            )

    async def _object(self, context: str, made: list[CacheObject], service: Service) -> float:
        """Milliseconds until a new object is ready. It is deleted then."""
        await service.idle()
        begin = self._clock.monotonic()
        made.append(await service.create_object(context))
        took_ms = (self._clock.monotonic() - begin) * 1000
        await service.delete_object(made[-1].id)
        await service.idle()
        return took_ms

    async def _no_reuse(self, on: Service, off: Service) -> None:
        for number in range(self._plan.n_blocks):
            lengths = self._random.integers(*ONE_SHOT_TOKENS, self._plan.block_prompts, endpoint=True)
            asks = [Ask(self._context(int(n)), self._question()) for n in lengths]
            asks.append(self._short())  # its answer waits until the prompt before it is stored
            n_tokens: list[int] = []
            on_ms, off_ms = await self._in_turn(number, partial(self._one_shots, asks, n_tokens), on, off)
            pair = NoReusePair(len(asks), n_tokens[0], on_ms, off_ms)
            self.samples.no_reuse.append(pair)
            self._say(f"{pair.n_tokens:,} tokens never asked again: {shown(on_ms)} ms, caching off {shown(off_ms)} ms")

    async def _one_shots(self, asks: list[Ask], n_tokens: list[int], service: Service) -> float:
        """Milliseconds for all, one after another; appends how many tokens they have."""
        await service.idle()
        async with service.connect() as [connection]:
            begin = self._clock.monotonic()
            n_tokens.append(await _ask_all(connection, asks))
            return (self._clock.monotonic() - begin) * 1000

    async def _store(self, service: Service) -> Stored:
        context = self._context(self._plan.n_tokens)
        made = await service.create_object(context)
        self._say(f"object of {made.tokens:,} tokens ready; the server is killed")
        return Stored(context, made.id, made.tokens)

    def _restart(self, stored: Stored, number: int) -> None:
        """Even ones ask behind the object at once, odd ones something else before."""
        self.dropped = drop_page_cache(self._servers.directory("disk"), whole=not self._plan.quick)
        with self._servers.running("disk", self._key) as disk:
            sample = self._do(self._disk_hit(disk, stored, is_first=number % 2 == 0))
            disk.kill()
        self.samples.restarts.append(sample)
        what = "first question" if sample.is_first else "later question"
        self._say(
            f"restarted, {what}: {sample.n_cached:,} tokens from {sample.read}, {shown(sample.ttft_ms)} ms; "
            f"ready after {shown(sample.start_ms)} ms"
        )

    async def _disk_hit(self, disk: Running, stored: Stored, *, is_first: bool) -> RestartSample:
        service = disk.service
        if not is_first:
            await service.ask(self._short().messages(), 1)
        before = await service.idle()
        answer = await service.ask(stored.ask(self._question()).messages(), 1)
        after = await service.idle()
        scan_s = after.store.scan_s if after.store is not None else None
        return RestartSample(
            is_first=is_first,
            read=tier_read(before.store, after.store),
            n_prompt=answer.usage.prompt_tokens,
            n_cached=answer.usage.cached_tokens,
            ttft_ms=answer.ttft_ms,
            phases=until_first_token(answer.ttft_ms, answer.timings),
            start_ms=disk.start_ms,
            scan_ms=None if scan_s is None else scan_s * 1000,
        )

    def _restore(self) -> None:
        plan, directory = self._plan, self._servers.directory("restore")
        config = self._servers.config("disk", directory)
        for sample in measure(Question(config, plan.n_tokens, plan.n_restores, whole=not plan.quick)):
            self.samples.restores.append(sample)
            self._say(f"{sample.way}: {sample.n_bytes / 1e6:,.1f} MB in {shown(sample.ms)} ms")

    def _index(self) -> None:
        plan, policy_name = self._plan, self._servers.config("disk").cache.policy
        sample = measure_index(plan.index_blocks, plan.lookup_tokens, plan.n_look_ups, policy_name, self._clock)
        self.samples.index.append(sample)
        self._say(f"index of {sample.n_blocks:,} blocks: {shown(sample.bytes_per_block)} bytes a block")

    def _scan(self) -> None:
        plan, directory = self._plan, self._servers.directory("scan")
        for sample in measure_scan(directory, plan.scan_blocks, plan.n_scans, self._clock, whole=not plan.quick):
            self.samples.scans.append(sample)
            self._say(f"{sample.n_blocks:,} blocks on disk found in {shown(sample.ms)} ms")


async def _ask_all(connection: Connection, asks: list[Ask]) -> int:
    """One after another, one token of answer each; the prompts' tokens."""
    n_tokens = 0
    for ask in asks:
        answer = await connection.stream_chat(chat_body(ask.messages(), 1, stream=True))
        if answer.usage.cached_tokens > TEMPLATE_TOKENS:
            raise BenchError(f"{answer.usage.cached_tokens:,} tokens of a prompt nobody asked before were cached")
        n_tokens += answer.usage.prompt_tokens
    return n_tokens


def run_and_show(
    plan: Plan, console: Console, *, data_dir: Path | None, config_file: Path | None, out: Path | None
) -> None:
    """Measure, write the report to `out` or a file of a default name, print it. Raises as `run`."""
    publish(run(plan, console, data_dir=data_dir, config_file=config_file), console, out)


def run(plan: Plan, console: Console, *, data_dir: Path | None, config_file: Path | None) -> Report[Samples]:
    """Measure, in a directory that is removed again: below `data_dir`, so on its disk. Raises BenchError, ConfigError."""
    clock = SystemClock()
    if data_dir is not None:
        data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    with ending_on_sigterm(), tempfile.TemporaryDirectory(prefix="keepwarm-bench-", dir=data_dir) as name:
        scratch = Path(name)
        servers = Servers(scratch, (data_dir or scratch) / "models", config_file, console, clock)
        config = servers.config("disk")
        if not config.disk_bytes():
            raise BenchError("the configuration has no disk tier: leave out cache.disk_bytes = 0")
        on = filesystem(scratch)
        console.print(f"the disk tier is on {on}", highlight=False, markup=False)
        try:
            document, tokenizer = documentation(), open_tokenizer(config)
        except (DemoError, EngineFault) as error:
            raise BenchError(str(error)) from error
        prose = Prose(document, lambda text: len(tokenizer.encode_plain(text)))
        created_at = clock.now()
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            measurement = Measurement(plan, servers, prose, runner, console, clock)
            model = measurement.run()
        samples = measurement.samples
        return Report(
            kind="store",
            created_at=timestamp(created_at),
            machine=this_machine(),
            versions=these_versions(),
            model=model,
            settings={
                "tokens": plan.n_tokens,
                "quick": plan.quick,
                "threads": config.n_threads(),
                "thread_wait": config.engine_environment().get("OMP_WAIT_POLICY", "default"),
                "ubatch": config.model.n_ubatch,
                "policy": config.cache.policy,
                "disk": on,
                "disk_bytes": config.disk_bytes(),
                "host_bytes": config.host_bytes(),
                "page_cache": f"dropped: {measurement.dropped}",
            },
            ratios=ratios(samples),
            medians=flat_medians(samples),
            samples=samples,
        )
