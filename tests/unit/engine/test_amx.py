"""The seccomp filter: the tiles are refused, and nothing else is."""

import platform
import subprocess
import sys

import pytest

from keepwarm.engine.amx import refuse_tiles

linux_x86_64 = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64", reason="the filter is for Linux on x86-64"
)

# In a process of its own: a filter cannot be taken off again.
PROGRAM = """
import ctypes, errno, os, threading
from keepwarm.engine.amx import refuse_tiles

ARCH_PRCTL, TILES = 158, 18
REQUEST, SUPPORTED, GET_FS = 0x1023, 0x1021, 0x1003
libc = ctypes.CDLL(None, use_errno=True)

def call(code, argument):
    ctypes.set_errno(0)
    return errno.errorcode.get(ctypes.get_errno()) if libc.syscall(ARCH_PRCTL, code, argument) else None

word = ctypes.c_ulong()
others_before = [call(SUPPORTED, ctypes.byref(word)), call(GET_FS, ctypes.byref(word)), call(0x7777, 0)]
print("in place" if refuse_tiles() else "no seccomp")
print(call(REQUEST, TILES))
seen = []
thread = threading.Thread(target=lambda: seen.append(call(REQUEST, TILES)))
thread.start(); thread.join()
print(seen[0])
child = os.fork()
if not child:
    os._exit(call(REQUEST, TILES) == "EPERM")
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
others = [call(SUPPORTED, ctypes.byref(word)), call(GET_FS, ctypes.byref(word)), call(0x7777, 0)]
print(others == others_before, others[1])
print(open(os.devnull).read() == "")
"""


@linux_x86_64
def test_tiles_are_refused_to_the_process_its_threads_and_children_and_nothing_else_is():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60, check=True)
    state, *lines = done.stdout.splitlines()
    if state == "no seccomp":
        pytest.skip("this kernel takes no seccomp filter")
    assert lines == ["EPERM", "EPERM", "1", "True None", "True"], done.stderr


@pytest.mark.parametrize("system, machine", [("darwin", "arm64"), ("darwin", "x86_64"), ("linux", "aarch64")])
def test_elsewhere_nothing_is_done(system, machine, monkeypatch):
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    assert refuse_tiles() is False
