"""The servers that `bench store` and `bench agent` compare: one configuration in variants, each with its own data directory.

    disk   as configured, with a disk tier
    host   without one: what is leased stays in host RAM
    off    nothing is stored but what an object leases: prompts are shorter than what reuse and breakpoints begin at

Prepared weights are shared through a link, so they are made once. All asks come from one tenant.
"""

import os
import signal
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import msgspec
from rich.console import Console

from keepwarm.bench import BenchError
from keepwarm.bench.service import Service, running_server
from keepwarm.config import Config, load
from keepwarm.core.clock import Clock
from keepwarm.launch import ServerProcess

Variant = Literal["disk", "host", "off"]
NEVER_TOKENS = 1 << 30  # more than any prompt has
CACHE: Mapping[Variant, Mapping[str, int]] = MappingProxyType(
    {"disk": {}, "host": {"disk_bytes": 0}, "off": {"auto_tokens_min": NEVER_TOKENS, "mark_tokens_min": NEVER_TOKENS}}
)


class Running:
    """A server that is ready. `start_ms` is how long that took."""

    def __init__(self, server: ServerProcess, service: Service, start_ms: float) -> None:
        self._server = server
        self.service, self.start_ms = service, start_ms

    def kill(self) -> None:
        """End gateway and engine at once, as a power cut would: neither finishes anything."""
        os.killpg(self._server.pid, signal.SIGKILL)  # `serving` starts it in a session of its own
        self._server.wait()


class Servers:
    """Makes them below `scratch`. `config_file` is the user's, `models` where prepared weights are kept.

    Raises ConfigError when the file cannot be used.
    """

    def __init__(self, scratch: Path, models: Path, config_file: Path | None, console: Console, clock: Clock) -> None:
        self._scratch, self._models = scratch, models
        self._base: dict[str, Any] = {}
        if config_file is not None:
            load(str(config_file), {})  # says in one line what is wrong with it
            self._base = tomllib.loads(config_file.read_text(encoding="utf-8"))
        self._console, self._clock = console, clock

    def directory(self, name: str) -> Path:
        """A data directory with the prepared weights in it."""
        found = self._scratch / name
        if not found.exists():
            found.mkdir(mode=0o700)
            self._models.mkdir(mode=0o700, parents=True, exist_ok=True)
            (found / "models").symlink_to(self._models.resolve())
        return found

    def config(self, variant: Variant, data_dir: Path | None = None) -> Config:
        """What such a server is configured as, over its own directory or another one. Raises ConfigError."""
        directory = data_dir or self.directory(variant)
        return load(str(self._file(variant)), {"data_dir": str(directory), "dev": True})

    @contextmanager
    def running(self, variant: Variant, key: str) -> Iterator[Running]:
        """Such a server over its own data directory, ready, for as long as the context lasts. Raises BenchError."""
        begin = self._clock.monotonic()
        with running_server(self.directory(variant), self._file(variant), self._console, self._clock) as server:
            start_ms = (self._clock.monotonic() - begin) * 1000
            yield Running(server, Service(server.port, key, self._clock), start_ms)

    def _file(self, variant: Variant) -> Path:
        path = self._scratch / f"{variant}.toml"
        path.write_text(toml(varied(self._base, CACHE[variant])), encoding="utf-8")
        return path


def varied(base: Mapping[str, Any], cache: Mapping[str, int]) -> dict[str, Any]:
    """The configuration with these members of `cache` on top, and without prompts to compute at start."""
    kept = {name: value for name, value in base.items() if name not in ("warm", "data_dir")}
    return {**kept, "cache": {**base.get("cache", {}), **cache}}


def toml(values: Mapping[str, object]) -> str:
    """The values as a TOML document, each on one line. Raises BenchError for dates, of which the configuration has none."""
    return "".join(f"{_quoted(name)} = {_inline(value)}\n" for name, value in values.items())


def _inline(value: object) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case int() | float():
            return repr(value)
        case str():
            return _quoted(value)
        case list():
            return f"[{', '.join(_inline(one) for one in value)}]"
        case dict():
            return f"{{{', '.join(f'{_quoted(name)} = {_inline(one)}' for name, one in value.items())}}}"
        case _:
            raise BenchError(f"the configuration has {value!r}, which no setting takes")


def _quoted(text: str) -> str:
    """A JSON string is a basic string of TOML."""
    return msgspec.json.encode(text).decode()
