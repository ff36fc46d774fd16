"""The prefix store against a naive twin, a list of cold cell values per tenant: equal values, equal bits.

Whatever is restored is loaded into a stream of the scripted model and must equal a cold evaluation, cell by cell.
"""

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from keepwarm.core.prompt import Prompt, common_prefix
from keepwarm.engine.chunks import storable, usable
from keepwarm.engine.scripted import ScriptedModel
from keepwarm.engine.selftest import layout_of
from keepwarm.engine.store import NoRoom, PrefixStore, slot_bytes
from keepwarm.engine.tiers import HostTier
from tests.cold import evaluate, values

N_MAX = 300


@st.composite
def prompts(draw):
    """Much alike, so that they meet: one text, at most one fork, marks at the same few places."""
    n = draw(st.sampled_from([1, 2, 3, 65, 70, 128, 200]) | st.integers(1, N_MAX))
    fork = draw(st.sampled_from([0, 1, 64, 100, n, n, n]))
    tokens = np.random.default_rng(0).integers(97, 100, n).astype(np.int32)
    tokens[fork:] += 10
    marks = draw(st.sampled_from([(), (), (n,), (70,), (64, 150)]) | st.sets(st.integers(1, n), max_size=2))
    return Prompt(draw(st.sampled_from("aab")), tokens, tuple(sorted(m for m in marks if m <= n)))


class StoreMachine(RuleBasedStateMachine):
    @initialize(g=st.sampled_from([1, 8, 64]), blocks=st.integers(0, 25))
    def start(self, g, blocks):
        self.model = ScriptedModel(n_streams=3, n_ctx=N_MAX + 8, granularity=g)
        layout = layout_of(self.model)
        self.slot = slot_bytes(layout)
        self.tier = HostTier(blocks * self.slot, self.slot)
        self.store = PrefixStore(layout, self.tier, identity=("m",), granularity=g, n_ctx=N_MAX + 8)
        self.stored = {"a": [], "b": []}  # cold values of all that was ever saved
        self.full = blocks == 0  # from then on something may have been evicted or refused
        self.held = []  # (what is held, its prompt's cold values, how many of them are promised)
        self.pinned = {}  # pin: (prompt, how many of its tokens)

    def cold(self, prompt):
        evaluate(self.model, prompt, stream=1, rows_max=128)
        return values(self.model, 1)

    def kept(self, prompt, n_evaluated):
        return storable(n_evaluated, self.store.pieces(prompt), self.store.granularity)

    def remember(self, prompt, n_kept):
        self.stored[prompt.tenant].append(self.cold(prompt)[:n_kept])
        self.full = self.full or self.tier.n_free == 0

    @rule(prompt=prompts(), done=st.integers(0, N_MAX), spend=st.booleans(), rows_max=st.sampled_from([64, 512]))
    def save(self, prompt, done, spend, rows_max):
        n_evaluated = evaluate(self.model, prompt, n_tokens=min(done, prompt.n_tokens), rows_max=rows_max)
        n_missing = self.store.n_missing(prompt, n_evaluated)
        n_added = self.store.save(prompt, n_evaluated, self.model, 0, spend=spend, pin=None)
        assert n_added <= n_missing
        self.remember(prompt, self.kept(prompt, n_evaluated))
        if not self.full:
            assert n_added == n_missing
            assert self.store.n_missing(prompt, n_evaluated) == 0

    @rule(prompt=prompts(), pin=st.sampled_from("xyz"), spend=st.booleans())
    def pin(self, prompt, pin, spend):
        n_evaluated = evaluate(self.model, prompt)
        n_bytes_free, refused = self.tier.n_free * self.slot, None
        try:
            self.store.save(prompt, n_evaluated, self.model, 0, spend=spend, pin=pin)
        except NoRoom as fault:
            refused = fault
        if refused:
            assert n_bytes_free <= refused.n_bytes_free < refused.n_bytes_needed
            self.full = True
        else:
            n_kept = self.kept(prompt, n_evaluated)
            self.pinned[pin] = prompt, n_kept
            self.remember(prompt, n_kept)

    @rule(pin=st.sampled_from("xyz"))
    def unpin(self, pin):
        self.store.unpin(pin)
        self.pinned.pop(pin, None)

    @rule(prompt=prompts(), want_logits=st.booleans())
    def hold(self, prompt, want_logits):
        held = self.store.hold(prompt, want_logits=want_logits)
        cold = self.cold(prompt)
        best = max((common_prefix(cold, known) for known in self.stored[prompt.tenant]), default=0)
        parts, g = self.store.pieces(prompt), self.store.granularity
        if want_logits:  # without logits an open remainder is never read, whatever its bits
            expected = usable(best, parts, g, want_logits=True)
            assert held.n_tokens <= expected
            assert self.full or held.n_tokens == expected
        n_promised = held.n_tokens if want_logits else min(held.n_tokens, self.kept(prompt, prompt.n_tokens))
        self.held.append((held, cold, n_promised))

    @rule()
    def restore_and_release(self):
        if not self.held:
            return
        held, cold, n_promised = self.held.pop(0)
        if held.n_tokens:
            self.store.restore(held, self.model, 2)
            restored = values(self.model, 2)
            assert len(restored) == held.n_tokens
            assert np.array_equal(restored[:n_promised], cold[:n_promised])
        self.store.release(held)

    @rule(prompt=prompts())
    def a_restored_stream_goes_on_like_the_cold_one(self, prompt):
        held = self.store.hold(prompt, want_logits=True)
        cold = self.cold(prompt)
        if held.n_tokens:
            self.store.restore(held, self.model, 2)
            evaluate(self.model, prompt, stream=2, start=held.n_tokens, rows_max=64)
            assert np.array_equal(values(self.model, 2), cold)
        self.store.release(held)

    @invariant()
    def every_block_is_accounted_for(self):
        self.store.check_integrity()
        self.tier.check_integrity()
        free = self.tier.n_free * self.slot
        assert free + self.store.bytes_resident + self.store.bytes_pinned == self.store.bytes_total
        assert min(free, self.store.bytes_resident, self.store.bytes_pinned) >= 0
        assert bool(self.store.bytes_pinned) == any(n_kept for _, n_kept in self.pinned.values())

    @invariant()
    def what_is_pinned_is_there(self):
        for prompt, n_kept in self.pinned.values():
            held = self.store.hold(prompt, want_logits=False)
            assert held.n_tokens >= n_kept
            self.store.release(held)

    def teardown(self):
        if not hasattr(self, "store"):
            return
        for held, _, _ in self.held:
            self.store.release(held)
        for pin in self.pinned:
            self.store.unpin(pin)
        assert self.store._index.n_reclaimable() == len(self.store._index), "something is locked for ever"


StoreMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
TestPrefixStore = StoreMachine.TestCase
