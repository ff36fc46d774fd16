"""Keeps llama.cpp off Intel's AMX tiles, whose use crashes the pinned version on many virtual machines.

llama.cpp's AMX matrix product loads its tile configuration from the stack, where the compiler may drop the stores; the
process then dies by a general protection fault in the first evaluation (ggml-org/llama.cpp#20824 and #26954,
ollama/ollama#17249). The library asks the kernel for the tiles at start (`arch_prctl(ARCH_REQ_XCOMP_PERM)`) and uses its
other kernels when refused, so a seccomp filter in the engine's process refuses just that call.
"""

import ctypes
import platform
import struct
import sys

AUDIT_ARCH_X86_64 = 0xC000003E
SYS_ARCH_PRCTL = 158
ARCH_REQ_XCOMP_PERM = 0x1023
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2
RET_ALLOW, RET_EPERM = 0x7FFF0000, 0x00050000 | 1
LOAD, JUMP_EQUAL, RETURN = 0x20, 0x15, 0x06  # classic BPF: ld [k], jeq k, ret k
OFFSET_NR, OFFSET_ARCH, OFFSET_ARG0 = 0, 4, 16  # in struct seccomp_data


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("code", ctypes.c_void_p))


def _filter() -> bytes:
    """arch is x86-64 and the call is arch_prctl(ARCH_REQ_XCOMP_PERM): EPERM; anything else: allowed."""
    steps = (
        (LOAD, 0, 0, OFFSET_ARCH),
        (JUMP_EQUAL, 0, 5, AUDIT_ARCH_X86_64),
        (LOAD, 0, 0, OFFSET_NR),
        (JUMP_EQUAL, 0, 3, SYS_ARCH_PRCTL),
        (LOAD, 0, 0, OFFSET_ARG0),
        (JUMP_EQUAL, 0, 1, ARCH_REQ_XCOMP_PERM),
        (RETURN, 0, 0, RET_EPERM),
        (RETURN, 0, 0, RET_ALLOW),
    )
    return b"".join(struct.pack("HBBI", *step) for step in steps)


def refuse_tiles() -> bool:
    """Refuse AMX tiles to this process and its threads from now on; call before llama.cpp is initialised.

    Returns whether the filter is in place: False on other systems, or where the kernel has no seccomp (a process that
    then uses AMX is no worse off than without this call).
    """
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return False
    code = ctypes.create_string_buffer(_filter())
    program = _Program(len(_filter()) // 8, ctypes.addressof(code))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        return False
    return bool(libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(program)) == 0)
