"""Opens the configured model's vocabulary in the gateway's process: no weights, no context, no compute."""

from keepwarm.config import ModelConfig
from keepwarm.engine.llama import Vocab
from keepwarm.engine.model import LoadFault, ModelFault
from keepwarm.engine.prepare import source_path

__all__ = ["LoadFault", "open_vocabulary"]


def open_vocabulary(config: ModelConfig) -> Vocab:
    """The vocabulary of the file that will be served (preparing weights does not change it). Raises LoadFault."""
    try:
        return Vocab.open(source_path(config))
    except ModelFault as exc:
        raise LoadFault(str(exc)) from exc
