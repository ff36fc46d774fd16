"""Whether blocks would be worth storing smaller than they are computed: `measure_block_sizes.py [--text FILE]`.

Real 64-token blocks of f16 KV state of the packaged model, cut as the store cuts them, go through zstd raw, with high
and low bytes apart (shuffle), and as differences of neighbouring tokens' bit patterns before that (delta). For K and V
apart: ratio, and speed both ways on one thread, in seconds of processor time, which other load disturbs least. Then what
decides: reading the same blocks from cold files, raw and compressed, by one and two threads, in bytes of KV state per
second of wall time. All reads and decompression go into memory touched before, as the server's do.

Every round trip is compared bit by bit. The tables are Markdown, as docs/decisions/0014 shows them. Needs `pip install
zstandard`; with `--drop-caches` (root) files are read cold, otherwise the kernel is only asked to forget them.
"""

import argparse
import importlib
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from keepwarm.config import ModelConfig
from keepwarm.core.prompt import Tokens
from keepwarm.engine.layout import BLOCK_TOKENS, block_views, cut, parse
from keepwarm.engine.llama import LlamaModel, init_backend, quantize
from keepwarm.engine.memory import touched
from keepwarm.engine.prepare import source_path
from keepwarm.engine.selftest import fill

ROOT = Path(__file__).parent.parent
ROUNDS = 3
GB = 1e9
READ_BYTES = 4 << 20  # of one read of the sequential file
SEQUENTIAL_BYTES = 1 << 30
LEVELS = (-3, -1, 1, 3)  # zstd's negative levels are its fast ones
WEIGHTS = "Q4_0"  # what the packaged model is prepared to on most processors

Halves = NDArray[np.uint16]  # f16 bit patterns, shape (n_layer, v_rows or 1, n_tokens, values)


def as_stored(halves: Halves) -> bytes:
    return halves.tobytes()


def from_stored(raw: NDArray[np.uint8], shape: tuple[int, ...]) -> Halves:
    return raw.view(np.uint16).reshape(shape)


def shuffled(halves: Halves) -> bytes:
    """All low bytes, then all high bytes (sign, exponent, two bits of the fraction)."""
    pairs = halves.reshape(-1).view(np.uint8).reshape(-1, 2)
    return pairs.T.tobytes()


def unshuffled(raw: NDArray[np.uint8], shape: tuple[int, ...]) -> Halves:
    planes = raw.reshape(2, -1)
    pairs = np.empty((planes.shape[1], 2), np.uint8)
    pairs[:, 0], pairs[:, 1] = planes
    return pairs.view(np.uint16).reshape(shape)


def delta_shuffled(halves: Halves) -> bytes:
    """Differences along the tokens of the bit patterns as integers modulo 2**16, then shuffled: exact."""
    delta = halves.copy()
    delta[:, :, 1:] -= halves[:, :, :-1]
    return shuffled(delta)


def undelta_unshuffled(raw: NDArray[np.uint8], shape: tuple[int, ...]) -> Halves:
    return np.cumsum(unshuffled(raw, shape), axis=2, dtype=np.uint16)


Forward: TypeAlias = Callable[[Halves], bytes]
Back: TypeAlias = Callable[[NDArray[np.uint8], tuple[int, ...]], Halves]
TRANSFORMS: dict[str, tuple[Forward, Back]] = {
    "raw": (as_stored, from_stored),
    "shuffle": (shuffled, unshuffled),
    "delta + shuffle": (delta_shuffled, undelta_unshuffled),
}


class Reader(Protocol):
    """Decompresses one frame as it is read."""

    def readinto(self, into: memoryview) -> int: ...


class Compressor(Protocol):
    """Makes frames."""

    def compress(self, raw: bytes) -> bytes: ...


class Decompressor(Protocol):
    """Opens frames; for one thread at a time."""

    def stream_reader(self, small: memoryview) -> Reader: ...


class Zstd(Protocol):
    """What is used of the package `zstandard`."""

    def ZstdCompressor(self, level: int) -> Compressor: ...  # noqa: N802 - its own name

    def ZstdDecompressor(self) -> Decompressor: ...  # noqa: N802 - its own name


def inflate(small: memoryview, into: NDArray[np.uint8], decompressor: Decompressor) -> None:
    """Fill `into` from one frame."""
    reader, at, view = decompressor.stream_reader(small), 0, memoryview(into.data)
    while at < len(into) and (n := reader.readinto(view[at:])):
        at += n
    assert at == len(into)


