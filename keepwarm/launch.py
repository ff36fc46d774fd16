"""A `keepwarm serve --dev` in a process of its own, for the demo and the benches: started, watched until ready, ended with them."""

import http.client
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType

import msgspec
from msgspec import Struct

from keepwarm.core.clock import Clock

HOST = "127.0.0.1"
LOG_NAME = "server.log"
LOG_TAIL_LINES = 10
POLL_S = 0.1
READY_S_MAX = 900.0  # the first start prepares the model and measures the machine
STOP_S_MAX = 30.0
REQUEST_S_MAX = 10.0
NO_HEADERS: Mapping[str, str] = MappingProxyType({})


class LaunchError(Exception):
    """The server did not start, or ended; the message is one line that says what to do."""


class EngineHealth(Struct, frozen=True):
    """What is needed here of GET /health's `engine` member."""

    epoch: int


class Health(Struct, frozen=True):
    """What is needed here of GET /health. `is_ready` is the status code's part."""

    detail: str
    engine: EngineHealth
    is_ready: bool = False


class ServerProcess:
    """A running server process. `url` has no path."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, log: Path, clock: Clock) -> None:
        self._process = process
        self._log = log
        self._clock = clock
        self.port = port
        self.pid = process.pid
        self.url = f"http://{HOST}:{port}"

    def pause(self) -> None:
        """Wait a moment for something to change. Raises LaunchError when it is the server's end that comes."""
        try:
            status = self._process.wait(timeout=POLL_S)
        except subprocess.TimeoutExpired:
            return
        raise LaunchError(f"the server ended with status {status}; its last words are above")

    def wait(self) -> None:
        """Wait until the server ends by itself."""
        self._process.wait()

    def wait_until(self, what: str, is_so: Callable[[], bool], timeout_s: float = READY_S_MAX) -> None:
        """Raises LaunchError when it is not so in time, or the server ends before."""
        deadline = self._clock.monotonic() + timeout_s
        while not is_so():
            if self._clock.monotonic() > deadline:
                raise LaunchError(f"waited {timeout_s:.0f} s for {what}; the server's last words are above")
            self.pause()

    def health(self) -> Health | None:
        """What the server says of itself; None while it does not listen yet."""
        try:
            status, body = self._request("GET", "/health")
        except ConnectionError:
            return None
        return msgspec.structs.replace(msgspec.json.decode(body, type=Health), is_ready=status == http.HTTPStatus.OK)

    def wait_ready(self, say: Callable[[str], None], after_epoch: int = 0) -> Health:
        """Wait for an engine later than `after_epoch`, saying what the server is at. Raises LaunchError."""
        last: list[Health] = []

        def is_ready() -> bool:
            health = self.health()
            if health is None:
                return False
            say(health.detail)
            last[:] = [health]
            return health.is_ready and health.engine.epoch > after_epoch

        self.wait_until("the server to become ready", is_ready)
        return last[0]

    def restart_engine(self, key: str) -> None:
        """End the engine's process, as a crash would. Raises LaunchError."""
        status, body = self._request("POST", "/admin/engine/restart", {"Authorization": f"Bearer {key}"})
        if status != http.HTTPStatus.ACCEPTED:
            raise LaunchError(f"the engine's restart was answered with {status}: {body[:200].decode(errors='replace')}")

    def log_tail(self) -> str:
        """The last lines the server wrote."""
        return "\n".join(self._log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_TAIL_LINES:])

    def stop(self) -> None:
        """End the server in order; when it does not end, end its whole process group."""
        self._process.terminate()
        try:
            self._process.wait(timeout=STOP_S_MAX)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def _request(self, method: str, path: str, headers: Mapping[str, str] = NO_HEADERS) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection(HOST, self.port, timeout=REQUEST_S_MAX)
        try:
            connection.request(method, path, headers=dict(headers))
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()


@contextmanager
def serving(data_dir: Path, clock: Clock, options: tuple[str, ...] = ()) -> Iterator[ServerProcess]:
    """A server on a free port of this machine, for as long as the context lasts. It may not be ready yet."""
    data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    log, port = data_dir / LOG_NAME, _free_port()
    command = [sys.executable, "-m", "keepwarm", "serve", "--dev", "--host", HOST, "--port", str(port)]
    command += ["--database-url", ""]  # of this data directory, whatever the environment names
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--data-dir", str(data_dir), *options],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is the starter's, which ends the server in order
        )
    server = ServerProcess(process, port, log, clock)
    try:
        yield server
    finally:
        server.stop()


def _free_port() -> int:
    """A port nobody listens on now; the server says so when somebody is faster."""
    with socket.create_server((HOST, 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def ending_on_sigterm() -> Iterator[None]:
    """Let SIGTERM unwind the stack, so that the server is not left behind."""
    before = signal.signal(signal.SIGTERM, lambda _number, _frame: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
