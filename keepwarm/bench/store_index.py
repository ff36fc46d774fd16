"""What the prefix index costs: bytes a block, and the time to find a long prompt. No model, no tiers.

Memory is what the allocator was asked for between an empty index and a full one whose blocks all lie in both tiers, so
both policies know each of them: tree, keys, token ids and the policies' own books.
"""

import gc
import tracemalloc

import numpy as np

from keepwarm.bench.store_report import IndexSample
from keepwarm.core.clock import Clock
from keepwarm.core.prompt import Tokens
from keepwarm.engine.chunks import pieces
from keepwarm.engine.eviction import policy
from keepwarm.engine.layout import BLOCK_TOKENS
from keepwarm.engine.nodes import Node
from keepwarm.engine.prefix import PrefixIndex, extents, root_key

CHAIN_BLOCKS = 80  # 5,120 tokens
N_VOCAB = 49_152
SLOT_BYTES = 1 << 20
ROOT = root_key("bench")
SEED = 7


def measure_index(n_blocks: int, n_tokens: int, n_look_ups: int, policy_name: str, clock: Clock) -> IndexSample:
    """Fill an index with `n_blocks` in chains, then find a stored prompt of `n_tokens` beside them again and again."""
    random = np.random.default_rng(SEED)
    n_long = -(-n_tokens // BLOCK_TOKENS)
    index, bytes_per_block = _filled(n_blocks, n_blocks + n_long, policy_name, random)
    prompt = _draw(random, n_tokens)
    _add_chain(index, prompt, n_blocks)
    parts = pieces(n_tokens, (), 1)
    sample = IndexSample(n_blocks, round(bytes_per_block, 1), n_tokens, [], [])
    for _ in range(n_look_ups):
        begin = clock.monotonic()
        found = index.match(ROOT, prompt, parts)
        matched = clock.monotonic()
        index.lock(found.nodes)
        index.touch(found.nodes, matched)
        index.unlock(found.nodes)
        used = clock.monotonic()
        assert found.n_tokens == n_tokens, found.n_tokens
        sample.match_ms.append(round((matched - begin) * 1000, 3))
        sample.use_ms.append(round((used - matched) * 1000, 3))
    return sample


def _filled(
    n_blocks: int, n_blocks_max: int, policy_name: str, random: np.random.Generator
) -> tuple[PrefixIndex, float]:
    """An index with as many blocks, and what each of them took."""
    gc.collect()
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        index = PrefixIndex(policy(policy_name, n_blocks_max), policy(policy_name, n_blocks_max))
        for first in range(0, n_blocks, CHAIN_BLOCKS):
            _add_chain(index, _draw(random, min(CHAIN_BLOCKS, n_blocks - first) * BLOCK_TOKENS), first)
        gc.collect()
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(index) == n_blocks, len(index)
    return index, (after - before) / n_blocks


def _draw(random: np.random.Generator, n_tokens: int) -> Tokens:
    return random.integers(0, N_VOCAB, n_tokens).astype(np.int32)


def _add_chain(index: PrefixIndex, tokens: Tokens, first_slot: int) -> None:
    """All blocks of a prompt, in both tiers."""
    above: Node | None = None
    for i, extent in enumerate(extents(pieces(len(tokens), (), 1), len(tokens))):
        above, _ = index.add(ROOT, above, tokens, extent, first_slot + i)
        index.stored(above, SLOT_BYTES)