class Sizes:
    """One part (K or V) of all blocks through one transform and one level of zstd."""

    def __init__(self, parts: Sequence[Halves], zstd: Zstd, transform: str, level: int) -> None:
        self._forward, self._back = TRANSFORMS[transform]
        self._compressor, self._decompressor = zstd.ZstdCompressor(level), zstd.ZstdDecompressor()
        self._shape, self._buffer = parts[0].shape, touched(parts[0].nbytes)[: parts[0].nbytes]
        self.n_bytes = sum(part.nbytes for part in parts)
        packed = [self._pack(part) for part in parts]
        for part, small in zip(parts, packed, strict=True):
            assert np.array_equal(self._unpack(small), part), "a round trip changed bits"
        self.ratio = self.n_bytes / sum(map(len, packed))
        self.pack_s = best_s(lambda: [self._pack(part) for part in parts])
        self.inflate_s = best_s(lambda: self._inflate_all(packed))
        self.unpack_s = best_s(lambda: [self._unpack(small) for small in packed])

    def _pack(self, part: Halves) -> bytes:
        return self._compressor.compress(self._forward(part))

    def _inflate(self, small: bytes) -> None:
        inflate(memoryview(small), self._buffer, self._decompressor)

    def _inflate_all(self, packed: Sequence[bytes]) -> None:
        for small in packed:
            self._inflate(small)

    def _unpack(self, small: bytes) -> Halves:
        self._inflate(small)
        return self._back(self._buffer, self._shape)


