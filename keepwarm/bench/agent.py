"""`keepwarm bench agent`: a coding agent's session through the Anthropic dialect, turn by turn, with caching on and off.

Two servers that never compute at the same time are sent the same bodies in changing order: one as configured, one on which
neither automatic reuse nor a breakpoint reaches its minimum. Each turn sends the whole history again, as agents do; what
the model answers is compared and goes nowhere.
"""

import asyncio
import tempfile
from contextlib import ExitStack
from pathlib import Path

import uvloop
from msgspec import Struct
from rich.console import Console

from keepwarm.bench import BenchError
from keepwarm.bench.agent_report import Caching, Samples, TurnSample, flat_medians, ratios
from keepwarm.bench.agent_session import Session, Size
from keepwarm.bench.machine import these_versions, this_machine
from keepwarm.bench.messages import stream_message
from keepwarm.bench.report import Report, publish, shown, timestamp
from keepwarm.bench.service import Service
from keepwarm.bench.sse import until_first_token
from keepwarm.bench.store_servers import Servers
from keepwarm.config import Config
from keepwarm.core.clock import RandomIds, SystemClock
from keepwarm.engine import ModelInfo
from keepwarm.engine.local import EngineFault, open_tokenizer
from keepwarm.launch import ending_on_sigterm

SEED = 4
ANSWER_TOKENS = 8
WARM_UP = [{"role": "user", "content": "Say hello."}]


class Plan(Struct, frozen=True):
    """How much is measured."""

    n_turns: int
    base_tokens: int


class Measurement:
    """One session against two servers."""

    def __init__(self, session: Session, servers: dict[Caching, Service], console: Console) -> None:
        self._session, self._servers, self._console = session, servers, console
        self.samples = Samples()

    async def run(self, n_turns: int) -> ModelInfo:
        """All turns; the model that was served. Raises BenchError."""
        model = await self._warm_up()
        for number in range(1, n_turns + 1):
            order: list[Caching] = ["on", "off"] if number % 2 else ["off", "on"]
            found = {caching: await self._turn(number, caching) for caching in order}
            on, off = found["on"], found["off"]
            if on.n_prompt != off.n_prompt or off.n_read:
                raise BenchError(f"turn {number}: {off.n_read:,} of {off.n_prompt:,} tokens were read with caching off")
            self.samples.turns += [on, off]
            self._say(
                f"turn {number}, {on.n_prompt:,} tokens: {on.n_read:,} read ({on.outcome}, {on.cause or 'all there was'}), "
                f"{shown(on.ttft_ms)} ms; caching off {shown(off.ttft_ms)} ms"
            )
        return model

    async def _warm_up(self) -> ModelInfo:
        """The first calls pay for pages and threads."""
        models = []
        for service in self._servers.values():
            await service.ask(WARM_UP, ANSWER_TOKENS)
            models.append((await service.idle()).model)
        model = models[0]
        assert model is not None
        if model.granularity is None:
            raise BenchError("this model is not exact here, so the server does not cache; run: keepwarm verify")
        return model

    async def _turn(self, number: int, caching: Caching) -> TurnSample:
        service, earlier = self._servers[caching], self.samples.of(caching)
        async with service.connect() as [connection]:
            answer = await stream_message(connection, self._session.body(number, ANSWER_TOKENS))
        await service.idle()  # its storing is over before the other one computes
        usage = answer.usage
        n_read, n_written = usage.cache_read_input_tokens, usage.cache_creation_input_tokens
        n_prompt = usage.input_tokens + n_read + n_written
        return TurnSample(
            number=number,
            caching=caching,
            n_prompt=n_prompt,
            n_new=n_prompt - (earlier[-1].n_prompt if earlier else 0),
            n_read=n_read,
            n_written=n_written,
            n_fresh=usage.input_tokens,
            ttft_ms=round(answer.ttft_ms, 3),
            phases=until_first_token(answer.ttft_ms, answer.timings),
            outcome=answer.lookup.outcome,
            tier=answer.lookup.tier,
            cause=answer.lookup.cause,
            answer=answer.text,
        )

    def _say(self, line: str) -> None:
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)


def run_and_show(
    plan: Plan, console: Console, *, data_dir: Path | None, config_file: Path | None, out: Path | None
) -> None:
    """Measure, write the report to `out` or a file of a default name, print it. Raises as `run`."""
    publish(run(plan, console, data_dir=data_dir, config_file=config_file), console, out)


def run(plan: Plan, console: Console, *, data_dir: Path | None, config_file: Path | None) -> Report[Samples]:
    """Measure, in a directory that is removed again: below `data_dir`, so on its disk. Raises BenchError, ConfigError."""
    clock, size = SystemClock(), Size(n_turns=plan.n_turns, base_tokens=plan.base_tokens)
    if data_dir is not None:
        data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    with ending_on_sigterm(), tempfile.TemporaryDirectory(prefix="keepwarm-bench-", dir=data_dir) as name:
        scratch = Path(name)
        servers = Servers(scratch, (data_dir or scratch) / "models", config_file, console, clock)
        config = servers.config("disk")
        try:
            tokenizer = open_tokenizer(config)
        except EngineFault as error:
            raise BenchError(str(error)) from error
        session = Session(SEED, size, lambda text: len(tokenizer.encode_plain(text)))
        created_at = clock.now()
        model, samples = _measure(session, plan, servers, console)
        return _report(plan, size, config, model, samples, created_at)


def _measure(session: Session, plan: Plan, servers: Servers, console: Console) -> tuple[ModelInfo, Samples]:
    key = RandomIds().new("bench-")  # a tenant of its own, so nothing is warm
    with ExitStack() as stack:
        on = stack.enter_context(servers.running("disk", key)).service
        off = stack.enter_context(servers.running("off", key)).service
        measurement = Measurement(session, {"on": on, "off": off}, console)
        runner = stack.enter_context(asyncio.Runner(loop_factory=uvloop.new_event_loop))
        stack.enter_context(console.status("measuring"))
        model = runner.run(measurement.run(plan.n_turns))
    return model, measurement.samples


def _report(
    plan: Plan, size: Size, config: Config, model: ModelInfo, samples: Samples, created_at: float
) -> Report[Samples]:
    return Report(
        kind="agent",
        created_at=timestamp(created_at),
        machine=this_machine(),
        versions=these_versions(),
        model=model,
        settings={
            "turns": plan.n_turns,
            "seed": SEED,
            "base_tokens": size.base_tokens,
            "task_tokens": size.task_tokens,
            "step_tokens": f"{size.step_tokens[0]} to {size.step_tokens[1]}",
            "answer_tokens": ANSWER_TOKENS,
            "threads": config.n_threads(),
            "thread_wait": config.engine_environment().get("OMP_WAIT_POLICY", "default"),
            "ubatch": config.model.n_ubatch,
        },
        ratios=ratios(samples),
        medians=flat_medians(samples),
        samples=samples,
    )
