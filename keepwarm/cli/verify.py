"""keepwarm verify: is cached equal to uncached, bit for bit, with this model on this machine?"""

import importlib

import typer
from rich.console import Console

from keepwarm.cli.failure import fail
from keepwarm.cli.options import ConfigFile, DataDir, ModelFile, configured
from keepwarm.engine.model import LoadFault

EXAMPLE = "keepwarm verify --model qwen2.5-7b-instruct-q4_k_m.gguf"


def verify(config_file: ConfigFile = None, model: ModelFile = None, data_dir: DataDir = None) -> None:
    """Load the model and compare cold, restored, split and crowded evaluations. Exit status 0: all equal, 1: not."""
    config = configured(config_file, model, data_dir)
    measure = importlib.import_module(
        "keepwarm.engine.verify"
    )  # here, so that the other commands start in half the time
    try:
        exact = measure.run(config, Console())
    except LoadFault as fault:
        fail(str(fault))
    if not exact:
        raise typer.Exit(1)
