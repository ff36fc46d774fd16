"""The server under test: `keepwarm serve` on one data directory through many lives, its processes killed one by one.

Small budgets, so that eviction and refused leases happen within a round. A second server without a cache, on a directory
of its own, is the reference: its answers are cold.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import psutil

from keepwarm.config import Config
from keepwarm.core.clock import Clock
from keepwarm.launch import ServerProcess
from tests.crash.client import HOST, Api, answer_of, question_message, text_messages
from tests.crash.ledger import Answer
from tests.crash.plan import KEYS, Victim

START_S_MAX = 60.0  # an engine that never comes up is told after this
WORKER = "keepwarm.engine.worker"
HOST_BYTES = 400_000  # 12,500 tokens: less than the leases of a round
DISK_BYTES = 1_600_000  # the leases of some fifteen objects
CONFIG = """
log_format = "json"
[model]
engine = "scripted"
name = "scripted"
aliases = []
n_ctx = 4096
"""
TESTED = f"""{CONFIG}
[cache]
host_bytes = {HOST_BYTES}
disk_bytes = {DISK_BYTES}
auto_tokens_min = 256
[limits]
engine_restart_delay_s_max = 1.0
"""
COLD = f"""{CONFIG}
[cache]
host_bytes = 4_000_000
disk_bytes = 0
auto_tokens_min = 1000000
settle = "off"
"""


class LogLine(msgspec.Struct, frozen=True):
    """What is needed here of a line the server logs."""

    event: str
    object_id: str | None = None


class TestedServer:
    """One data directory and the server on it. `log` grows over all lives."""

    __test__ = False  # not a test class, whatever pytest thinks of its name

    def __init__(self, folder: Path, config: str, clock: Clock) -> None:
        self.data_dir, self.log = folder / "data", folder / "server.log"
        self.store_dir = Config(data_dir=str(self.data_dir)).store_dir()
        self._config_path, self._clock = folder / "keepwarm.toml", clock
        folder.mkdir(parents=True, exist_ok=True)
        self._config_path.write_text(config)
        self._process: subprocess.Popen[bytes] | None = None
        self._server: ServerProcess | None = None
        self._aimed: list[psutil.Process] = []

    @property
    def port(self) -> int:
        assert self._server
        return self._server.port

    def start(self) -> None:
        """Start the gateway; it may not listen yet."""
        with socket.create_server((HOST, 0)) as probe:
            port: int = probe.getsockname()[1]
        command = [sys.executable, "-m", "keepwarm", "serve", "--dev", "--config", str(self._config_path)]
        command += ["--host", HOST, "--port", str(port), "--data-dir", str(self.data_dir), "--database-url", ""]
        with self.log.open("ab") as out:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
            )
        self._process, self._server = process, ServerProcess(process, port, self.log, self._clock)

    def wait_ready(self, after_epoch: int = 0) -> None:
        """Raises LaunchError when the server ends, or is not ready in time."""
        server = self._server
        assert server

        def is_ready() -> bool:
            with contextlib.suppress(OSError):
                health = server.health()
                return health is not None and health.is_ready and health.engine.epoch > after_epoch
            return False

        server.wait_until("the server to become ready", is_ready, START_S_MAX)

    def epoch(self) -> int:
        """Of the engine now; 0 while the gateway does not answer."""
        assert self._server
        with contextlib.suppress(OSError):
            health = self._server.health()
            return health.engine.epoch if health else 0
        return 0

    def aim(self) -> None:
        """Find the engine's process for the next `kill`: a search takes longer than the moment to be hit."""
        self._aimed = self._engines()

    def kill(self, victim: Victim) -> bool:
        """SIGKILL to what was aimed at; True when the gateway is gone and must be started again."""
        match victim:
            case Victim.ENGINE:
                self._kill_aimed()
                return False
            case Victim.GATEWAY:
                self._kill_gateway()
            case Victim.ENGINE_THEN_GATEWAY:
                self._kill_aimed()
                self._kill_gateway()
            case Victim.GATEWAY_THEN_ENGINE:
                self._kill_gateway()
                self._kill_aimed()
        return True

    def kill_engine(self) -> bool:
        """Whichever there is now; False when there is none."""
        self.aim()
        self._kill_aimed()
        return bool(self._aimed)

    def log_end(self) -> int:
        """Bytes logged so far."""
        return self.log.stat().st_size

    def log_lines(self, since: int) -> Iterator[LogLine]:
        """What was logged after the first `since` bytes; lines that are no JSON are an interpreter's last words."""
        with self.log.open("rb") as log:
            log.seek(since)
            for line in log:
                with contextlib.suppress(msgspec.DecodeError, msgspec.ValidationError):
                    yield msgspec.json.decode(line, type=LogLine)

    def log_tail(self) -> str:
        return self._server.log_tail() if self._server else ""

    def stop(self) -> None:
        """End it in order."""
        if self._server is not None and self._process is not None and self._process.poll() is None:
            self._server.stop()

    def _engines(self) -> list[psutil.Process]:
        assert self._process
        with contextlib.suppress(psutil.NoSuchProcess):
            return [child for child in psutil.Process(self._process.pid).children() if _is_engine(child)]
        return []

    def _kill_aimed(self) -> None:
        for engine in self._aimed:
            _kill(engine)

    def _kill_gateway(self) -> None:
        assert self._process
        os.kill(self._process.pid, signal.SIGKILL)
        self._process.wait()


class Reference:
    """Cold answers, each asked for once."""

    def __init__(self, port: int) -> None:
        self._api = Api(port, KEYS[0])
        self._answers: dict[tuple[int, int], Answer] = {}

    def answer(self, text: int, question: int) -> Answer:
        """The answer to the question about the text, computed from the first token on."""
        found = self._answers.get((text, question))
        if found is None:
            reply = self._api.chat([*text_messages(text), question_message(question)])
            assert reply.status == 200, reply
            assert reply.body["usage"]["prompt_tokens_details"]["cached_tokens"] == 0, "the reference must be cold"
            found = self._answers[text, question] = answer_of(reply, text, question)
        return found


@contextmanager
def running(server: TestedServer) -> Iterator[TestedServer]:
    """The server, started and ready, ended with the context."""
    server.start()
    try:
        server.wait_ready()
        yield server
    finally:
        server.stop()


def _is_engine(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
        return WORKER in process.cmdline()
    return False


def _kill(process: psutil.Process) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.kill()
