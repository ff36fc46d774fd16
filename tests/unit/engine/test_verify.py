"""`keepwarm verify`: its verdict follows the model."""

import io

import pytest
from rich.console import Console

from keepwarm.config import Config, ModelConfig
from keepwarm.engine import verify
from keepwarm.engine.scripted import ScriptedModel
from keepwarm.engine.worker import prepare_scripted

CONFIG = Config(model=ModelConfig(name="s", engine="scripted", n_ctx=1024))


class ForgetfulModel(ScriptedModel):
    """Comes back from a restore with one cell changed."""

    def load(self, stream, blob):
        super().load(stream, blob)
        self._cells[stream, 5] ^= 1
        self._cells[stream, self.n_held(stream) - 1] ^= 1


def shown(config=CONFIG):
    console = Console(file=io.StringIO(), width=120)
    return verify.run(config, console), console.file.getvalue()


def test_an_exact_model_passes_every_check():
    passed, text = shown()
    assert passed
    assert "g = 1" in text
    assert "FAILED" not in text


def test_a_model_that_is_not_exact_fails(monkeypatch: pytest.MonkeyPatch):
    prepared = prepare_scripted(CONFIG)
    prepared.model = ForgetfulModel(n_ctx=1024)
    monkeypatch.setattr(verify, "prepare_scripted", lambda _config: prepared)
    passed, text = shown()
    assert not passed
    assert "none of 1, 8, 16, 64 is exact" in text


@pytest.mark.parametrize("model_type, verdict", [(ScriptedModel, True), (ForgetfulModel, False)])
def test_a_model_kept_whole_is_verified_whole(monkeypatch: pytest.MonkeyPatch, model_type, verdict):
    prepared = prepare_scripted(CONFIG)
    prepared.model, prepared.reuse = model_type(n_ctx=1024, granularity=8, forgets=True), "snapshots"
    monkeypatch.setattr(verify, "prepare_scripted", lambda _config: prepared)
    passed, text = shown()
    assert passed == verdict
    assert "state kept whole and put back" in text
    assert "24 bytes for 560 tokens" in text
    assert ("g = 8" in text) == verdict
