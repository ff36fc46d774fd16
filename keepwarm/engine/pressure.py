"""How short the machine is of memory: the kernel's own accounts, read and nothing decided (governor.py decides).

Sources: /proc/pressure/memory (share of time in which tasks waited for memory; kernels from 4.20, where it is switched
on), /proc/meminfo, and the memory limit of the process's control group or of one above it, in either version of the
interface, whichever leaves least. As container tools do, what a group uses is counted without its inactive file pages,
which the kernel gives back first. A number that cannot be read is None, never 0, and no absent file raises.
"""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from msgspec import Struct

UNLIMITED_BYTES = 1 << 60  # version 1 writes "no limit" as the largest number of whole pages
KIB = 1024
ROOT = Path("/")


class MemoryReading(Struct, frozen=True):
    """One look at the machine's memory; None where the system does not say. The limit and use belong to one group."""

    some_avg10: float | None = None  # percent of the last 10 s in which some task waited for memory
    full_avg10: float | None = None  # in which all that could have run did
    available_bytes: int | None = None  # what can be had without swapping, on the whole machine
    swap_used_bytes: int | None = None
    cgroup_limit_bytes: int | None = None  # None: no limit
    cgroup_used_bytes: int | None = None
    total_bytes: int | None = None  # of the machine


def read_memory(root: Path = ROOT) -> MemoryReading:
    """Read all of it, below `root`. A few small reads from the kernel: well below a millisecond."""
    pressure = _pressure(_text(root / "proc/pressure/memory"))
    meminfo = _meminfo(_text(root / "proc/meminfo"))
    swap_total, swap_free = meminfo.get("SwapTotal"), meminfo.get("SwapFree")
    limit, used = _tightest(root)
    return MemoryReading(
        some_avg10=pressure.get("some"),
        full_avg10=pressure.get("full"),
        available_bytes=meminfo.get("MemAvailable"),
        swap_used_bytes=None if swap_total is None or swap_free is None else max(swap_total - swap_free, 0),
        cgroup_limit_bytes=limit,
        cgroup_used_bytes=used,
        total_bytes=meminfo.get("MemTotal"),
    )


def _text(path: Path) -> str:
    """The file's text, "" when there is none or the kernel refuses it."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _pressure(text: str) -> dict[str, float]:
    """`some avg10=0.12 avg60=… avg300=… total=…` by its first word."""
    found = {}
    for line in text.splitlines():
        kind, _, rest = line.partition(" ")
        for field in rest.split():
            name, _, value = field.partition("=")
            try:
                if name == "avg10":
                    found[kind] = float(value)
            except ValueError:  # not the form known: the number is left out
                continue
    return found


def _meminfo(text: str) -> dict[str, int]:
    """`MemAvailable:   24385776 kB` in bytes, by name."""
    found = {}
    for line in text.splitlines():
        name, _, value = line.partition(":")
        words = value.split()
        if len(words) == 2 and words[0].isdecimal() and words[1] == "kB":
            found[name] = int(words[0]) * KIB
    return found


def _tightest(root: Path) -> tuple[int | None, int | None]:
    """(limit, use) of the group with the least left, among the process's own and all above it; Nones without a limit."""
    found = [pair for directory, v2 in _groups(root) if (pair := _limit_and_use(directory, v2=v2)) is not None]
    return min(found, key=lambda pair: pair[0] - pair[1], default=(None, None))


def _groups(root: Path) -> Iterator[tuple[Path, bool]]:
    """Directories of the process's memory groups, innermost first, and whether each is of version 2.

    In a container the path may be the host's while only the group itself is mounted; the mount's top is then what counts,
    and it is always among these.
    """
    mount = root / "sys/fs/cgroup"
    for line in _text(root / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            tops, v2 = [mount, mount / "unified"], True
        elif "memory" in controllers.split(","):
            tops, v2 = [mount / "memory"], False
        else:
            continue
        parts = PurePosixPath(path.lstrip("/"))
        inner = [] if ".." in parts.parts else [parts, *parts.parents]  # ".." leads out of what is mounted here
        for top in tops:
            for group in inner or [PurePosixPath()]:
                yield top / group, v2


def _limit_and_use(directory: Path, *, v2: bool) -> tuple[int, int] | None:
    limit = _number(directory / ("memory.max" if v2 else "memory.limit_in_bytes"))
    used = _number(directory / ("memory.current" if v2 else "memory.usage_in_bytes"))
    if limit is None or used is None or limit >= UNLIMITED_BYTES:
        return None
    wanted = "inactive_file" if v2 else "total_inactive_file"
    for line in _text(directory / "memory.stat").splitlines():
        name, _, value = line.partition(" ")
        if name == wanted and value.isdecimal():
            used -= int(value)
    return limit, max(used, 0)


def _number(path: Path) -> int | None:
    """A file that holds one number; "max" and anything else is None."""
    text = _text(path).strip()
    return int(text) if text.isdecimal() else None
