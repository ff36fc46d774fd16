from pathlib import Path

import pytest

from keepwarm.core.clock import SystemClock
from keepwarm.launch import LaunchError, serving


def test_a_server_that_ends_at_once_is_told_with_its_words(tmp_path: Path) -> None:
    with serving(tmp_path / "data", SystemClock(), ("--config", "missing.toml")) as server:
        with pytest.raises(LaunchError, match="the server ended with status 1"):
            server.wait_ready(lambda detail: None)
        assert "cannot read config missing.toml" in server.log_tail()


def test_the_server_is_ended_when_the_context_is_left_by_an_error(tmp_path: Path) -> None:
    config = tmp_path / "k.toml"
    config.write_text('[model]\nengine = "scripted"\n', encoding="utf-8")
    with (
        pytest.raises(LaunchError, match="waited 0 s for rain"),
        serving(tmp_path / "data", SystemClock(), ("--config", str(config))) as server,
    ):
        server.wait_until("rain", lambda: False, timeout_s=0)
    with pytest.raises(LaunchError, match="the server ended"):
        server.pause()
