"""`keepwarm bench gateway`: what the gateway itself costs, with the scripted engine behind it.

A body of 1 KB: a text that stays the same and a short question that does not, one token of answer. First one request after
another, then many connections at once while the gateway's memory is watched. Then what keys, limits and ledger add to that:
gateway_billing.py.
"""

import asyncio
import tempfile
from functools import partial
from pathlib import Path

import psutil
import uvloop
from rich.console import Console

from keepwarm.bench import gateway_billing
from keepwarm.bench.client import CHAT_PATH, TIMINGS_HEADER, Connection
from keepwarm.bench.gateway_report import FORMS, Form, Latency, Samples, Throughput, flat_medians, ratios
from keepwarm.bench.machine import these_versions, this_machine
from keepwarm.bench.pinning import pinned
from keepwarm.bench.report import Report, publish, shown, timestamp
from keepwarm.bench.service import Service, chat_body, running_server
from keepwarm.bench.sse import engine_ms
from keepwarm.core.clock import Clock, RandomIds, SystemClock
from keepwarm.engine import ModelInfo
from keepwarm.launch import ServerProcess

SCRIPTED = '[model]\nengine = "scripted"\n'
BODY_BYTES = 1024
N_CONNECTIONS = 16
N_PARTS = 10  # memory is looked at so many times
LATENCY_REQUESTS_MAX = 500
FILLER = "The gateway reads this text, renders it, and asks the engine what it knows of it. "


class Load:
    """Requests to one server, numbered on."""

    def __init__(self, server: ServerProcess, service: Service, clock: Clock) -> None:
        self._gateway = psutil.Process(server.pid)
        self._service, self._clock = service, clock
        self._n_sent = 0

    async def latency(self, form: Form, n: int) -> Latency:
        """`n` requests, one after another."""
        found = Latency()
        async with self._service.connect() as [connection]:
            for _ in range(n):
                total_ms, timings = await self._timed(connection, form)
                found.total_ms.append(round(total_ms, 3))
                found.engine_ms.append(round(engine_ms(timings), 3))
        return found

    async def throughput(self, form: Form, n: int) -> Throughput:
        """`n` requests over all connections, in `N_PARTS` parts."""
        n_between = max(1, n // N_PARTS)
        rss, spent_s = [self._rss()], 0.0
        async with self._service.connect(N_CONNECTIONS) as connections:
            for _ in range(N_PARTS):
                begin = self._clock.monotonic()
                await self._part(connections, form, n_between)
                spent_s += self._clock.monotonic() - begin
                rss.append(self._rss())
        return Throughput(N_CONNECTIONS, n_between * N_PARTS, round(spent_s, 6), n_between, rss)

    async def _part(self, connections: list[Connection], form: Form, n: int) -> None:
        left = iter(range(n))

        async def work(connection: Connection) -> None:
            for _ in left:
                await connection.call_ok("POST", CHAT_PATH, self._body(form))

        await asyncio.gather(*(work(connection) for connection in connections))

    async def _timed(self, connection: Connection, form: Form) -> tuple[float, dict[str, float]]:
        body = self._body(form)
        if form == "stream":
            answer = await connection.stream_chat(body)
            return answer.ended_ms, answer.timings
        reply = await connection.call_ok("POST", CHAT_PATH, body, {TIMINGS_HEADER: "1"})
        return reply.ms, reply.timings

    def _body(self, form: Form) -> bytes:
        self._n_sent += 1
        return sized_body(self._n_sent, BODY_BYTES, stream=form == "stream")

    def _rss(self) -> int:
        return self._gateway.memory_info().rss


def sized_body(number: int, n_bytes: int, *, stream: bool) -> bytes:
    """A request body of exactly `n_bytes`: only the question depends on `number`, and all numbers are equally long."""

    def body(context: str) -> bytes:
        question = {"role": "user", "content": f"Question {number:09d}?"}
        return chat_body([{"role": "system", "content": context}, question], 1, stream=stream)

    n_filler = n_bytes - len(body(""))
    return body((FILLER * (n_filler // len(FILLER) + 1))[:n_filler])


def run_and_show(n_requests: int, console: Console, *, out: Path | None) -> None:
    """Measure, write the report to `out` or a file of a default name, print it. Raises as `run`."""
    publish(run(n_requests, console), console, out)


def run(n_requests: int, console: Console) -> Report[Samples]:
    """Measure. Raises BenchError."""
    clock = SystemClock()
    created_at = clock.now()
    with tempfile.TemporaryDirectory(prefix="keepwarm-bench-") as scratch:
        config_file = Path(scratch) / "scripted.toml"
        config_file.write_text(SCRIPTED, encoding="utf-8")
        with (
            running_server(Path(scratch), config_file, console, clock) as server,
            pinned(server.pid) as cores,
            asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
        ):
            console.print(f"{cores}; {BODY_BYTES:,} bytes a request", highlight=False)
            model, latency, throughput = runner.run(_measure(n_requests, console, clock, server))
        # Not before that server is gone and we are on all cores again: what we start inherits ours.
        n_turns = max(1, n_requests // N_PARTS)
        body = partial(sized_body, n_bytes=BODY_BYTES, stream=False)
        with console.status("measuring keys, limits and ledger"):
            billed = gateway_billing.measure(n_turns, body, Path(scratch), SCRIPTED, console, clock)
        console.print(f"billing: {len(billed.on.all_ms):,} requests without and with it", highlight=False)
    samples = Samples(latency, throughput, billed)
    return Report(
        kind="gateway",
        created_at=timestamp(created_at),
        machine=this_machine(),
        versions=these_versions(),
        model=model,
        settings={"requests": n_requests, "body_bytes": BODY_BYTES, "connections": N_CONNECTIONS, "cores": cores},
        ratios=ratios(samples),
        medians=flat_medians(samples),
        samples=samples,
    )


async def _measure(
    n_requests: int, console: Console, clock: Clock, server: ServerProcess
) -> tuple[ModelInfo, dict[Form, Latency], dict[Form, Throughput]]:
    service = Service(server.port, RandomIds().new("bench-"), clock)
    model = (await service.idle()).model
    assert model is not None
    load = Load(server, service, clock)
    n_latency = max(1, min(LATENCY_REQUESTS_MAX, n_requests // N_PARTS))
    latency: dict[Form, Latency] = {}
    throughput: dict[Form, Throughput] = {}
    with console.status("measuring"):
        await load.latency("whole", max(1, n_latency // N_PARTS))  # the first ones pay for what is loaded late
        for form in FORMS:
            latency[form] = await load.latency(form, n_latency)
            console.print(f"{form}: {n_latency:,} requests one after another")
        for form in FORMS:
            throughput[form] = await load.throughput(form, n_requests if form == "whole" else n_requests // N_PARTS)
            done = throughput[form]
            console.print(f"{form}: {done.n_requests:,} requests at {shown(done.requests_per_s)}/s")
    return model, latency, throughput
