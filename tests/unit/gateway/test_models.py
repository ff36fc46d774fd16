"""Names of the served model."""

import pytest

from keepwarm.config import ModelConfig
from keepwarm.core.errors import ApiError, ErrorKind
from keepwarm.gateway.models import ServedModels

CONFIG = ModelConfig(name="small", aliases=("moonshot-v1", "moonshot-v1-8k", "small"))


def test_name_and_aliases_are_the_same_model() -> None:
    models = ServedModels(CONFIG, any_name=False)
    assert models.names == ("small", "moonshot-v1", "moonshot-v1-8k")
    assert {models.resolve(name) for name in models.names} == {"small"}
    assert models.means("moonshot-v1", models.resolve("moonshot-v1-8k"))


def test_an_unknown_name_is_told_the_known_ones() -> None:
    models = ServedModels(CONFIG, any_name=False)
    with pytest.raises(ApiError, match="no model 'gpt' here; known are: small, moonshot-v1, moonshot-v1-8k") as raised:
        models.resolve("gpt")
    assert raised.value.kind is ErrorKind.UNKNOWN_MODEL
    assert not models.means("gpt", "small")


def test_a_development_server_takes_any_name_but_none() -> None:
    models = ServedModels(CONFIG, any_name=True)
    assert models.resolve("gpt") == "small"
    with pytest.raises(ApiError):
        models.resolve("")
