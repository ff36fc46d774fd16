"""What a start costs where many blocks lie on disk: a store of small ones is written, forgotten by the page cache, opened.

A head is read and checked for each; bodies are not, so theirs may be small. No model.
"""

from contextlib import closing
from pathlib import Path

import numpy as np

from keepwarm.bench.store_disk import drop_page_cache
from keepwarm.bench.store_report import ScanSample
from keepwarm.core.clock import Clock
from keepwarm.engine.disk import DiskTier
from keepwarm.engine.layout import BLOCK_TOKENS
from keepwarm.engine.prefix import block_key, root_key
from keepwarm.engine.tiers import BlockHead

BODY_BYTES = 16 << 10
BATCH_BLOCKS = 100
BUDGET_BYTES = 1 << 40
FINGERPRINT = root_key("bench")
SEED = 11


def measure_scan(directory: Path, n_blocks: int, n_scans: int, clock: Clock, *, whole: bool) -> list[ScanSample]:
    """Write `n_blocks` below `directory` and open them `n_scans` times. `whole`: drop the whole page cache if permitted."""
    root = directory / "scan"
    _write(root, n_blocks)
    samples = []
    for _ in range(n_scans):
        drop_page_cache(root, whole=whole)
        begin = clock.monotonic()
        with closing(DiskTier(root, BUDGET_BYTES, FINGERPRINT)) as disk:
            n_found = sum(1 for _ in disk.heads())
        samples.append(ScanSample(n_blocks, round((clock.monotonic() - begin) * 1000, 3)))
        assert n_found == n_blocks, n_found
    return samples


def _write(root: Path, n_blocks: int) -> None:
    random = np.random.default_rng(SEED)
    body = random.integers(0, 256, BODY_BYTES).astype(np.uint8)
    with closing(DiskTier(root, BUDGET_BYTES, FINGERPRINT)) as disk:
        list(disk.heads())
        for first in range(0, n_blocks, BATCH_BLOCKS):
            batch = []
            for _ in range(min(BATCH_BLOCKS, n_blocks - first)):
                tokens = random.integers(0, 1 << 15, BLOCK_TOKENS).astype(np.int32)
                key = block_key(FINGERPRINT, tokens, closed=False)
                batch.append((BlockHead(key, FINGERPRINT, 0, tokens, False, BODY_BYTES), body))
            disk.write(batch)
