"""keepwarm demo: see context caching at work."""

import importlib
from typing import Annotated

import typer
from rich.console import Console

from keepwarm.cli.failure import fail
from keepwarm.cli.options import DataDir
from keepwarm.demo import DemoError

EXAMPLE = "keepwarm demo --keep"

Keep = Annotated[bool, typer.Option("--keep", help="Leave the server running at the end, with calls to try.")]


def demo(keep: Keep = False, data_dir: DataDir = None) -> None:
    """Start a server on this machine, ask it about its own documentation with and without a cache, and compare.

    Exit status 1 when an answer with the cache differs from the one without.
    """
    try:
        story = importlib.import_module("keepwarm.demo.story")  # here: it needs the openai SDK, an optional extra
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("keepwarm"):
            raise
        fail(f"the demo needs the package {error.name}; install it with: pip install 'keepwarm[demo]'")
    try:
        equal = story.run(Console(), keep=keep, data_dir=data_dir)
    except DemoError as error:
        fail(str(error))
    if not equal:
        raise typer.Exit(1)
