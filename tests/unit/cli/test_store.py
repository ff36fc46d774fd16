"""keepwarm store, against a small HTTP server that answers what it is told to."""

import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import msgspec
import pytest
from typer.testing import CliRunner, Result

from keepwarm.cli.root import build
from keepwarm.cli.store import BAR_CELLS, FREE, LEASED, RESIDENT, bar, human_bytes
from keepwarm.engine import PoolStatus, StoreStatus

GIB = 1 << 30
HOST = PoolStatus("host", 4 * GIB, GIB, 2 * GIB, GIB, 4 * GIB, n_blocks=1234)
DISK = PoolStatus("disk", 10 * GIB, 10 * GIB, 0, 0, 10 * GIB)
STORE = StoreStatus(
    (HOST, DISK),
    "cost",
    7,
    n_hits_host=6,
    n_hits_disk=3,
    n_misses=1,
    n_evicted_host=11,
    damaged={"checksum": 2, "torn": 0},
    prefill_tokens_per_s=1140.4,
    disk_bytes_per_s=2.5 * GIB,
)
TOLD = {"state": "ready", "epoch": 3, "detail": "Q4_0, plain", "store": STORE}


class Answers(HTTPServer):
    """Answers what is in `first`, then every request with `status` and `body`; keeps what it was asked."""

    status = 200
    body = b""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answering)
        self.asked: list[tuple[str, str | None]] = []
        self.first: list[tuple[int, bytes]] = []

    def next(self) -> tuple[int, bytes]:
        return self.first.pop(0) if self.first else (self.status, self.body)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Answering(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        answers: Any = self.server
        answers.asked.append((self.path, self.headers["authorization"]))
        status, body = answers.next()
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_args: object) -> None:
        """Nothing."""


@pytest.fixture
def server() -> Iterator[Answers]:
    with Answers() as answers:
        answers.body = msgspec.json.encode(TOLD)
        thread = threading.Thread(target=answers.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield answers
        finally:
            answers.shutdown()
            thread.join()


def store(*args: str, key: str = "") -> Result:
    return CliRunner().invoke(build(), ["store", *args], env={"COLUMNS": "160", "KEEPWARM_API_KEY": key})


def test_pools_counters_and_speeds_are_shown_and_the_unknown_is_not(server: Answers) -> None:
    result = store("--url", server.url)
    assert result.exit_code == 0, result.output
    out = result.stdout
    assert "engine ready, epoch 3: Q4_0, plain" in out
    assert LEASED * (BAR_CELLS // 4) + RESIDENT * (BAR_CELLS // 2) + FREE * (BAR_CELLS // 4) in out
    for text in ("1.0 GiB", "2.0 GiB", "4.0 GiB", "10.0 GiB", "1,234", "90% hits", "6 host, 3 disk, 1 missed"):
        assert text in out
    for text in ("11 host, 0 disk, by cost", "2 checksum", "1,140 tokens/s", "2.5 GiB/s"):
        assert text in out
    for text in ("torn", "host reads", "scan", "pressure"):
        assert text not in out


def test_json_is_the_servers_own(server: Answers) -> None:
    assert json.loads(store("--url", server.url, "--json").stdout) == json.loads(server.body)


def test_the_key_is_the_option_or_the_environment_or_anything(server: Answers) -> None:
    store("--url", server.url, "--key", "one", key="two")
    store("--url", server.url + "/", key="two")
    store("--url", server.url)
    assert server.asked[:2] == [("/admin/store", "Bearer one"), ("/admin/store", "Bearer two")]
    path, authorization = server.asked[2]
    assert path == "/admin/store"
    assert authorization
    assert authorization.startswith("Bearer ")


@pytest.mark.parametrize("state, words", [("ready", "caching is off"), ("down", "at the moment")])
def test_no_store_is_said(server: Answers, state: str, words: str) -> None:
    server.body = msgspec.json.encode({**TOLD, "state": state, "store": None})
    result = store("--url", server.url)
    assert result.exit_code == 0
    assert words in result.stdout


def failure(*args: str) -> str:
    result = store(*args)
    assert result.exit_code == 1
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    return line


def test_no_server_is_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
    assert failure("--url", url) == (
        f"keepwarm: no server answers at {url}: Connection refused; start one with keepwarm serve, or give its --url"
    )
    assert "no server answers" in failure("--url", "http://127.0.0.1:port")
    assert "is not the address of a server" in failure("--url", "ftp://x")


def test_a_refusal_is_one_line_with_the_servers_words(server: Answers) -> None:
    server.status, server.body = 401, b'{"error": {"message": "this API key is unknown", "type": "x"}}'
    assert failure("--url", server.url) == f"keepwarm: {server.url}: this API key is unknown (status 401)"


@pytest.mark.parametrize("status, body", [(200, b"<html>"), (200, b"{}"), (404, b"not found")])
def test_another_program_is_one_line(server: Answers, status: int, body: bytes) -> None:
    server.status, server.body = status, body
    assert f"answers at {server.url} with status {status} is no keepwarm server" in failure("--url", server.url)


def test_watching_asks_again_until_the_server_is_gone(server: Answers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("keepwarm.cli.store.WATCH_S", 0.0)
    server.first = [(200, server.body)] * 2
    server.status, server.body = 503, b'{"error": {"message": "the engine is not ready"}}'
    result = store("--url", server.url, "--watch")
    assert result.exit_code == 1
    assert result.stdout.count("engine ready, epoch 3") == 2
    assert "the engine is not ready (status 503)" in result.stderr


def test_a_bar_is_always_as_long_and_shows_the_least_bytes() -> None:
    full = PoolStatus("p", 1000, 0, 999, 1, 1000)
    assert bar(full) == LEASED + RESIDENT * (BAR_CELLS - 1)
    assert bar(PoolStatus("p", 0, 0, 0, 0, 0)) == FREE * BAR_CELLS
    for leased in range(0, 1001, 37):
        for resident in range(0, 1001 - leased, 41):
            assert len(bar(PoolStatus("p", 1000, 1000 - leased - resident, resident, leased, 1000))) == BAR_CELLS


def test_bytes_for_people() -> None:
    assert [human_bytes(n) for n in (0, 1023, 1024, 1536 * 1024, 3 * GIB, 5000 * GIB)] == [
        "0 B",
        "1,023 B",
        "1.0 KiB",
        "1.5 MiB",
        "3.0 GiB",
        "4.9 TiB",
    ]
