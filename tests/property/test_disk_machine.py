"""Any sequence of writes, reads, deletes, flips, cuts and restarts: the disk tier against a dictionary."""

import shutil
import tempfile
from pathlib import Path

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from keepwarm.engine.disk import DiskTier
from keepwarm.engine.tiers import BlockLost, Damage, TierFull
from tests.faults import FaultyFiles, a_block

BLOCKS = [a_block(number, (0, 700, 5_000, 9_000)[number % 4], (3, 1_200)[number % 2]) for number in range(8)]
NUMBERS = st.integers(0, len(BLOCKS) - 1)
BUDGET = 60_000


class DiskMachine(RuleBasedStateMachine):
    """The dictionary holds, by key, whether the file was damaged behind the tier's back."""

    def __init__(self):
        super().__init__()
        self.root = Path(tempfile.mkdtemp())
        self.there: dict[int, bool] = {}
        self.n_damaged = 0
        self.open()

    def open(self):
        self.tier = DiskTier(self.root, BUDGET, bytes(32), files=FaultyFiles())
        self.n_damaged = 0

    def cost(self, numbers):
        return sum(self.tier.cost(BLOCKS[number][0]) for number in numbers)

    def path(self, number):
        return self.root / "blocks" / f"{BLOCKS[number][0].key.hex()}.kv"

    @rule(numbers=st.lists(NUMBERS, max_size=4))
    def write(self, numbers):
        new = set(numbers) - set(self.there)
        fits = self.cost(new) <= BUDGET - self.cost(self.there)
        n_bytes_needed = None
        try:
            self.tier.write([BLOCKS[number] for number in numbers])
        except TierFull as full:
            n_bytes_needed = full.n_bytes_needed
        assert n_bytes_needed == (None if fits else self.cost(new))
        if fits:
            self.there |= dict.fromkeys(new, False)

    @rule(number=NUMBERS)
    def read(self, number):
        head, body = BLOCKS[number]
        into = np.empty(head.n_bytes, np.uint8)
        lost = None
        try:
            self.tier.read(head.key, into)
        except BlockLost as exc:
            lost = exc
        damaged = self.there.get(number)
        if damaged is False:
            assert lost is None
            assert np.array_equal(into, body)
        else:
            assert lost is not None
            assert isinstance(lost.damage, Damage) is (damaged is True)
            self.n_damaged += damaged is True
            self.there.pop(number, None)

    @rule(number=NUMBERS)
    def delete(self, number):
        self.tier.delete(BLOCKS[number][0].key)
        self.there.pop(number, None)

    @rule(number=NUMBERS, at=st.integers(0, 20_000), bit=st.integers(0, 7))
    def flip(self, number, at, bit):
        if self.there.get(number) is False:
            content = bytearray(self.path(number).read_bytes())
            content[at % len(content)] ^= 1 << bit
            self.path(number).write_bytes(content)
            self.there[number] = True

    @rule(number=NUMBERS, n_bytes=st.integers(0, 20_000))
    def cut(self, number, n_bytes):
        if self.there.get(number) is False:
            content = self.path(number).read_bytes()
            self.path(number).write_bytes(content[: n_bytes % len(content)])
            self.there[number] = True

    @rule(number=NUMBERS)
    def leave_a_torn_write(self, number):
        (self.root / "blocks" / f"{BLOCKS[number][0].key.hex()}.1.{number}.tmp").write_bytes(b"half")

    @rule()
    def restart(self):
        """Headers are checked now; a flipped bit in a body is found when it is read."""
        self.tier.close()
        self.open()
        found = {head.key for head in self.tier.heads()}
        for number, damaged in list(self.there.items()):
            if BLOCKS[number][0].key not in found:
                assert damaged
                del self.there[number]
        assert len(found) == len(self.there)
        self.n_damaged = self.tier.damaged.total()
        assert not list(self.root.glob("blocks/*.tmp"))

    @invariant()
    def accounts_are_exact(self):
        assert self.tier.bytes_used == self.cost(self.there) <= BUDGET
        assert self.tier.damaged.total() == self.n_damaged
        assert len(list(self.root.glob("blocks/*.kv"))) == len(self.there)
        self.tier.check_integrity()

    def teardown(self):
        self.tier.close()
        shutil.rmtree(self.root)


TestDiskMachine = DiskMachine.TestCase
TestDiskMachine.settings = settings(max_examples=40, stateful_step_count=25)
