"""`keepwarm bench ttft`: time to the first token, cold and warm, decoding and several users, beside raw llama.cpp.

Two sides that never compute at the same time: a server, asked over HTTP with streaming, and the baseline's process. They
take turns in changing order, so that what else the machine does hits both. Every context begins with words of its own
and the tenant is new, so what is called cold is.
"""

import asyncio
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path

import uvloop
from msgspec import Struct
from rich.console import Console

from keepwarm.bench.baseline import Baseline, baseline
from keepwarm.bench.client import Answer
from keepwarm.bench.machine import these_versions, this_machine
from keepwarm.bench.prompts import Ask, Prompts, Stored, n_shared
from keepwarm.bench.prose import Prose
from keepwarm.bench.raw_frames import Base, Cold, DecodeAll, Follow, Took, Warm
from keepwarm.bench.report import Report, publish, shown, timestamp
from keepwarm.bench.service import Service, running_server
from keepwarm.bench.sse import until_first_token
from keepwarm.bench.ttft_report import (
    ColdSample,
    CrowdSample,
    DecodeSample,
    NewContextSample,
    Samples,
    WarmSample,
    Way,
    flat_medians,
    ratios,
)
from keepwarm.config import load
from keepwarm.core.clock import Clock, RandomIds, SystemClock
from keepwarm.core.prompt import Prompt
from keepwarm.demo.corpus import documentation
from keepwarm.engine import ModelInfo
from keepwarm.engine.local import open_tokenizer

TEMPLATE_TOKENS = 40  # what a chat template puts around a context and a question, at most
BASE_SPARE_TOKENS = 256  # the kept state must cover every cached prefix, and contexts differ by a few tokens
WARM_UP_TOKENS = 96
OTHER_TOKENS = 600
NEW_CONTEXT_TOKENS_MIN = 640  # automatic reuse begins at 512
STORY = "Write a very long story about {}, with many chapters."
HEROES = ("a lighthouse", "two engineers", "a slow train", "the moon", "a baker", "an old map", "a river", "nine cats")


class Plan(Struct, frozen=True):
    """How much is measured."""

    n_tokens: int
    quick: bool
    question_tokens: int = 16
    n_users: int = 8
    decode_tokens: int = 64
    crowd_tokens: int = 32
    n_others: int = 6

    @property
    def n_rounds(self) -> int:
        return 1 if self.quick else 2

    @property
    def n_warm(self) -> int:
        return 2 if self.quick else 6

    @property
    def n_displaced(self) -> int:
        return 1 if self.quick else 3


