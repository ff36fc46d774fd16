"""Restoring from a cold disk, in a process of its own: `python -m keepwarm.bench.store_restore`, question on stdin.

The model is the server's. One prefix is computed, leased and written by the store's own code; then, round after round and
each time over a cold page cache, it is read as a plain file, block by block into host slots, and restored whole into a
stream. A restored state must give the bits of the computed one, else the process ends with an error. Every measurement
is a line on stdout.
"""

import importlib
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path

import msgspec
from msgspec import Struct

from keepwarm.bench import BenchError
from keepwarm.bench.store_disk import drop_page_cache, read_sequentially, write_joined
from keepwarm.bench.store_report import WAYS, RestoreSample, Way
from keepwarm.config import Config
from keepwarm.core.clock import Clock, SystemClock
from keepwarm.core.prompt import Prompt
from keepwarm.engine.disk import DirectoryLocked, DiskTier
from keepwarm.engine.files import Files
from keepwarm.engine.layout import BLOCK_TOKENS
from keepwarm.engine.leasefile import LeaseFiles
from keepwarm.engine.model import LoadFault, ModelFault, Prepared
from keepwarm.engine.prefix import root_key
from keepwarm.engine.reading import THREADS
from keepwarm.engine.selftest import fill, layout_of, same, sample_tokens
from keepwarm.engine.store import BYTES_AHEAD, PrefixStore, slot_bytes
from keepwarm.engine.tiers import HostTier, TierFault, TierFull
from keepwarm.engine.worker import prepare_scripted

PIN = "bench"
IDENTITY = ("bench",)
QUESTION_TOKENS = 8
SPARE = 2  # budgets, in sizes of the prefix: nothing is ever evicted


class Question(Struct, frozen=True):
    """What to measure. The prefix has `n_tokens` or less: whole blocks. `whole`: drop the whole page cache if permitted."""

    config: Config
    n_tokens: int
    n_rounds: int
    whole: bool


