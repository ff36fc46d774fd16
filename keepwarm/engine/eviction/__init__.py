"""Which stored block to give up first. Pure: no I/O, no clock; the caller passes the time.

A policy knows blocks by small ids and hears what happens to them (`Policy`); the caller says which of them may go. Only
leaves of the prefix tree may, since a block without the blocks before it is of no use: a chain goes from its tail.

    facts      what is said about a block, and what every policy answers
    leaves     the order in which leaves go, one entry per block
    lru        the block unused for longest
    s3fifo     three queues: one-shot blocks leave soon (Yang et al., SOSP 2023)
    cost       expected hits per block and second, learned from what happened to blocks like it; the default
    hazard     how likely a read is, by class and age
    ghosts     keys of blocks that left; watched: with what they were

docs/eviction.md has what each is worth on recorded traffic (`keepwarm replay`).
"""

from keepwarm.engine.eviction.cost import Cost
from keepwarm.engine.eviction.facts import BlockFacts, Policy
from keepwarm.engine.eviction.ghosts import Ghosts
from keepwarm.engine.eviction.lru import Lru
from keepwarm.engine.eviction.s3fifo import S3Fifo

__all__ = ["POLICIES", "BlockFacts", "Cost", "Ghosts", "Lru", "Policy", "S3Fifo", "policy"]

POLICIES = ("lru", "s3fifo", "cost")


def policy(name: str, n_blocks_max: int) -> Policy:
    """The policy of that name for a store of `n_blocks_max` blocks. Raises ValueError."""
    if n_blocks_max < 1:
        raise ValueError(f"a store of {n_blocks_max} blocks needs no eviction policy")
    match name:
        case "lru":
            return Lru()
        case "s3fifo":
            return S3Fifo(n_blocks_max)
        case "cost":
            return Cost(n_blocks_max)
        case _:
            raise ValueError(f"there is no eviction policy {name!r}; there are {', '.join(POLICIES)}")
