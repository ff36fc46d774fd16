"""Files in a request become text before anything is rendered; the same file gives the same text, so the same prefix.

A document is hostile input: it is read in a process of its own within `Limits.document_…` (keepwarm/documents), and one
that is broken or out to do harm fails alone, as an ApiError that names its place in the body. Texts read lately are kept,
by tenant, type and digest of the bytes, so that a conversation that repeats its document has it read once. Who waits for
a process (gateway/reading.py) waits no longer than the turn may take.

A file that was uploaded before has been read already; it stands in the prompt just as a document that came with the
request would, so the way it came makes no other prefix.
"""

import asyncio
import sys
from collections import OrderedDict
from typing import Protocol

from blake3 import blake3
from msgspec.structs import replace

from keepwarm.config import Limits
from keepwarm.core.document import document_text
from keepwarm.core.errors import ApiError, ErrorKind
from keepwarm.core.file import StoredFile, unknown_file
from keepwarm.core.request import ChatRequest, DocumentPart, FilePart, Message, Part, TextPart
from keepwarm.documents import DocumentFault, Order
from keepwarm.gateway.reading import Places, Reading

HASHED_INLINE_BYTES_MAX = 1 << 20  # a millisecond; more is hashed on a thread
ENTRY_BYTES = 256  # key, dict slot and string header of one text, roughly


class FileTexts(Protocol):
    """Where uploaded files are."""

    async def active(self, tenant: str, file_id: str, *, param: str | None = None) -> StoredFile:
        """Raises ApiError: UNKNOWN_FILE, INVALID_REQUEST when it cannot be used (yet)."""
        ...

    async def text_of(self, file: StoredFile) -> str:
        """The text of an active file. Raises ApiError(UNKNOWN_FILE)."""
        ...


class Documents:
    """Reads the document and file parts of requests."""

    def __init__(
        self, limits: Limits = Limits(), reading: Reading | None = None, files: FileTexts | None = None
    ) -> None:
        """`files` None: no file is known."""
        self._limits = limits
        self._reading = Reading(limits) if reading is None else reading
        self._files = files
        self._texts = TextCache(limits.document_cache_bytes)
        self._same = Places[bytes](1)  # by key: nobody else reads the same document meanwhile

    async def read(self, request: ChatRequest, tenant: str = "") -> ChatRequest:
        """The request with a text part in place of each document and file.

        Raises ApiError: INVALID_REQUEST, UNKNOWN_FILE.
        """
        messages = await self.read_messages(request.messages, tenant)
        return request if messages is request.messages else replace(request, messages=messages)

    async def read_messages(self, messages: tuple[Message, ...], tenant: str) -> tuple[Message, ...]:
        """As `read`; the same messages when there is nothing to read in them."""
        if not any(isinstance(part, DocumentPart | FilePart) for message in messages for part in message.parts):
            return messages
        read: list[Message] = []
        n_chars = 0
        for message in messages:
            parts: list[Part] = []
            for part in message.parts:
                if isinstance(part, TextPart):
                    parts.append(part)
                    continue
                if isinstance(part, DocumentPart):
                    title, context, text = part.title, part.context, await self._text(tenant, part)
                else:
                    title, context, text = await self._file_text(tenant, part)
                n_chars += len(text)
                self._check_total(part, n_chars)
                parts.append(TextPart(document_text(title, context, text), part.mark))
            read.append(replace(message, parts=tuple(parts)))
        return tuple(read)

    async def _text(self, tenant: str, part: DocumentPart) -> str:
        """The text of one document: from the cache, or read now, by one reader however many wait for it."""
        n_bytes, limit = len(part.data), self._limits.document_bytes_max
        if n_bytes > limit:
            raise _refused(part, f"has {n_bytes:,} bytes, limit {limit:,} (document_bytes_max)")
        try:
            order = self._reading.order(part.media_type)
            key = await self._key(tenant, order, part.data)
            async with self._same.one(key):
                text = self._texts.get(key)
                if text is None:
                    text = await self._reading.text(tenant, order, part.data)
                    self._texts.put(key, text)
        except DocumentFault as fault:
            raise _refused(part, str(fault)) from fault
        return text

    async def _file_text(self, tenant: str, part: FilePart) -> tuple[str | None, None, str]:
        """Title, no context, and text of an uploaded file. Whether it is there is asked every time, its text read once."""
        if self._files is None:
            raise unknown_file(part.file_id, part.param)
        file = await self._files.active(tenant, part.file_id, param=part.param)
        key = f"file\0{file.key}".encode()
        async with self._same.one(key):
            text = self._texts.get(key)
            if text is None:
                text = await self._files.text_of(file)
                self._texts.put(key, text)
        return file.title, None, text

    def _check_total(self, part: DocumentPart | FilePart, n_chars: int) -> None:
        """Small files can hold long texts, and a request can repeat one many times."""
        limit = self._limits.document_chars_max
        if n_chars > limit:
            message = f"the documents up to this one have {n_chars:,} characters of text, limit {limit:,}"
            raise ApiError(ErrorKind.INVALID_REQUEST, f"{message} (document_chars_max)", param=part.param)

    async def _key(self, tenant: str, order: Order, data: bytes) -> bytes:
        """By tenant, since how long a document takes must not tell another that it was seen before."""
        head = f"{tenant}\0{order.kind.name}\0{order.charset}\0".encode()

        def digest() -> bytes:
            return blake3(data, key=blake3(head).digest()).digest()

        return digest() if len(data) <= HASHED_INLINE_BYTES_MAX else await asyncio.to_thread(digest)


class TextCache:
    """Texts by key, least recently used out first, bounded in bytes."""

    def __init__(self, bytes_max: int) -> None:
        self.bytes_max = bytes_max
        self.n_bytes = 0
        self._texts: OrderedDict[bytes, str] = OrderedDict()

    def __len__(self) -> int:
        return len(self._texts)

    def get(self, key: bytes) -> str | None:
        text = self._texts.get(key)
        if text is not None:
            self._texts.move_to_end(key)
        return text

    def put(self, key: bytes, text: str) -> None:
        """Keep `text`, unless it alone is more than the cache may hold. The key must be new."""
        n_bytes = _kept_bytes(text)
        if n_bytes > self.bytes_max:
            return
        assert key not in self._texts
        self._texts[key] = text
        self.n_bytes += n_bytes
        while self.n_bytes > self.bytes_max:
            _, old = self._texts.popitem(last=False)
            self.n_bytes -= _kept_bytes(old)


def _kept_bytes(text: str) -> int:
    return sys.getsizeof(text) + ENTRY_BYTES


def _refused(part: DocumentPart, why: str) -> ApiError:
    return ApiError(ErrorKind.INVALID_REQUEST, f"the document {why}", param=part.param)
