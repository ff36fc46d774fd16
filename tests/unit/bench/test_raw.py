import numpy as np
import pytest

from keepwarm.bench.raw import Raw
from keepwarm.bench.raw_frames import Base, Cold, DecodeAll, Follow, Warm
from keepwarm.core.clock import SystemClock
from keepwarm.engine.scripted import ScriptedModel

PROMPT = list(range(40, 104))


@pytest.fixture
def model() -> ScriptedModel:
    return ScriptedModel(n_streams=4, n_ctx=256, n_ubatch=32)


def test_a_cold_prompt_is_evaluated_whole_each_time(model: ScriptedModel) -> None:
    raw = Raw(model, SystemClock())
    for _ in range(2):
        raw.answer(Cold(PROMPT, [32, 32]))
    assert model.n_evaluated == 2 * len(PROMPT)


def test_a_warm_prompt_evaluates_the_new_tokens_only_and_gives_the_cold_ones_bits(model: ScriptedModel) -> None:
    raw = Raw(model, SystemClock())
    raw.answer(Cold([*PROMPT[:48], 99, 98], [32, 16, 2]))
    cold = model.logits(-1).copy()
    raw.answer(Base(PROMPT, [32, 32]))
    n_before = model.n_evaluated
    took = raw.answer(Warm(48, [99, 98], [2]))
    assert model.n_evaluated == n_before + 2
    assert np.array_equal(model.logits(-1), cold)
    assert took.restored_bytes is not None and took.restored_bytes > 0


def test_a_warm_prompt_with_nothing_cached_restores_nothing(model: ScriptedModel) -> None:
    took = Raw(model, SystemClock()).answer(Warm(0, PROMPT, [32, 32]))
    assert took.restored_bytes is None
    assert model.n_evaluated == len(PROMPT)


@pytest.mark.parametrize("strict", [True, False])
def test_streams_are_decoded_as_far_as_asked_and_emptied(model: ScriptedModel, strict: bool) -> None:
    raw = Raw(model, SystemClock())
    raw.answer(Base(PROMPT, [32, 32]))
    follows = [Follow(40, [90 + stream, 80], [2], n_steps) for stream, n_steps in enumerate((3, 0, 5))]
    raw.answer(DecodeAll(follows, strict=strict))
    for stream in range(3):
        model.evaluate(stream, np.array(PROMPT[:8], np.int32), 0, want_logits=False)  # only an empty stream takes it