def measure(question: Question) -> Iterator[RestoreSample]:
    """Every measurement of the process, as it comes. Raises BenchError."""
    process = subprocess.Popen(
        [sys.executable, "-m", "keepwarm.bench.store_restore"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=question.config.engine_environment(),
        start_new_session=True,  # as the server is
    )
    assert process.stdin and process.stdout
    try:
        process.stdin.write(msgspec.json.encode(question) + b"\n")
        process.stdin.close()
        for line in process.stdout:
            yield msgspec.json.decode(line, type=RestoreSample)
        if process.wait():
            raise BenchError("the process that restores ended; what it said is above")
    except BrokenPipeError as exc:
        raise BenchError("the process that restores did not start; what it said is above") from exc
    finally:
        process.kill()  # one that has ended is left alone
        process.wait()
        process.stdout.close()


class Restores:
    """One prefix on disk and the ways to read it."""

    def __init__(self, question: Question, prepared: Prepared, clock: Clock) -> None:
        if prepared.granularity is None:
            raise BenchError(f"caching is off: {prepared.detail}")
        self._question, self._clock = question, clock
        self._model, self._granularity = prepared.model, prepared.granularity
        self._layout = layout_of(prepared.model)
        self._root = Path(question.config.data_dir)
        n_most = prepared.model.n_ctx - QUESTION_TOKENS
        self._n_tokens = min(question.n_tokens, n_most) // BLOCK_TOKENS * BLOCK_TOKENS
        tokens = sample_tokens(prepared.model.n_vocab, self._n_tokens + QUESTION_TOKENS)
        self._stored, self._asked = Prompt(PIN, tokens[: self._n_tokens]), Prompt(PIN, tokens)
        self._slot_bytes = slot_bytes(self._layout)
        self._budget = SPARE * self._slot_bytes * max(1, self._n_tokens // BLOCK_TOKENS)

    def run(self) -> Iterator[RestoreSample]:
        """Store the prefix, then measure every way in every round, beginning with another one each time."""
        self._logits = fill(self._model, 0, self._asked.tokens, g=self._granularity)
        self._write()
        n_file = write_joined(sorted(self._root.glob("store/blocks/*")), self._sequential)
        assert n_file > self._n_tokens * self._layout.cell_bytes
        for number in range(self._question.n_rounds):
            turn = number % len(WAYS)
            for way in WAYS[turn:] + WAYS[:turn]:
                measured = self._measure(way)
                if measured is not None:
                    yield RestoreSample(way, measured[0], round(measured[1], 3))

    @property
    def _sequential(self) -> Path:
        return self._root / "sequential"

    def _host(self) -> HostTier:
        return HostTier(self._budget, self._slot_bytes)

    def _disk(self) -> DiskTier:
        return DiskTier(self._root / "store", SPARE * self._budget, root_key(*IDENTITY))

    @contextmanager
    def _opened(self) -> Iterator[PrefixStore]:
        """A store over the prefix's files, its index read, its host tier new."""
        with closing(self._disk()) as disk:
            store = PrefixStore(
                self._layout,
                self._host(),
                identity=IDENTITY,
                granularity=self._granularity,
                n_ctx=self._model.n_ctx,
                disk=(disk, LeaseFiles(Files(), self._root / "store")),
                policy_name=self._question.config.cache.policy,
                clock=self._clock,
            )
            with closing(store):
                yield store

    def _write(self) -> None:
        faults: list[TierFull | TierFault | None] = []
        is_done = threading.Event()

        def done(fault: TierFull | TierFault | None) -> None:
            faults.append(fault)
            is_done.set()

        with self._opened() as store:
            store.save(self._stored, self._n_tokens, self._model, 0, spend=True, pin=PIN)
            store.make_durable(PIN, done)
            is_done.wait()
        if faults[0] is not None:
            raise BenchError(f"the prefix could not be written: {faults[0]}")

    def _measure(self, way: Way) -> tuple[int, float] | None:
        """Bytes and milliseconds over a cold page cache; None when this system has no such way."""
        match way:
            case "sequential" | "sequential_direct":
                self._drop()
                return read_sequentially(self._sequential, self._clock, direct=way == "sequential_direct")
            case "read":
                host = self._host()
                host.populate(BYTES_AHEAD)
                return self._read(host)
            case "read_untouched":
                return self._read(self._host())
            case "restore":
                return self._restore()

    def _drop(self) -> None:
        drop_page_cache(self._root, whole=self._question.whole)

    def _read(self, host: HostTier) -> tuple[int, float]:
        """The blocks' bodies into slots, by as many threads as the store reads with."""
        with closing(self._disk()) as disk, ThreadPoolExecutor(THREADS) as threads:
            heads = sorted(disk.heads(), key=lambda head: head.start)
            slots = [slot for _ in heads if (slot := host.take()) is not None]
            assert len(slots) == len(heads) == self._n_tokens // BLOCK_TOKENS
            self._drop()
            begin = self._clock.monotonic()
            into = (host.bytes_of(slot)[: head.n_bytes] for slot, head in zip(slots, heads, strict=True))
            list(threads.map(disk.read, (head.key for head in heads), into))
            ms = (self._clock.monotonic() - begin) * 1000
            for slot in slots:
                host.free(slot)
        return sum(head.n_bytes for head in heads), ms

    def _restore(self) -> tuple[int, float]:
        """From the look-up to the loaded stream, as a turn does it."""
        model = self._model
        model.forget(0, 0, -1)
        with self._opened() as store:
            store.prepare_host()
            self._drop()  # reading the index has brought the files' heads into the cache
            begin = self._clock.monotonic()
            held = store.hold(self._asked, want_logits=True)
            n = store.restore(held, model, 0)
            ms = (self._clock.monotonic() - begin) * 1000
            store.release(held)
        if n != self._n_tokens:
            raise BenchError(f"{n:,} tokens were restored from the disk instead of {self._n_tokens:,}")
        if not same(fill(model, 0, self._asked.tokens, g=self._granularity, start=n), self._logits):
            raise BenchError("the restored state does not give the bits of the computed one")
        return n * self._layout.cell_bytes, ms


def main() -> None:
    """Answer the one question."""
    question = msgspec.json.decode(sys.stdin.buffer.readline(), type=Question)
    clock = SystemClock()
    try:
        for sample in Restores(question, _prepared(question.config, clock), clock).run():
            sys.stdout.buffer.write(msgspec.json.encode(sample) + b"\n")
            sys.stdout.buffer.flush()
    except (BenchError, DirectoryLocked, LoadFault, ModelFault, TierFault) as error:
        sys.exit(str(error))


def _prepared(config: Config, clock: Clock) -> Prepared:
    if config.model.engine == "scripted":
        return prepare_scripted(config)
    module = importlib.import_module("keepwarm.engine.prepare")  # not at the top: it loads llama.cpp
    prepared: Prepared = module.prepare(config, clock, lambda _line: None)
    return prepared


if __name__ == "__main__":
    main()
