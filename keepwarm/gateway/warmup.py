"""Warm-up prompts: prefixes from the configuration, computed before anyone asks and again in every new engine process.

A prompt is evaluated without output at idle priority, one after another, so it never delays a turn; a turn that comes
makes the engine give it up, what it has computed by then stays stored, and it is asked for again until it is whole. In
a process that still has the prefix on disk all of this is one look-up. With `lease` it is pinned like a cache object's,
under an id made of its contents, so a changed prompt leaves a lease behind that nobody claims and that is dropped.
Nothing depends on any of it: a prompt that cannot be computed is one line in the log.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path

import msgspec
from msgspec import Struct

from keepwarm.cache.render import Built
from keepwarm.config import ConfigError, WarmPrompt
from keepwarm.core.errors import ApiError
from keepwarm.core.event import Failed, Finished, Started
from keepwarm.core.prompt import OutputRules, Plan, Priority
from keepwarm.core.request import Message, TextPart, Tool
from keepwarm.engine import Engine
from keepwarm.gateway.rendering import Rendering
from keepwarm.gateway.runtime import Runtime
from keepwarm.gateway.stream import closing
from keepwarm.telemetry import where

PIN_DIGEST_BYTES = 12


class WarmText(Struct, frozen=True):
    """A warm-up prompt with its files read. `pin_id` None: best effort."""

    name: str
    tenant: str
    text: str
    tools: tuple[Tool, ...]
    pin_id: str | None


def read_prompts(
    prompts: Sequence[WarmPrompt], tenants: Mapping[str, str], tools_of: Callable[[bytes], tuple[Tool, ...]]
) -> tuple[WarmText, ...]:
    """Read the prompts' files. Blocking.

    `tenants` has the real name of a configured tenant where that differs; `tools_of` reads the JSON of a request's
    `tools` member, and raises ApiError(INVALID_REQUEST).

    Raises ConfigError for a file that cannot be read or understood.
    """
    read = []
    for number, prompt in enumerate(prompts):
        name = prompt.name or str(number)
        texts = [_text(name, prompt.system_file) if prompt.system_file is not None else prompt.system]
        texts += [_text(name, path) for path in prompt.files]
        tools: tuple[Tool, ...] = ()
        if prompt.tools_file is not None:
            try:
                tools = tools_of(_bytes(name, prompt.tools_file))
            except ApiError as exc:
                raise ConfigError(f"warm-up prompt {name!r}: {prompt.tools_file}: {exc.message}") from exc
        tenant, text = tenants.get(prompt.tenant, prompt.tenant), "".join(texts)
        read.append(WarmText(name, tenant, text, tools, _pin_id(tenant, text, tools) if prompt.lease else None))
    return tuple(read)


class WarmUp:
    """The background side of warm-up prompts."""

    def __init__(self, prompts: Sequence[WarmText], rendering: Rendering, engine: Engine, runtime: Runtime) -> None:
        self._prompts = prompts
        self._rendering = rendering
        self._engine = engine
        self._ids = runtime.ids
        self._log = runtime.log
        self._wanted: OrderedDict[WarmText, None] = OrderedDict()  # at most all prompts; the next one first
        self._wake = asyncio.Event()
        self.pin_ids = frozenset(prompt.pin_id for prompt in prompts if prompt.pin_id is not None)

    def want_all(self) -> None:
        """Compute all prompts: a new engine process is ready."""
        self._wanted.update(dict.fromkeys(self._prompts))
        self._wake.set()

    def want(self, pin_id: str) -> None:
        """Compute the prompt with this lease again: a block of it was damaged."""
        self._wanted.update((prompt, None) for prompt in self._prompts if prompt.pin_id == pin_id)
        self._wake.set()

    async def work(self) -> None:
        """Compute wanted prompts one after another, forever."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._wanted:
                prompt, _ = self._wanted.popitem(last=False)
                try:
                    failure = await self.warm(prompt)
                except ApiError as error:
                    failure = Failed(error.kind, error.message)
                except Exception as exc:  # noqa: BLE001 - a turn boundary: nothing depends on warming up, so it ends nothing
                    self._log.error("warming up failed", prompt=prompt.name, error=type(exc).__name__, where=where(exc))
                    continue
                if failure is not None:  # with a lost engine the next one wants all again
                    self._log.warning("prompt not warmed up", prompt=prompt.name, reason=failure.message)

    async def warm(self, prompt: WarmText) -> Failed | None:
        """Compute one prompt and say so; returns why it could not be. Raises ApiError."""
        message = Message("system", (TextPart(prompt.text),))
        built = await self._rendering.object_prefix(prompt.tenant, (message,), prompt.tools)
        self._log.info("warming up a prompt", prompt=prompt.name, tenant=prompt.tenant, n_tokens=built.prompt.n_tokens)
        began: Started | None = None
        terminal: Finished | Failed | None = None
        while terminal is None or (isinstance(terminal, Finished) and terminal.usage.prompt < built.prompt.n_tokens):
            started, terminal = await self._run(prompt, built)
            began = began or started  # when a turn made the engine give it up, the rest goes on from what is stored
        if isinstance(terminal, Failed):
            return terminal
        n_read, tier = (began.cache_read, began.tier) if began is not None else (0, None)
        self._log.info(
            "prompt warmed up",
            prompt=prompt.name,
            tenant=prompt.tenant,
            n_tokens=built.prompt.n_tokens,
            n_tokens_computed=built.prompt.n_tokens - n_read,
            source=tier or "computed",
        )
        return None

    async def _run(self, prompt: WarmText, built: Built) -> tuple[Started | None, Finished | Failed]:
        plan = Plan(
            self._ids.new("warm-"),
            built.prompt,
            OutputRules(max_tokens=0),
            pin_id=prompt.pin_id,
            priority=Priority.IDLE,
        )
        started: Started | None = None
        async with closing(self._engine.run(plan)) as events:
            async for event in events:
                if isinstance(event, Started):
                    started = event
                if isinstance(event, Finished | Failed):
                    return started, event
        raise AssertionError("the engine ended a run without a terminal event")


def _text(name: str, path: str) -> str:
    try:
        return _bytes(name, path).decode("utf-8")
    except UnicodeDecodeError as exc:
        raise ConfigError(f"warm-up prompt {name!r}: {path} is not UTF-8 text") from exc


def _bytes(name: str, path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as exc:
        raise ConfigError(f"warm-up prompt {name!r}: cannot read {path}: {exc.strerror}") from exc


def _pin_id(tenant: str, text: str, tools: tuple[Tool, ...]) -> str:
    """The same for the same prompt in every process."""
    contents = msgspec.msgpack.encode((tenant, text, tools))
    return "prompt-" + blake2b(contents, digest_size=PIN_DIGEST_BYTES).hexdigest()