class Files:
    """Files written once, fsynced, and read cold."""

    def __init__(self, directory: Path, *, drop_caches: bool) -> None:
        self.directory, self._drop = directory, drop_caches

    def write(self, name: str, raw: bytes) -> Path:
        path = self.directory / name
        with path.open("wb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        return path

    def cool(self, paths: Sequence[Path]) -> None:
        """Make the kernel forget the files' pages."""
        if self._drop:
            Path("/proc/sys/vm/drop_caches").write_text("3\n", encoding="ascii")
            return
        for path in paths:
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def cold_s(self, paths: Sequence[Path], work: Callable[[Sequence[Path]], object], n_threads: int) -> float:
        """Median seconds of `ROUNDS` rounds of `work` over all files, cold, dealt out to `n_threads` threads."""
        seconds = []
        with ThreadPoolExecutor(n_threads) as pool:
            for _ in range(ROUNDS):
                self.cool(paths)
                begin = time.perf_counter()
                list(pool.map(work, [paths[i::n_threads] for i in range(n_threads)]))
                seconds.append(time.perf_counter() - begin)
        return statistics.median(seconds)


def read_into(path: Path, into: NDArray[np.uint8]) -> int:
    """Fill the beginning of `into` with the whole file; its size."""
    with path.open("rb", buffering=0) as file:
        return file.readinto(memoryview(into.data)) or 0


def best_s(work: Callable[[], object]) -> float:
    """Least processor seconds of `work` in this thread."""
    seconds = []
    for _ in range(ROUNDS):
        begin = time.thread_time()
        work()
        seconds.append(time.thread_time() - begin)
    return min(seconds)


def default_text() -> str:
    """The project's own documents: prose, tables and code."""
    paths = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
    return "\n\n".join(path.read_text(encoding="utf-8") for path in paths)


def computed(
    text: str, n_tokens: int, directory: Path, weights: str, *, flash: bool
) -> tuple[list[tuple[Halves, Halves]], float, str]:
    """(K, V) of every whole block of the text's first `n_tokens` tokens, prefill tokens/s, and what computed them."""
    init_backend()
    path, n_threads = directory / "model.gguf", os.cpu_count() or 1
    quantize(source_path(ModelConfig()), path, weights, n_threads)
    model = LlamaModel(path, n_ctx=n_tokens + BLOCK_TOKENS, n_streams=1, n_ubatch=512, n_threads=n_threads, flash=flash)
    tokens: Tokens = model.vocab.encode(text, parse_special=False)[:n_tokens]
    if len(tokens) < n_tokens:
        sys.exit(f"the text has {len(tokens):,} tokens, {n_tokens:,} are wanted; give a longer one or --tokens")
    begin = time.perf_counter()
    fill(model, 0, tokens, g=BLOCK_TOKENS)
    prefill_s = time.perf_counter() - begin
    cells = parse(model.save(0))
    layout, blocks = cells.layout, []
    for start in range(0, n_tokens - BLOCK_TOKENS + 1, BLOCK_TOKENS):
        block = np.empty(BLOCK_TOKENS * layout.cell_bytes, np.uint8)
        cut(cells, start, BLOCK_TOKENS, block)
        k, v = block_views(layout, block, BLOCK_TOKENS)
        blocks.append((k.view(np.uint16)[:, None], v.view(np.uint16)))
    what = f"{model.weights}, {'flash' if flash else 'plain'} attention, {layout.cell_bytes:,} bytes of KV a token"
    return blocks, n_tokens / prefill_s, what


def entropy_ratio(parts: Sequence[Halves]) -> tuple[float, float]:
    """16 bits over the entropy of high and low byte taken apart, and the low byte's own: what order-0 coding can reach."""
    pairs = np.concatenate([part.reshape(-1) for part in parts]).view(np.uint8).reshape(-1, 2)
    bits = []
    for plane in (0, 1):
        share = np.bincount(pairs[:, plane], minlength=256) / len(pairs)
        share = share[share > 0]
        bits.append(float(-(share * np.log2(share)).sum()))
    return 16 / sum(bits), bits[0]


def show_sizes(blocks: Sequence[tuple[Halves, Halves]], zstd: Zstd) -> None:
    print("\n| part | transform | zstd | ratio | compress GB/s | zstd alone back GB/s | all of the way back GB/s |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for at, name in enumerate("KV"):
        parts = [block[at] for block in blocks]
        for transform in TRANSFORMS:
            for level in LEVELS:
                found = Sizes(parts, zstd, transform, level)
                speeds = " | ".join(
                    f"{found.n_bytes / s / GB:.2f}" for s in (found.pack_s, found.inflate_s, found.unpack_s)
                )
                print(f"| {name} | {transform} | {level} | {found.ratio:.2f} | {speeds} |", flush=True)
        ratio, low_bits = entropy_ratio(parts)
        print(
            f"| {name} | order-0 entropy of the two bytes | | {ratio:.2f} (low byte: {low_bits:.2f} of 8 bits) | | | |"
        )


def show_sequential(files: Files) -> None:
    """Bytes/s of one large file, as dd reads it."""
    path = files.write("sequential", np.random.default_rng(1).bytes(SEQUENTIAL_BYTES))
    buffer = touched(READ_BYTES)

    def read(paths: Sequence[Path]) -> None:
        for path in paths:
            with path.open("rb", buffering=0) as file:
                while file.readinto(memoryview(buffer.data)):
                    pass

    speed = SEQUENTIAL_BYTES / files.cold_s([path], read, 1) / GB
    path.unlink()
    print(f"\nsequential, 1 GiB in reads of 4 MiB: {speed:.2f} GB/s")


def show_reading(blocks: Sequence[tuple[Halves, Halves]], files: Files, zstd: Zstd) -> None:
    """GB of KV state per second out of cold block files, decompressed; the byte order is not undone (numpy is no judge)."""
    n_block_bytes = sum(part.nbytes for part in blocks[0])

    def raw(paths: Sequence[Path]) -> None:
        into = touched(n_block_bytes)
        for path in paths:
            read_into(path, into)

    def compressed(paths: Sequence[Path]) -> None:
        small, into = touched(2 * n_block_bytes), touched(n_block_bytes)[:n_block_bytes]
        decompressor = zstd.ZstdDecompressor()
        for path in paths:
            n = read_into(path, small)
            inflate(memoryview(small.data)[:n], into, decompressor)

    def row(name: str, paths: Sequence[Path], work: Callable[[Sequence[Path]], object]) -> None:
        speeds = [len(blocks) * n_block_bytes / files.cold_s(paths, work, n) / GB for n in (1, 2)]
        stored_mb = sum(path.stat().st_size for path in paths) / 1e6
        print(f"| {name} | {stored_mb:.1f} | {speeds[0]:.2f} | {speeds[1]:.2f} |", flush=True)

    print("\n| files | stored MB | GB/s of KV state, 1 thread | 2 threads |\n| --- | --- | --- | --- |")
    row("as computed", [files.write(f"{i}.raw", k.tobytes() + v.tobytes()) for i, (k, v) in enumerate(blocks)], raw)
    for transform, level in (("raw", 1), ("shuffle", 1), ("shuffle", 3), ("delta + shuffle", 1)):
        forward, compressor = TRANSFORMS[transform][0], zstd.ZstdCompressor(level)
        paths = [
            files.write(f"{i}.small", compressor.compress(forward(k) + forward(v))) for i, (k, v) in enumerate(blocks)
        ]
        row(f"{transform}, zstd {level}", paths, compressed)
    row("as computed, again", sorted(files.directory.glob("*.raw")), raw)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure whether KV blocks are worth compressing on disk.")
    parser.add_argument(
        "--text", type=Path, help="UTF-8 text to compute KV state of (default: the project's documents)"
    )
    parser.add_argument("--tokens", type=int, default=4000)
    parser.add_argument("--weights", default=WEIGHTS, help="the type to prepare the packaged model to")
    parser.add_argument(
        "--dir", type=Path, help="where to write test files (default: the system's temporary directory)"
    )
    parser.add_argument("--flash", action="store_true", help="flash attention, which stores V by token, not by row")
    parser.add_argument("--drop-caches", action="store_true", help="empty the page cache before each round; needs root")
    args = parser.parse_args()
    try:
        zstd = cast("Zstd", importlib.import_module("zstandard"))  # for this experiment only, so not a dependency
    except ImportError:
        sys.exit("this measurement needs zstd: pip install zstandard")
    text = args.text.read_text(encoding="utf-8") if args.text else default_text()
    with tempfile.TemporaryDirectory(dir=args.dir) as name:
        directory = Path(name)
        blocks, tokens_per_s, what = computed(text, args.tokens, directory, args.weights, flash=args.flash)
        print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.2f}; {what}")
        n_bytes = sum(k.nbytes + v.nbytes for k, v in blocks)
        print(
            f"{len(blocks)} blocks of {BLOCK_TOKENS} tokens, {n_bytes / 1e6:.1f} MB; prefill {tokens_per_s:.0f} tokens/s"
        )
        show_sizes(blocks, zstd)
        files = Files(directory, drop_caches=args.drop_caches)
        show_sequential(files)
        show_reading(blocks, files, zstd)


if __name__ == "__main__":
    main()
