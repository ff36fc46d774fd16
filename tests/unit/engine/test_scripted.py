"""The scripted model is as picky as llama.cpp: break a rule of chunks.py and its cells, so its answers, are others.

Every other test over this model can fail only because of what is checked here.
"""

import numpy as np
import pytest

from keepwarm.core.prompt import Prompt
from keepwarm.core.request import Sampling
from keepwarm.engine.layout import LayoutFault
from keepwarm.engine.model import DecodeStep, GrammarFault, ModelFault
from keepwarm.engine.scripted import END_OF_TEXT, IM_END, IM_START, LETTERS, ScriptedModel, ScriptedVocab
from tests.cold import evaluate, values
from tests.unit.engine.conftest import tokens


def evaluated(*sizes, g=1, stream=0, prompt=None):
    """Cells after evaluating a prompt in ubatches of these sizes."""
    prompt = tokens(sum(sizes)) if prompt is None else prompt
    model = ScriptedModel(granularity=g)
    pos = 0
    for n in sizes:
        model.evaluate(stream, prompt[pos : pos + n], pos, want_logits=True)
        pos += n
    return values(model, stream)


@pytest.mark.parametrize("g", [1, 8, 64])
def test_cuts_at_multiples_change_nothing(g):
    plain = evaluated(512, 128, g=g)
    for sizes in [(128, 512), (64, 64, 512), (192, 448), (512, 64, 64)]:
        assert np.array_equal(evaluated(*sizes, g=g), plain)
    assert np.array_equal(evaluated(512, 128, g=g, stream=5), plain)


@pytest.mark.parametrize("g, cut", [(8, 60), (8, 4), (8, 127), (64, 8), (64, 120)])
def test_a_cut_elsewhere_changes_all_cells_from_there_on(g, cut):
    plain, other = evaluated(128, g=g), evaluated(cut, 128 - cut, g=g)
    first = int(np.flatnonzero(plain != other)[0])
    assert cut // g * g <= first <= cut
    assert not (plain == other)[first:].any()


@pytest.mark.parametrize("g", [1, 8])
def test_a_row_evaluated_alone_is_another(g):
    assert evaluated(16, 1, g=g)[16] != evaluated(17, g=g)[16]
    assert evaluated(1, 16, g=g)[0] != evaluated(17, g=g)[0]


def test_a_remainder_depends_on_its_size():
    assert np.array_equal(evaluated(64 + 5, g=64), evaluated(64, 5, g=64))
    assert evaluated(64 + 5, g=64)[64] != evaluated(64 + 6, g=64)[64]


@pytest.mark.parametrize("at", [0, 30, 99])
def test_every_later_cell_depends_on_every_token(at):
    prompt = tokens(100)
    prompt[at] += 1
    same = evaluated(100) == evaluated(100, prompt=prompt)
    assert same[:at].all()
    assert not same[at:].any()


def decoded(*others):
    """Cells of stream 3 after one decode step beside other streams."""
    model = ScriptedModel()
    steps = [DecodeStep(3, 100, 20)]
    evaluate(model, Prompt("a", tokens(20)), stream=3)
    for stream in others:
        evaluate(model, Prompt("a", tokens(20, seed=stream)), stream=stream)
        steps.append(DecodeStep(stream, 100, 20))
    model.decode(steps)
    return values(model, 3)


def test_decoding_in_company_is_another_than_alone():
    alone = decoded()
    assert np.array_equal(decoded(6, 7), alone)  # no neighbour: a ubatch of its own
    for others in ((2,), (4,), (2, 4)):
        assert decoded(*others)[20] != alone[20]
    assert alone[20] != evaluated(21)[20]  # and another than in a prompt


def test_logits_follow_the_last_cell():
    model = ScriptedModel()
    model.evaluate(0, tokens(20), 0, want_logits=True)
    logits = model.logits(-1).copy()
    assert logits.shape == (model.n_vocab,)
    assert logits.dtype == np.float32
    assert set(np.argsort(-logits)[:20].tolist()) <= {*LETTERS.tolist(), IM_END}
    model.evaluate(0, tokens(5), 20, want_logits=True)
    assert not np.array_equal(model.logits(-1), logits)


@pytest.mark.parametrize("pos", [0, 9, 11])
def test_a_position_that_is_not_the_next_is_a_fault(pos):
    model = ScriptedModel()
    model.evaluate(0, tokens(10), 0, want_logits=False)
    with pytest.raises(ModelFault, match="stream 0"):
        model.evaluate(0, tokens(5), pos, want_logits=False)


