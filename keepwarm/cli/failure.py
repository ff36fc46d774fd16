"""How a command fails: one line on stderr that says what to do, exit status 1."""

from typing import NoReturn

import typer


def fail(message: str) -> NoReturn:
    """End the command."""
    typer.echo(f"keepwarm: {' '.join(message.split())}", err=True)
    raise typer.Exit(1)