class Measurement:
    """One run: the two sides, and what they came to so far."""

    def __init__(
        self,
        plan: Plan,
        service: Service,
        raw: Baseline | None,
        prompts: Prompts,
        model: ModelInfo,
        say: Callable[[str], None],
    ) -> None:
        self._plan, self._service, self._raw, self._prompts = plan, service, raw, prompts
        self._model, self._say = model, say
        self._prose = Prose(documentation(), prompts.count)
        self._n_texts = 0
        self._last_cached: dict[Way, int] = {}
        self.samples = Samples()

    async def run(self) -> None:
        """Everything, in order."""
        await self._warm_up()
        context = ""
        for number in range(self._plan.n_rounds):
            context = self._context(self._plan.n_tokens)
            await self._cold(context, number)
        stored = await self._object()
        for number in range(self._plan.n_warm):
            await self._warm("object", stored.ask(self._question()), number)
            await self._warm("automatic", Ask(context, self._question()), number)
        for number in range(self._plan.n_displaced):
            await self._ask_others()
            await self._warm("displaced", Ask(context, self._question()), number)
        for number in range(self._plan.n_rounds):
            await self._decode(stored.ask(STORY.format(f"{number + 2} friends")), number)
        for number in range(self._plan.n_rounds):
            await self._crowd([stored.ask(STORY.format(f"{hero} and {number + 2} friends")) for hero in HEROES])
        await self._new_context(self._context(max(NEW_CONTEXT_TOKENS_MIN, self._plan.n_tokens // 2)))
        await self._service.delete_object(stored.object_id)

    # --- texts

    def _seed(self) -> int:
        self._n_texts += 1
        return self._n_texts

    def _context(self, n_tokens: int) -> str:
        return self._prose.passage(self._seed(), max(1, n_tokens - self._plan.question_tokens - TEMPLATE_TOKENS))

    def _question(self) -> str:
        return self._prose.question(self._seed(), self._plan.question_tokens)

    # --- the two sides in turn

    async def _both(
        self, number: int, ask: Callable[[], Awaitable[Answer]], raw: Callable[[], Awaitable[Took]]
    ) -> tuple[Answer, Took | None]:
        """Even rounds begin with the server, odd ones with the baseline."""
        took: Took | None = None
        if self._raw is not None and number % 2:
            took = await raw()
        answer = await ask()
        await self._service.idle()  # its storing is over before raw computes
        if self._raw is not None and took is None:
            took = await raw()
        return answer, took

    async def _ask_raw(self, question: Cold | Base | Warm | DecodeAll) -> Took:
        assert self._raw is not None
        return await self._raw.ask(question)

    async def _warm_up(self) -> None:
        """The first calls pay for pages and threads."""
        ask = Ask(self._context(WARM_UP_TOKENS + TEMPLATE_TOKENS), self._question())
        prompt = self._prompts.prompt(ask)
        await self._both(0, lambda: self._service.ask(ask.messages(), 4), lambda: self._raw_cold(prompt))

    async def _raw_cold(self, prompt: Prompt) -> Took:
        return await self._ask_raw(Cold(prompt.tokens.tolist(), self._prompts.rows(prompt, 0)))

    async def _cold(self, context: str, number: int) -> None:
        ask = Ask(context, self._question())
        prompt = self._prompts.prompt(ask)
        answer, took = await self._both(
            number, lambda: self._service.ask(ask.messages(), 1), lambda: self._raw_cold(prompt)
        )
        self._check(answer, prompt)
        phases = until_first_token(answer.ttft_ms, answer.timings)
        usage, raw_ms = answer.usage, None if took is None else took.ms
        self.samples.cold.append(ColdSample(usage.prompt_tokens, usage.cached_tokens, answer.ttft_ms, phases, raw_ms))
        self._tell(f"cold, {usage.prompt_tokens:,} tokens", answer.ttft_ms, raw_ms)

    async def _object(self) -> Stored:
        """A cache object, and the baseline's state of the same length."""
        context = self._context(self._plan.n_tokens)
        made = await self._service.create_object(context)
        await self._service.idle()
        self._say(f"cache object of {made.tokens:,} tokens ready")
        if self._raw is not None:
            prompt = self._prompts.prompt(Ask(context, self._question()))
            tokens = [*prompt.tokens.tolist(), *prompt.tokens[:BASE_SPARE_TOKENS].tolist()]
            n, n_ubatch = len(tokens), self._prompts.n_ubatch
            rows = [min(n_ubatch, n - at) for at in range(0, n, n_ubatch)]
            await self._ask_raw(Base(tokens, rows))
        return Stored(context, made.id, made.tokens)

    async def _ask_others(self) -> None:
        for _ in range(self._plan.n_others):
            await self._service.ask(Ask(self._context(OTHER_TOKENS), self._question()).messages(), 1)
        await self._service.idle()

    async def _warm(self, way: Way, ask: Ask, number: int) -> None:
        prompt = self._prompts.prompt(ask)
        ahead = number % 2 if way in self._last_cached else 0  # raw first needs to know how much will be cached
        raw_ahead = await self._raw_warm(prompt, self._last_cached[way]) if ahead else None
        answer = await self._service.ask(ask.messages(), 1)
        await self._service.idle()
        self._check(answer, prompt)
        usage, model = answer.usage, self._model
        n_cached = self._last_cached[way] = usage.cached_tokens
        raw = raw_ahead or await self._raw_warm(prompt, n_cached)
        other = Ask(ask.context, "?", ask.object_id, ask.object_tokens)
        n_context = ask.object_tokens or n_shared([prompt, self._prompts.prompt(other)])
        restore_ms = answer.timings.get("engine_restore_ms", 0.0)
        sample = WarmSample(
            way=way,
            n_prompt=usage.prompt_tokens,
            n_cached=n_cached,
            n_evaluated=usage.prompt_tokens - n_cached,
            n_new=usage.prompt_tokens - n_context,
            ttft_ms=answer.ttft_ms,
            phases=until_first_token(answer.ttft_ms, answer.timings),
            restore_gb_per_s=model.bytes_per_token * n_cached / restore_ms / 1e6 if n_cached and restore_ms else None,
            raw=raw[0],
            raw_at_once=raw[1],
        )
        self.samples.warm.append(sample)
        self._tell(
            f"warm by {way}, {sample.n_evaluated} evaluated", answer.ttft_ms, None if raw[0] is None else raw[0].ms
        )

    async def _raw_warm(self, prompt: Prompt, n_cached: int) -> tuple[Took | None, Took | None]:
        """In the server's ubatches, and in one."""
        if self._raw is None:
            return None, None
        tokens = prompt.tokens[n_cached:].tolist()
        rows = self._prompts.rows(prompt, n_cached)
        same = await self._ask_raw(Warm(n_cached, tokens, rows))
        whole = [len(tokens)] if len(tokens) <= self._prompts.n_ubatch else rows
        return same, await self._ask_raw(Warm(n_cached, tokens, whole))

    # --- decoding

    async def _decode(self, ask: Ask, number: int) -> None:
        n_steps = self._plan.decode_tokens - 1
        follow = self._follow(ask, ask.object_tokens or 0, n_steps)
        answer, took = await self._both(
            number,
            lambda: self._service.ask(ask.messages(), self._plan.decode_tokens),
            lambda: self._ask_raw(DecodeAll([follow], strict=True)),
        )
        raw = None if took is None else n_steps * 1000 / took.ms
        sample = DecodeSample(answer.usage.completion_tokens, answer.decode_tokens_per_s, raw)
        self.samples.decode.append(sample)
        self._tell(f"decoding {sample.n_output} tokens, tokens/s", sample.tokens_per_s, raw, unit="")

    async def _crowd(self, asks: list[Ask]) -> None:
        """The baseline comes second, with each stream's number of tokens as the server decoded them."""
        answers = await self._service.ask_together([ask.messages() for ask in asks], self._plan.crowd_tokens)
        await self._service.idle()
        begin, end = max(answer.first_at for answer in answers), max(answer.finished_at for answer in answers)
        n_decoded = [sum(at > begin for at in answer.texts_at) for answer in answers]
        n_total = sum(n_decoded)
        raw: float | None = None
        if self._raw is not None and n_total:
            follows = [
                self._follow(ask, answer.usage.cached_tokens, n)
                for ask, answer, n in zip(asks, answers, n_decoded, strict=True)
            ]
            took = await self._ask_raw(DecodeAll(follows, strict=self._model.determinism == "strict"))
            raw = n_total * 1000 / took.ms
        sample = CrowdSample(
            ttft_ms=[answer.ttft_ms for answer in answers],
            n_output=[answer.usage.completion_tokens for answer in answers],
            n_decoded=n_decoded,
            tokens_per_s=n_total / (end - begin) if end > begin and n_total else None,
            raw_tokens_per_s=raw,
        )
        self.samples.crowd.append(sample)
        self._tell(f"{len(asks)} users at once, tokens/s", sample.tokens_per_s, raw, unit="")

    def _follow(self, ask: Ask, n_cached: int, n_steps: int) -> Follow:
        prompt = self._prompts.prompt(ask)
        return Follow(n_cached, prompt.tokens[n_cached:].tolist(), self._prompts.rows(prompt, n_cached), n_steps)

    async def _new_context(self, context: str) -> None:
        asks = [Ask(context, self._question()) for _ in range(self._plan.n_users)]
        prompts = [self._prompts.prompt(ask) for ask in asks]
        n_context = n_shared(prompts)
        before = await self._service.idle()
        answers = await self._service.ask_together([ask.messages() for ask in asks], 1)
        after = await self._service.idle()
        sample = NewContextSample(
            n_users=len(asks),
            n_context=n_context,
            n_questions=sum(prompt.n_tokens - n_context for prompt in prompts),
            n_evaluated=after.n_tokens_evaluated - before.n_tokens_evaluated,
            ttft_ms=[answer.ttft_ms for answer in answers],
        )
        self.samples.new_context.append(sample)
        self._say(
            f"{sample.n_users} users at once over a new context of {n_context:,} tokens: "
            f"{sample.n_evaluated:,} tokens evaluated"
        )

    def _check(self, answer: Answer, prompt: Prompt) -> None:
        n_served = answer.usage.prompt_tokens
        assert n_served == prompt.n_tokens, f"the server's prompt has {n_served} tokens, the bench's {prompt.n_tokens}"

    def _tell(self, what: str, value: float | None, raw: float | None, unit: str = " ms") -> None:
        beside = "" if raw is None else f" (raw {shown(raw)}{unit})"
        self._say(f"{what}: {'none' if value is None else shown(value)}{unit if value is not None else ''}{beside}")


def run_and_show(
    plan: Plan, console: Console, *, data_dir: Path | None, config_file: Path | None, out: Path | None
) -> None:
    """Measure, write the report to `out` or a file of a default name, print it. Raises as `run`."""
    publish(run(plan, console, data_dir=data_dir, config_file=config_file), console, out)


def run(plan: Plan, console: Console, *, data_dir: Path | None, config_file: Path | None) -> Report[Samples]:
    """Measure. Raises BenchError, DemoError where the documentation is not beside the package, ConfigError."""
    clock = SystemClock()
    with tempfile.TemporaryDirectory(prefix="keepwarm-bench-") as scratch:
        directory = data_dir or Path(scratch)
        with (
            running_server(directory, config_file, console, clock) as server,
            asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
        ):
            return runner.run(_measure(plan, console, clock, server.port, directory, config_file))


async def _measure(
    plan: Plan, console: Console, clock: Clock, port: int, data_dir: Path, config_file: Path | None
) -> Report[Samples]:
    config = load(None if config_file is None else str(config_file), {"data_dir": str(data_dir), "dev": True})
    service = Service(port, RandomIds().new("bench-"), clock)
    model = (await service.idle()).model
    assert model is not None
    created_at = clock.now()
    tokenizer = await asyncio.to_thread(open_tokenizer, config)
    with console.status("measuring"):
        async with baseline(config, model) as raw:
            prompts = Prompts(tokenizer, config, model)
            measurement = Measurement(plan, service, raw, prompts, model, console.print)
            await measurement.run()
    samples = measurement.samples
    return Report(
        kind="ttft",
        created_at=timestamp(created_at),
        machine=this_machine(),
        versions=these_versions(),
        model=model,
        settings={
            "tokens": plan.n_tokens,
            "question_tokens": plan.question_tokens,
            "users": plan.n_users,
            "quick": plan.quick,
            "threads": config.n_threads(),
            "thread_wait": config.engine_environment().get("OMP_WAIT_POLICY", "default"),
            "ubatch": config.model.n_ubatch,
            "baseline": "raw llama.cpp in a process of its own" if raw is not None else "none: scripted engine",
        },
        ratios=ratios(samples, model.granularity),
        medians=flat_medians(samples),
        samples=samples,
    )