def test_forgotten_cells_are_missed():
    model = ScriptedModel()
    model.evaluate(0, tokens(10), 0, want_logits=False)
    model.forget(0, 3, 5)
    with pytest.raises(ModelFault):
        model.evaluate(0, tokens(5), 10, want_logits=False)
    model.forget(0, 3, -1)
    model.evaluate(0, tokens(10)[3:], 3, want_logits=False)
    assert len(values(model)) == 10


def test_a_full_stream_is_a_fault():
    model = ScriptedModel(n_ctx=16)
    with pytest.raises(ModelFault):
        model.evaluate(0, tokens(17), 0, want_logits=False)


def test_a_state_saved_and_loaded_is_the_same():
    model = ScriptedModel(n_streams=3)
    model.evaluate(0, tokens(50), 0, want_logits=False)
    model.evaluate(2, tokens(9, seed=1), 0, want_logits=False)
    before = values(model)
    model.load(2, model.save(0).copy())
    assert np.array_equal(values(model, 2), before)


def test_a_torn_or_foreign_state_is_refused():
    model = ScriptedModel()
    model.evaluate(0, tokens(50), 0, want_logits=False)
    blob = model.save(0).copy()
    torn = blob.copy()
    torn[-100] ^= 1
    with pytest.raises(ModelFault, match="torn"):
        model.load(1, torn)
    with pytest.raises(ModelFault):
        ScriptedModel(n_streams=1).load(0, blob)
    with pytest.raises(LayoutFault):
        model.load(1, blob[:-1])
    model.load(1, blob)


@pytest.mark.parametrize(
    "temperature, seeds, n_different", [(0.0, (1, 2, 3), 1), (1e9, (1, 2, 3), 3), (1e9, (4, 4, 4), 1)]
)
def test_sampling_is_greedy_or_follows_its_seed(temperature, seeds, n_different):
    model = ScriptedModel()
    model.evaluate(0, tokens(20), 0, want_logits=True)
    drawn = set()
    for seed in seeds:
        sampler = model.sampler(Sampling(temperature=temperature), None, seed)
        drawn.add(tuple(sampler.sample(-1) for _ in range(8)))
        sampler.close()
    assert len(drawn) == n_different


def test_it_knows_no_grammars():
    with pytest.raises(GrammarFault):
        ScriptedModel().sampler(Sampling(), "root ::= [a-z]", 1)


def test_tokens_are_bytes_and_three_control_tokens():
    model, vocab = ScriptedModel(), ScriptedVocab()
    text = "héllo <|im_end|>"
    ids = vocab.encode_plain(text)
    assert b"".join(map(model.piece, ids)) == text.encode()
    assert not any(map(model.is_end, ids))
    assert {s.token: s.text for s in vocab.specials} == {
        IM_START: "<|im_start|>",
        IM_END: "<|im_end|>",
        END_OF_TEXT: "<|endoftext|>",
    }
    assert [model.piece(s.token) for s in vocab.specials] == [b""] * 3
    assert [model.is_end(s.token) for s in vocab.specials] == [False, True, True]
    assert (vocab.special_text("eos"), vocab.special_text("bos"), vocab.bos) == ("<|im_end|>", "", None)


def test_a_model_that_forgets_keeps_its_last_value_alone():
    prompt = tokens(200)
    plain, model = ScriptedModel(granularity=8), ScriptedModel(granularity=8, forgets=True)
    for each in (plain, model):
        each.evaluate(0, prompt[:128], 0, want_logits=False)
    assert model.n_held(0) == plain.n_held(0) == 128
    blob = model.save(0).copy()
    assert len(blob) == 24
    model.load(3, blob)
    assert model.n_held(3) == 128
    for each, stream in ((plain, 0), (model, 3)):
        each.evaluate(stream, prompt[128:], 128, want_logits=True)
    assert np.array_equal(plain.logits(-1), model.logits(-1))


def test_a_model_that_forgets_drops_all_or_nothing():
    model = ScriptedModel(forgets=True)
    model.evaluate(0, tokens(64), 0, want_logits=False)
    model.forget(0, 32, -1)
    model.forget(0, 0, 32)
    assert model.n_held(0) == 64
    with pytest.raises(ModelFault, match="does not hold exactly"):
        model.evaluate(0, tokens(8), 32, want_logits=False)
    model.forget(0, 0, -1)
    assert model.n_held(0) == 0
    model.load(1, model.save(0))
    assert model.n_held(1) == 0


@pytest.mark.parametrize("at", [0, 8, 16, 23])
def test_a_whole_state_with_another_bit_is_refused(at):
    model = ScriptedModel(forgets=True)
    model.evaluate(0, tokens(64), 0, want_logits=False)
    blob = model.save(0).copy()
    blob[at] ^= 1
    with pytest.raises(ModelFault, match="torn"):
        model.load(1, blob)
    with pytest.raises(ModelFault, match="torn"):
        model.load(1, blob[:-1])
