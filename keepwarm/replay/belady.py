"""The most that any policy could have read (Belady 1966), knowing the future.

The block whose next use is farthest goes first, and one that is never used again is not stored at all. A block's next use
is never after that of the blocks behind it, so the farthest is a leaf when ties go to the deeper one: the optimum per block
is the optimum for prefixes too. Exact for blocks of one size; a short last block counts as a whole one.
"""

import heapq
from collections.abc import Callable

from keepwarm.replay.simulate import REPORT_EVERY, Outcome
from keepwarm.replay.trace import Trace


def belady(trace: Trace, n_blocks_max: int, progress: Callable[[int], None] = lambda _: None) -> Outcome:
    """What the optimum reads of `trace`; `progress` as in `simulate`."""
    next_uses = _next_uses(trace)
    stored: dict[int, int] = {}  # next use by block number
    order: list[tuple[int, int, int]] = []  # (-next use, -depth, block); stale when `stored` says otherwise
    n_read = n_evicted = 0
    never = len(trace.requests)
    for now, request in enumerate(trace.requests):
        n_hit, whole = 0, True
        for depth, (block, next_use) in enumerate(zip(request.blocks, next_uses[now], strict=True)):
            whole = whole and block in stored
            n_hit += whole
            if next_use == never:
                stored.pop(block, None)
                continue
            stored[block] = next_use
            heapq.heappush(order, (-next_use, -depth, block))
        n_read += min(n_hit * trace.block_tokens, request.n_tokens)
        while len(stored) > n_blocks_max:
            use, _, block = heapq.heappop(order)
            if stored.get(block) == -use:
                del stored[block]
                n_evicted += 1
        if (now + 1) % REPORT_EVERY == 0:
            progress(REPORT_EVERY)
    progress(len(trace.requests) % REPORT_EVERY)
    return Outcome(n_tokens=trace.n_tokens, n_tokens_read=n_read, n_evicted=n_evicted)


def _next_uses(trace: Trace) -> list[list[int]]:
    """For every block of every request, the number of the next request with it, or the number of requests."""
    coming: dict[int, int] = {}
    never = len(trace.requests)
    found: list[list[int]] = []
    for now in range(never - 1, -1, -1):
        blocks = trace.requests[now].blocks
        found.append([coming.get(block, never) for block in blocks])
        for block in blocks:
            coming[block] = now
    found.reverse()
    return found
