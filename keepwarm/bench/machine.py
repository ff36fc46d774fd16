"""What a run was measured on and with."""

import os
import platform
from importlib.metadata import version

import psutil
from msgspec import Struct

from keepwarm import __version__
from keepwarm.engine.prepare import cpu_name


class Machine(Struct, frozen=True):
    """The machine as the system describes it."""

    cpu: str
    n_cores: int
    ram_bytes: int
    kernel: str


class Versions(Struct, frozen=True):
    """What was measured."""

    keepwarm: str
    llama_cpp_python: str
    python: str


def this_machine() -> Machine:
    n_cores = os.cpu_count() or 1
    return Machine(cpu_name(), n_cores, psutil.virtual_memory().total, f"{platform.system()} {platform.release()}")


def these_versions() -> Versions:
    return Versions(__version__, version("llama-cpp-python"), platform.python_version())
