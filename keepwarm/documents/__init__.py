"""Files to text, in a process of their own: a document is hostile input until it has been read.

    __init__.py   what is asked of that process and what it answers; which media types there are
    extraction.py starts it, feeds it, ends it: the gateway's side
    worker.py     the process: loads the libraries, gives up its rights, reads one document, answers, ends
    confine.py    giving up rights: memory, CPU time, files, processes, the network
    plain.py      bytes to text, in any common encoding
    office.py     HTML, PDF and the Office formats to Markdown, by markitdown

A document that is broken, encrypted, too large or out to do harm fails alone, with a `DocumentFault` that says what it
was. Extraction is a function of the bytes: the same file gives the same text, so the same prefix.
"""

import re
import struct
from enum import Enum

import msgspec
from msgspec import Struct

MEDIA_TYPE = re.compile(r"\s*([\w.+-]+/[\w.+-]+)\s*(?:;(.*))?", re.DOTALL)
CHARSET = re.compile(r"(?:^|;)\s*charset\s*=\s*\"?([\w.:-]{1,40})\"?\s*(?:;|$)", re.IGNORECASE)
READY = b"+"  # the process has loaded what it needs; what it says from here on is about the document
LENGTH = struct.Struct("<I")  # of the order, which goes ahead of the document
OOXML = "application/vnd.openxmlformats-officedocument"


class Kind(Enum):
    """How a document is read. The value is what people call it."""

    TEXT = "plain text"
    HTML = "HTML"
    PDF = "PDF"
    DOCX = "DOCX"
    PPTX = "PPTX"
    XLSX = "XLSX"


KINDS = {
    "application/pdf": Kind.PDF,
    "application/x-pdf": Kind.PDF,
    "text/html": Kind.HTML,
    "application/xhtml+xml": Kind.HTML,
    f"{OOXML}.wordprocessingml.document": Kind.DOCX,
    f"{OOXML}.presentationml.presentation": Kind.PPTX,
    f"{OOXML}.spreadsheetml.sheet": Kind.XLSX,
    "application/json": Kind.TEXT,
    "application/x-ndjson": Kind.TEXT,
    "application/xml": Kind.TEXT,
    "application/yaml": Kind.TEXT,
    "application/x-yaml": Kind.TEXT,
    "application/toml": Kind.TEXT,
    "application/javascript": Kind.TEXT,
}
NO_TEXT = frozenset({"text/rtf"})  # named text, but a format of its own


class DocumentFault(Exception):
    """The document cannot be read. The message goes on from "the document": "is encrypted"."""


class Order(Struct, frozen=True):
    """What the process is to do; the document's bytes follow it. The limits are `Limits.document_…`."""

    kind: Kind
    charset: str | None
    chars_max: int
    cpu_s_max: float
    memory_bytes_max: int


class Extracted(Struct, frozen=True, tag="extracted"):
    """The document's text."""

    text: str


class Refused(Struct, frozen=True, tag="refused"):
    """Why there is none, as a `DocumentFault` says it."""

    why: str


Answer = Extracted | Refused


def framed(order: Order) -> bytes:
    """The order as it goes ahead of the document."""
    body = msgspec.msgpack.encode(order)
    return LENGTH.pack(len(body)) + body


def kind_of(media_type: str) -> tuple[Kind, str | None]:
    """How a document of this type is read, and the charset that the type names. Raises DocumentFault."""
    found = MEDIA_TYPE.fullmatch(media_type)
    if found is None:
        raise DocumentFault("has no media type like application/pdf")
    name = found[1].lower()
    kind = KINDS.get(name)
    if kind is None and name.startswith("text/") and name not in NO_TEXT:
        kind = Kind.TEXT
    if kind is None:
        readable = "PDF, DOCX, PPTX, XLSX, HTML, and text of any kind"
        raise DocumentFault(f"is of the media type {name[:100]}, which is not read here; what is: {readable}")
    charset = CHARSET.search(found[2] or "")
    return kind, charset[1] if charset is not None else None
