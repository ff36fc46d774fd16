"""The kernel's accounts, read from made-up trees in the forms that kernels write."""

import pytest

from keepwarm.engine.pressure import MemoryReading, read_memory

MIB = 1 << 20
MEMINFO = """MemTotal:       24683644 kB
MemFree:        24416256 kB
MemAvailable:   24385776 kB
SwapTotal:       2097148 kB
SwapFree:        2000000 kB
HugePages_Total:       0
"""
PRESSURE = """some avg10=12.50 avg60=3.01 avg300=0.80 total=123456
full avg10=4.25 avg60=1.00 avg300=0.10 total=23456
"""


@pytest.fixture
def system(tmp_path):
    """Writes files of a made-up system and gives its root."""

    def build(files):
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path

    return build


def test_a_system_that_says_nothing_is_unknown_not_zero(tmp_path):
    assert read_memory(tmp_path) == MemoryReading()


def test_meminfo_and_pressure(system):
    root = system({"proc/meminfo": MEMINFO, "proc/pressure/memory": PRESSURE})
    assert read_memory(root) == MemoryReading(
        some_avg10=12.5,
        full_avg10=4.25,
        available_bytes=24385776 * 1024,
        swap_used_bytes=97148 * 1024,
        total_bytes=24683644 * 1024,
    )


@pytest.mark.parametrize("text", ["", "some", "some avg10=\n", "some avg10=much avg60=1\n", "avg10=3\n"])
def test_a_pressure_file_of_another_form_is_unknown(system, text):
    assert read_memory(system({"proc/pressure/memory": text})).some_avg10 is None


def test_a_kernel_without_the_full_line(system):
    reading = read_memory(system({"proc/pressure/memory": "some avg10=1.00 avg60=0.00 avg300=0.00 total=1\n"}))
    assert (reading.some_avg10, reading.full_avg10) == (1.0, None)


def test_what_cannot_be_read_as_a_file_is_unknown(tmp_path):
    (tmp_path / "proc/meminfo").mkdir(parents=True)
    (tmp_path / "proc/pressure/memory").mkdir(parents=True)
    assert read_memory(tmp_path) == MemoryReading()


def group_v2(name, limit, used, inactive=0):
    top = f"sys/fs/cgroup/{name}".rstrip("/")
    return {
        f"{top}/memory.max": f"{limit}\n",
        f"{top}/memory.current": f"{used}\n",
        f"{top}/memory.stat": f"anon 5\ninactive_file {inactive}\nactive_file 7\n",
    }


def group_v1(name, limit, used, inactive=0):
    top = f"sys/fs/cgroup/memory/{name}".rstrip("/")
    return {
        f"{top}/memory.limit_in_bytes": f"{limit}\n",
        f"{top}/memory.usage_in_bytes": f"{used}\n",
        f"{top}/memory.stat": f"cache 1\ninactive_file 3\ntotal_inactive_file {inactive}\n",
    }


def limits(root):
    reading = read_memory(root)
    return reading.cgroup_limit_bytes, reading.cgroup_used_bytes


def test_version_2_without_its_inactive_file_pages(system):
    root = system({"proc/self/cgroup": "0::/a/b\n", **group_v2("a/b", 100 * MIB, 60 * MIB, 15 * MIB)})
    assert limits(root) == (100 * MIB, 45 * MIB)


def test_version_2_without_a_limit(system):
    root = system({"proc/self/cgroup": "0::/a\n", **group_v2("a", "max", 60 * MIB)})
    assert limits(root) == (None, None)


def test_a_tighter_group_above_counts(system):
    root = system(
        {
            "proc/self/cgroup": "0::/a/b/c\n",
            **group_v2("a", 90 * MIB, 80 * MIB),
            **group_v2("a/b", "max", 80 * MIB),
            **group_v2("a/b/c", 70 * MIB, 10 * MIB),
        }
    )
    assert limits(root) == (90 * MIB, 80 * MIB)


def test_version_1(system):
    text = "9:name=systemd:/\n4:cpu,memory:/a/b\n1:cpu:/x\n0::/\n"
    root = system({"proc/self/cgroup": text, **group_v1("a/b", 100 * MIB, 60 * MIB, 15 * MIB)})
    assert limits(root) == (100 * MIB, 45 * MIB)


def test_version_1_writes_no_limit_as_a_large_number(system):
    root = system({"proc/self/cgroup": "4:memory:/a\n", **group_v1("a", 9223372036854771712, 60 * MIB)})
    assert limits(root) == (None, None)


@pytest.mark.parametrize("path", ["/docker/of/the/host", "/../../elsewhere", "/"])
def test_in_a_container_the_top_of_the_mount_is_the_group(system, path):
    root = system({"proc/self/cgroup": f"0::{path}\n", **group_v2("", 100 * MIB, 60 * MIB)})
    assert limits(root) == (100 * MIB, 60 * MIB)


def test_use_is_never_negative(system):
    root = system({"proc/self/cgroup": "0::/\n", **group_v2("", 100 * MIB, 10 * MIB, 11 * MIB)})
    assert limits(root) == (100 * MIB, 0)


def test_this_machine_can_be_read():
    reading = read_memory()
    assert reading.available_bytes is None or 0 < reading.available_bytes <= reading.total_bytes
