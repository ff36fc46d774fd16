"""keepwarm serve: run the server."""

import importlib
from typing import Annotated

import typer

from keepwarm.cli.failure import fail
from keepwarm.cli.options import ConfigFile, DatabaseUrl, DataDir, ModelFile, configured

EXAMPLE = "keepwarm serve --dev --port 9000"

Host = Annotated[str | None, typer.Option("--host", help="Address to bind (default: 127.0.0.1).")]
Port = Annotated[int | None, typer.Option("--port", min=0, max=65535, help="TCP port (default: 8080).")]
Dev = Annotated[
    bool,
    typer.Option("--dev", help="Loopback only: accept any key, each its own tenant, and any model name."),
]


def serve(
    config_file: ConfigFile = None,
    host: Host = None,
    port: Port = None,
    data_dir: DataDir = None,
    database_url: DatabaseUrl = None,
    model: ModelFile = None,
    dev: Dev = False,
) -> None:
    """Serve until interrupted. Options win over the configuration file; without either the packaged model is served."""
    config = configured(config_file, model, data_dir, host=host, port=port, database_url=database_url, dev=dev or None)
    app = importlib.import_module("keepwarm.app")  # here, so that the other commands start in half the time
    try:
        app.serve(config)
    except app.ServeError as error:
        fail(str(error))
