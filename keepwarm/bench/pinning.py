"""Processor affinity: the gateway alone on one core, so that what it does is what one core can do."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil


@contextmanager
def pinned(server_pid: int) -> Iterator[str]:
    """Put the server's process on one core and its children and us on another; yields what was done, in words.

    Our own threads are put back at the end. Threads and processes made later inherit their maker's core.
    """
    if sys.platform != "linux":
        yield "not pinned: this system has no sched_setaffinity"
        return
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        yield "not pinned: one core only"
        return
    own, others = cores[0], cores[1]
    _put(server_pid, {own})
    for child in psutil.Process(server_pid).children(recursive=True):
        _put(child.pid, {others})
    _put(os.getpid(), {others})
    try:
        yield f"gateway on core {own}; engine and client on core {others}"
    finally:
        _put(os.getpid(), set(cores))


def _put(pid: int, cores: set[int]) -> None:
    """All threads of a process."""
    if sys.platform == "linux":
        for thread in Path(f"/proc/{pid}/task").iterdir():
            try:
                os.sched_setaffinity(int(thread.name), cores)
            except ProcessLookupError:  # a thread that has just ended
                continue
