"""The real process, with the scripted model: what it restores has the right bits, or it says so and ends."""

from pathlib import Path

import numpy as np
import pytest

from keepwarm.bench import BenchError
from keepwarm.bench.store_report import WAYS
from keepwarm.bench.store_restore import Question, Restores, measure
from keepwarm.config import CacheConfig, Config, ModelConfig
from keepwarm.core.clock import SystemClock
from keepwarm.engine.model import Prepared
from keepwarm.engine.scripted import LAYOUT, ScriptedModel


def question(path: Path, n_tokens: int, **model) -> Question:
    path.mkdir(parents=True, exist_ok=True)
    config = Config(data_dir=str(path), model=ModelConfig(engine="scripted", **model), cache=CacheConfig(policy="lru"))
    return Question(config, n_tokens, n_rounds=2, whole=False)


def test_every_way_in_every_round(tmp_path: Path) -> None:
    found = list(measure(question(tmp_path, 700)))
    ways = [way for way in WAYS if way in {one.way for one in found}]
    assert set(WAYS) - set(ways) <= {"sequential_direct"}  # not every file system has it
    assert sorted(one.way for one in found) == sorted(ways * 2)
    assert (found[0].way, found[len(ways)].way) == (ways[0], ways[1])  # each round begins with another one
    n_bytes = 640 * LAYOUT.cell_bytes  # whole blocks
    assert {one.n_bytes for one in found if "sequential" not in one.way} == {n_bytes}
    assert all(one.n_bytes > n_bytes for one in found if "sequential" in one.way)  # with the files' heads
    assert all(one.ms > 0 for one in found)


def test_no_more_than_the_models_window(tmp_path: Path) -> None:
    found = list(measure(question(tmp_path, 9000, n_ctx=1024)))
    assert {one.n_bytes for one in found if one.way == "restore"} == {960 * LAYOUT.cell_bytes}


def test_a_process_that_fails_says_so_in_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "store").write_text("not a directory")
    with pytest.raises(BenchError, match="said is above"):
        list(measure(question(tmp_path, 700)))
    assert len(capfd.readouterr().err.splitlines()) == 1


class Wrong(ScriptedModel):
    """Loads other bits than were saved, once told to."""

    loads_wrong = False

    def load(self, stream, blob):
        super().load(stream, blob)
        if self.loads_wrong:
            self._cells[stream] += np.uint64(1)


@pytest.mark.parametrize("loads_wrong", [False, True])
def test_a_restored_state_with_other_bits_is_found_out(tmp_path: Path, loads_wrong: bool) -> None:
    model = Wrong()
    prepared = Prepared(model, "digest", "scripted", "plain", "strict", 1)
    runs = Restores(question(tmp_path, 700), prepared, SystemClock()).run()
    model.loads_wrong = loads_wrong
    if loads_wrong:
        with pytest.raises(BenchError, match="does not give the bits"):
            list(runs)
    else:
        assert sum(one.way == "restore" for one in runs) == 2


def test_without_exact_caching_there_is_nothing_to_restore(tmp_path: Path) -> None:
    prepared = Prepared(ScriptedModel(), "digest", "scripted", "plain", "strict", None, "not exact here")
    with pytest.raises(BenchError, match="not exact here"):
        Restores(question(tmp_path, 700), prepared, SystemClock())
