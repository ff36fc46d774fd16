"""Run a long build with its progress on one line: `build_progress.py LOG COMMAND…`.

The whole output goes to LOG. What is shown is the last step the build's own counter named ("[12/193]" by ninja, "[ 6%]"
by make): rewritten in place on a terminal, a line about every 10 % elsewhere. When the command fails, the end of the
log is shown and its exit status is passed on. Standard library only: it runs before anything is installed.
"""

import re
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TextIO

NINJA_STEP = re.compile(r"^\s*\[(\d+)/(\d+)\]")
BUILD_BEGINS = re.compile(r"^\s*Building wheel for ")
MAKE_STEP = re.compile(r"^\s*\[\s*(\d+)%\]")
NOT_TTY_STEP_PERCENT = 10
TAIL_LINES = 40
TAIL_LINE_CHARS = 240  # a compiler's command line is longer than a screen

NOTICE = (
    "llama.cpp is compiled once for this machine: 5 to 12 minutes on 2 cores. Later runs, and other environments of\n"
    "this user, take the compiled package from pip's cache."
)


def percent(line: str) -> int | None:
    """How far the build is according to this line of its output, 0 to 100, or None when it does not say."""
    if found := NINJA_STEP.match(line):
        done, total = int(found[1]), int(found[2])
        return 100 * done // total if total else None
    if found := MAKE_STEP.match(line):
        return int(found[1])
    return None


def milestones(lines: Iterable[str], step: int) -> Iterator[int | None]:
    """For each line the percentage to show, or None: rising only, each at least `step` after the one before."""
    shown = -step
    for line in lines:
        now = percent(line)
        if now is not None and (now >= shown + step or (now == 100 and shown < 100)):
            shown = now
            yield now
        else:
            yield None


def tail(lines: Iterable[str]) -> str:
    """The last lines, each cut to a readable length."""
    return "\n".join(line.rstrip()[:TAIL_LINE_CHARS] for line in deque(lines, maxlen=TAIL_LINES))


def run(log: Path, command: list[str]) -> int:
    """Run `command`, show its progress, return its exit status."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with (
        log.open("w", encoding="utf-8") as file,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8", errors="replace"
        ) as process,
    ):
        assert process.stdout is not None
        show(logged(process.stdout, file), on_tty=sys.stdout.isatty())
    if process.returncode != 0:
        with log.open(encoding="utf-8") as file:
            print(f"{tail(file)}\n\nThe build failed; above is the end of {log}.", file=sys.stderr)
    return process.returncode


def logged(lines: Iterable[str], log: TextIO) -> Iterator[str]:
    """The lines, each written to the log, and the notice shown when pip begins to build."""
    noticed = False
    for line in lines:
        log.write(line)
        if BUILD_BEGINS.match(line) and not noticed:
            noticed = True
            print(f"{NOTICE}\nFull log: {log.name}", flush=True)
        yield line


def show(lines: Iterable[str], *, on_tty: bool) -> None:
    """Print the milestones: in place on a terminal, one to a line elsewhere."""
    started = time.monotonic()
    in_place = False
    for now in milestones(lines, 1 if on_tty else NOT_TTY_STEP_PERCENT):
        if now is not None:
            elapsed_s = int(time.monotonic() - started)
            text = f"compiling llama.cpp: {now:3d} %, {elapsed_s // 60}:{elapsed_s % 60:02d} min"
            print(f"\r{text}" if on_tty else text, end="" if on_tty else "\n", flush=True)
            in_place = on_tty
    if in_place:
        print()


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit("usage: build_progress.py LOG COMMAND…")
    sys.exit(run(Path(sys.argv[1]), sys.argv[2:]))
