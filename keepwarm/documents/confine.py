"""What the process that reads a document gives up before it looks at the first byte. Never given back: it ends with it.

Memory and CPU time are counted from here on, so that the libraries' own do not count: on a machine with many cores they
map much more. Files cannot be written, processes and threads not be started (the superuser's may). The network is given up
at the very start, while the process has one thread, and where the kernel lets it: with nothing to reach, a document that
refers to something outside finds nothing. The engine's threads come first: this process is nice.
"""

import ctypes
import math
import os
import resource
import signal
import sys
from pathlib import Path

PR_SET_PDEATHSIG = 1
CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
NICENESS = 10
FILES_MAX = 64  # the libraries read a few modules and tables of their own late
STATM = Path("/proc/self/statm")


def leave() -> None:
    """Leave the network, and end when the gateway ends. Linux only; elsewhere a lost process ends with its CPU time."""
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None, use_errno=True)
    libc.unshare(CLONE_NEWUSER | CLONE_NEWNET)  # refused in many containers: then the process only does not use it
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # after unshare, which clears it


def confine(memory_bytes_max: int, cpu_s_max: float) -> None:
    """Bound what the process may take from now on."""
    os.nice(NICENESS)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    cpu_s = math.ceil(usage.ru_utime + usage.ru_stime + cpu_s_max)
    _bound(
        resource.RLIMIT_CPU, cpu_s, cpu_s + 1
    )  # the soft limit's signal ends the process, the hard one's cannot be kept off
    _bound(resource.RLIMIT_FSIZE, 0)
    _bound(resource.RLIMIT_CORE, 0)
    _bound(resource.RLIMIT_NOFILE, FILES_MAX)
    _bound(resource.RLIMIT_NPROC, 0)
    if sys.platform == "linux":  # no other system both tells what is mapped and keeps the limit
        mapped = int(STATM.read_text(encoding="ascii").split()[0]) * resource.getpagesize()
        _bound(resource.RLIMIT_AS, mapped + memory_bytes_max)


def _bound(what: int, soft: int, hard: int | None = None) -> None:
    """A limit can be lowered by anyone, never raised: one that is lower already stays."""
    _, is_hard = resource.getrlimit(what)
    if is_hard == resource.RLIM_INFINITY:
        is_hard = max(soft, hard or 0)
    resource.setrlimit(what, (min(soft, is_hard), min(hard or soft, is_hard)))
