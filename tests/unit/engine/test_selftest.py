"""What the engine measures before it promises: the granularities of picky models, and models that must be refused."""

import numpy as np
import pytest

from keepwarm.engine.layout import LayoutFault
from keepwarm.engine.model import ModelFault
from keepwarm.engine.scripted import LAYOUT, ScriptedModel
from keepwarm.engine.selftest import (
    CANDIDATES,
    checks,
    decode_checks,
    fill,
    granularity,
    layout_of,
    reassemble,
    same,
    sample_tokens,
    split,
)


class Inexact(ScriptedModel):
    """Its bits depend on the stream."""

    def evaluate(self, stream, tokens, pos, *, want_logits):
        super().evaluate(stream, tokens + np.int32(stream), pos, want_logits=want_logits)


class Crowded(ScriptedModel):
    """Its bits depend on whether other streams hold other prompts."""

    def evaluate(self, stream, tokens, pos, *, want_logits):
        first = {int(self._cells[i, 0]) for i in range(self.n_streams) if self._used[i, 0]}
        super().evaluate(stream, tokens + np.int32(len(first) > 1), pos, want_logits=want_logits)


class BrokenRestore(ScriptedModel):
    """One bit of one cell flips when a state is loaded, and nothing says so."""

    def load(self, stream, blob):
        super().load(stream, blob)
        self._cells[stream, np.flatnonzero(self._used[stream])[-1]] ^= np.uint64(1)


class Loose(ScriptedModel):
    """A decode step sees what was decoded just before, whatever the stream."""

    last = 0

    def decode(self, steps):
        stream = steps[0].stream
        self._cells[stream, steps[0].pos - 1] += np.uint64(self.last)
        self.last = stream
        super().decode(steps)


def failed(found):
    return [check.name for check in found if not check.passed]


@pytest.mark.parametrize("g", [1, 8, 16, 64])
def test_the_models_own_granularity_is_found(g):
    said = []
    assert granularity(ScriptedModel(granularity=g), said.append) == g
    assert said[-1] == f"measuring granularity: {g} ({CANDIDATES.index(g) + 1} of 4)"


@pytest.mark.parametrize("model", [ScriptedModel(granularity=128), Inexact(), Crowded(), BrokenRestore()])
def test_a_model_that_is_not_exact_has_none(model):
    assert granularity(model, lambda _: None) is None


@pytest.mark.parametrize("n_streams, n_ctx", [(1, 2048), (2, 2048), (8, 300)])
def test_small_contexts_and_few_streams_are_measured_too(n_streams, n_ctx):
    model = ScriptedModel(n_streams=n_streams, n_ctx=n_ctx, granularity=8)
    assert granularity(model, lambda _: None) == 8


def test_every_check_has_a_name_and_passes_on_an_exact_model():
    found = checks(ScriptedModel(granularity=8), 8, n_splits=2, seed=3)
    assert failed(found) == []
    assert [check.name.split(" ")[0] for check in found] == ["random", "random", "crowded:", "restored"]


def test_a_multiple_of_the_granularity_is_exact_too():
    assert failed(checks(ScriptedModel(granularity=8), 64)) == []


@pytest.mark.parametrize(
    "model, g, expected",
    [
        (ScriptedModel(granularity=64), 8, "random split"),
        (Crowded(n_streams=4), 1, "crowded"),
        (BrokenRestore(), 1, "restored"),
    ],
)
def test_checks_say_which_promise_is_broken(model, g, expected):
    (name,) = failed(checks(model, g))
    assert name.startswith(expected)


def test_checks_leave_the_streams_empty():
    model = ScriptedModel(n_streams=3)
    granularity(model, lambda _: None)
    for stream in range(3):
        model.evaluate(stream, sample_tokens(model.n_vocab, 10), 0, want_logits=False)


def test_the_layout_is_read_off_a_real_state():
    assert layout_of(ScriptedModel()) == LAYOUT


def test_a_state_that_cannot_be_read_or_put_back_means_no_caching():
    class Refuses(ScriptedModel):
        def load(self, stream, blob):
            raise ModelFault("state refused")

    class Unknown(ScriptedModel):
        def save(self, stream):
            return super().save(stream)[:-1]

    with pytest.raises(LayoutFault, match="state refused"):
        layout_of(Refuses())
    with pytest.raises(LayoutFault):
        layout_of(Unknown())


@pytest.mark.parametrize("n", [1, 63, 64, 65, 200])
def test_a_reassembled_state_is_the_state(n):
    model = ScriptedModel()
    fill(model, 0, sample_tokens(model.n_vocab, n), g=1)
    blob = model.save(0).copy()
    assert np.array_equal(reassemble(blob, LAYOUT), blob)


def test_strict_decoding_is_checked_beside_others():
    assert [check.name for check in decode_checks(ScriptedModel())] == [
        f"strict decoding beside {n} other turns" for n in (1, 3, 7)
    ]
    assert failed(decode_checks(ScriptedModel())) == []
    assert len(failed(decode_checks(Loose()))) == 3
    assert len(decode_checks(ScriptedModel(n_streams=4))) == 2


def test_samples_and_splits_can_be_repeated():
    assert np.array_equal(sample_tokens(1000, 50), sample_tokens(1000, 50))
    assert not np.array_equal(sample_tokens(1000, 50), sample_tokens(1000, 50, seed=1))
    ids = sample_tokens(1000, 500)
    assert ids.dtype == np.int32
    assert (ids.min() >= 250) and (ids.max() < 500)
    model, rng = ScriptedModel(granularity=8), np.random.default_rng(0)
    assert same(split(model, 0, ids, g=8, rng=rng), fill(model, 1, ids, g=8))


def test_same_compares_bits():
    zero = np.array([0.0], np.float32)
    assert same(zero, zero.copy())
    assert not same(zero, -zero)


def test_a_state_that_cannot_be_cut_is_measured_whole():
    model = ScriptedModel(granularity=8, forgets=True)
    with pytest.raises(LayoutFault):
        layout_of(model)
    assert granularity(model, lambda _: None, whole=True) == 8
    found = checks(model, 8, whole=True)
    assert failed(found) == []
    assert [check.name for check in found[-2:]] == ["restored at 280 and continued", "restored at 533 and continued"]


def test_whole_states_that_do_not_come_back_mean_no_caching():
    class Refuses(ScriptedModel):
        def load(self, stream, blob):
            raise ModelFault("state refused")

    class Others(ScriptedModel):
        def load(self, stream, blob):
            super().load(stream, blob)
            self._cells[stream, self.n_held(stream) - 1] ^= np.uint64(1)

    for model in (Refuses(forgets=True), Others(forgets=True)):
        assert granularity(model, lambda _: None, whole=True) is None
        assert [name.split(" ")[0] for name in failed(checks(model, 1, whole=True))] == ["restored", "restored"]
