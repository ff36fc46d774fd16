"""The process: `python -m keepwarm.documents.worker`. One order and one document on stdin, one answer on stdout, the end.

It loads what reading needs, writes `READY`, gives up its rights (confine.py), and only then looks at the document. So a
process that ends before `READY` is our fault, one that ends after it the document's.
"""

import importlib
import os
import sys
from typing import BinaryIO

import msgspec

from keepwarm.documents import LENGTH, READY, Answer, DocumentFault, Extracted, Kind, Order, Refused
from keepwarm.documents.confine import confine, leave
from keepwarm.documents.plain import clean, decode


def main() -> None:
    """Read one document."""
    leave()
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer
    order, data = receive(sys.stdin.buffer)
    if order.kind is not Kind.TEXT:
        importlib.import_module("keepwarm.documents.office")  # two seconds, which plain text need not wait for
    out.write(READY)
    out.flush()
    confine(order.memory_bytes_max, order.cpu_s_max)
    out.write(msgspec.msgpack.encode(answer(order, data)))
    out.flush()
    os._exit(0)  # nothing is left to tidy up, and tidying up a hundred megabytes of objects takes time


def receive(source: BinaryIO) -> tuple[Order, bytes]:
    """The order, behind its length, and the document, up to the end."""
    (n,) = LENGTH.unpack(source.read(LENGTH.size))
    return msgspec.msgpack.decode(source.read(n), type=Order), source.read()


def answer(order: Order, data: bytes) -> Answer:
    """What the document says, or why not."""
    try:
        text = clean(_extract(order, data))
    except DocumentFault as fault:
        return Refused(str(fault))
    except MemoryError:
        return Refused(
            f"takes more than {order.memory_bytes_max:,} bytes of memory to read (document_memory_bytes_max)"
        )
    except Exception:  # noqa: BLE001 - the document's boundary: whatever a library says of a broken file, it is broken
        return Refused(f"cannot be read as {order.kind.value}: it is broken, or of another type")
    if len(text) > order.chars_max:
        return Refused(f"has {len(text):,} characters of text, limit {order.chars_max:,} (document_chars_max)")
    return Extracted(text)


def _extract(order: Order, data: bytes) -> str:
    if order.kind is Kind.TEXT:
        return decode(data, order.charset)
    return str(importlib.import_module("keepwarm.documents.office").extract(order, data))


if __name__ == "__main__":
    main()
