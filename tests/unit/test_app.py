"""The composition root: what it may load, and how it fails."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from keepwarm.app import ServeError, serve
from keepwarm.config import Config, ModelConfig


def test_llama_cpp_is_not_loaded_to_begin_with() -> None:
    code = "import sys, keepwarm.app; sys.exit('llama_cpp' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_taken_port_is_one_line_that_says_what_to_do(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        config = Config(port=port, data_dir=str(tmp_path), model=ModelConfig(engine="scripted"))
        with pytest.raises(ServeError, match=f"cannot listen on 127.0.0.1:{port}: .*; choose another --host or --port"):
            serve(config)


def test_a_model_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    model = ModelConfig(name="m", path=str(tmp_path / "none.gguf"))
    with pytest.raises(ServeError) as raised:
        serve(Config(port=0, data_dir=str(tmp_path), model=model))
    assert "\n" not in str(raised.value)
    assert "none.gguf" in str(raised.value)


def test_a_database_that_cannot_be_used_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "keepwarm.db").write_bytes(b"this is no database" * 100)
    with pytest.raises(ServeError, match="cannot use database"):
        serve(Config(port=0, data_dir=str(tmp_path), model=ModelConfig(engine="scripted")))
