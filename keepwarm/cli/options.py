"""Options that several commands take."""

from pathlib import Path
from typing import Annotated

import typer

from keepwarm.cli.failure import fail
from keepwarm.config import Config, ConfigError, load

DataDir = Annotated[
    Path | None,
    typer.Option(
        "--data-dir",
        metavar="DIR",
        help="Directory of the database and prepared weights (default: $KEEPWARM_DATA_DIR, or keepwarm in $XDG_DATA_HOME or ~/.local/share).",
        show_default=False,
    ),
]
DatabaseUrl = Annotated[
    str | None,
    typer.Option(
        "--database-url",
        metavar="URL",
        help="PostgreSQL database in place of the directory's (default: $KEEPWARM_DATABASE_URL, which keeps a password out of sight).",
        show_default=False,
    ),
]
ConfigFile = Annotated[Path | None, typer.Option("--config", metavar="FILE", help="TOML file with the configuration.")]
ModelFile = Annotated[
    Path | None, typer.Option("--model", metavar="FILE.gguf", help="Model to serve instead of the packaged one.")
]
TenantFilter = Annotated[str | None, typer.Option("--tenant", metavar="TENANT", help="Only this tenant's.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]

Override = str | int | bool | dict[str, str]


def configured(config_file: Path | None, model: Path | None, data_dir: Path | None, **given: Override | None) -> Config:
    """The configuration with the options that were given on top; ends the command when it cannot be used."""
    if model is not None and not model.is_file():
        fail(f"there is no model file {model}; give --model the path of a GGUF file")
    overrides: dict[str, Override] = {name: value for name, value in given.items() if value is not None}
    if model is not None:
        overrides["model"] = {"path": str(model)}
    if data_dir is not None:
        overrides["data_dir"] = str(data_dir)
    try:
        return load(None if config_file is None else str(config_file), overrides)
    except ConfigError as error:
        fail(str(error))
