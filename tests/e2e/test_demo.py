"""The demo's story against the scripted engine: the real server process, the real SDK, an engine killed on the way."""

from pathlib import Path

import pytest
from rich.console import Console

from keepwarm.core.clock import SystemClock
from keepwarm.demo.story import QUESTIONS, tell
from keepwarm.launch import serving

TEXT = "\n\n".join(f"Paragraph {n} is about things that are kept warm." for n in range(200))

pytestmark = pytest.mark.e2e


def test_the_story_is_told_to_its_end(tmp_path: Path) -> None:
    config = tmp_path / "k.toml"
    config.write_text('[model]\nengine = "scripted"\n', encoding="utf-8")
    console = Console(record=True, width=160)
    with serving(tmp_path / "data", SystemClock(), ("--config", str(config))) as server:
        calls = tell(console, server, TEXT, SystemClock(), keep=False)
    assert [(call.uses_cache, call.is_equal) for call in calls] == [
        (False, None),
        (True, True),
        *[(True, None)] * (len(QUESTIONS) - 1),
        (True, True),
    ]
    uncached, *cached = calls
    assert uncached.answer.n_cached == 0
    assert 3_000 <= uncached.answer.n_prompt <= 6_000
    for call in cached:
        assert call.n_object <= call.answer.n_cached < call.answer.n_prompt
    last = console.export_text().splitlines()[-1]
    assert last.startswith("Warm calls against uncached: time to first token")
    assert "cost of a call −" in last
