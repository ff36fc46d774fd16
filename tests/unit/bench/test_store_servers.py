import io
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from keepwarm.bench import BenchError
from keepwarm.bench.store_servers import NEVER_TOKENS, Servers, toml, varied
from keepwarm.config import ConfigError
from keepwarm.core.clock import SystemClock

TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x7f"), max_size=10)
SCALARS = st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | TEXTS
VALUES = st.recursive(
    SCALARS, lambda of: st.lists(of, max_size=3) | st.dictionaries(TEXTS, of, max_size=3), max_leaves=8
)


@given(st.dictionaries(TEXTS, VALUES, max_size=4))
def test_what_is_written_is_read(values):
    assert tomllib.loads(toml(values)) == values


def test_a_date_is_no_setting():
    with pytest.raises(BenchError, match="no setting"):
        toml(tomllib.loads("port = 1979-05-27"))


def test_a_variant_changes_the_cache_alone():
    base = {"model": {"engine": "scripted"}, "cache": {"policy": "lru", "disk_bytes": 5}, "warm": [{}], "data_dir": "x"}
    assert varied(base, {"disk_bytes": 0}) == {
        "model": {"engine": "scripted"},
        "cache": {"policy": "lru", "disk_bytes": 0},
    }
    assert varied({}, {}) == {"cache": {}}


def test_configurations_of_the_variants(tmp_path: Path):
    config_file = tmp_path / "mine.toml"
    config_file.write_text('[model]\nengine = "scripted"\n[cache]\ndisk_bytes = 7000\nauto_tokens_min = 9\n')
    servers = Servers(tmp_path, tmp_path / "models", config_file, Console(file=io.StringIO()), SystemClock())
    disk, host, off = (servers.config(variant) for variant in ("disk", "host", "off"))
    assert {config.model.engine for config in (disk, host, off)} == {"scripted"}
    assert [config.cache.disk_bytes for config in (disk, host, off)] == [7000, 0, 7000]
    assert [config.cache.auto_tokens_min for config in (disk, host, off)] == [9, 9, NEVER_TOKENS]
    assert len({config.data_dir for config in (disk, host, off)}) == 3


def test_prepared_weights_are_shared(tmp_path: Path):
    models = tmp_path / "kept" / "models"
    servers = Servers(tmp_path, models, None, Console(file=io.StringIO()), SystemClock())
    (servers.directory("disk") / "models" / "weights").write_text("w")
    assert (servers.directory("host") / "models" / "weights").read_text() == "w"
    assert (models / "weights").is_file()


@pytest.mark.parametrize("text", [None, "port = ", "port = true"])
def test_a_configuration_that_cannot_be_used(tmp_path: Path, text: str | None):
    config_file = tmp_path / "mine.toml"
    if text is not None:
        config_file.write_text(text)
    with pytest.raises(ConfigError, match=r"mine\.toml"):
        Servers(tmp_path, tmp_path / "models", config_file, Console(file=io.StringIO()), SystemClock())
