"""Files in a request become text before anything is rendered; the same file gives the same text, so the same prefix.

A document is hostile input: it is read in a process of its own within `Limits.document_…` (keepwarm/documents), and one
that is broken or out to do harm fails alone, as an ApiError that names its place in the body. Texts read lately are kept,
by tenant, type and digest of the bytes, so that a conversation that repeats its document has it read once. Who waits for
a process waits no longer than the turn may take, and one is always left to the other tenants: documents that take all the
time they are given hold up their own tenant's only.
"""

import asyncio
import sys
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Generic, TypeVar

from blake3 import blake3
from msgspec.structs import replace

from keepwarm.config import Limits, document_environment
from keepwarm.core.document import document_text
from keepwarm.core.errors import ApiError, ErrorKind
from keepwarm.core.request import ChatRequest, DocumentPart, Message, Part, TextPart
from keepwarm.documents import DocumentFault, Order, kind_of
from keepwarm.documents.extraction import extract

HASHED_INLINE_BYTES_MAX = 1 << 20  # a millisecond; more is hashed on a thread
ENTRY_BYTES = 256  # key, dict slot and string header of one text, roughly
K = TypeVar("K")
Extract = Callable[[Order, bytes, float, Mapping[str, str]], Awaitable[str]]


class Documents:
    """Reads the document parts of requests."""

    def __init__(self, limits: Limits = Limits(), extract_text: Extract = extract) -> None:
        """`extract_text` raises DocumentFault; any other exception is no fault of the document."""
        self._limits = limits
        self._extract = extract_text
        self._texts = TextCache(limits.document_cache_bytes)
        self._same = Places[bytes](1)  # by key: nobody else reads the same document meanwhile
        self._tenants = Places[str](max(1, limits.documents_at_once_max - 1))
        self._all = asyncio.Semaphore(limits.documents_at_once_max)

    async def read(self, request: ChatRequest, tenant: str = "") -> ChatRequest:
        """The request with a text part in place of each document. Raises ApiError(INVALID_REQUEST)."""
        if not any(isinstance(part, DocumentPart) for message in request.messages for part in message.parts):
            return request
        messages: list[Message] = []
        n_chars = 0
        for message in request.messages:
            parts: list[Part] = []
            for part in message.parts:
                if isinstance(part, DocumentPart):
                    text = await self._text(tenant, part)
                    n_chars += len(text)
                    self._check_total(part, n_chars)
                    parts.append(TextPart(document_text(part.title, part.context, text), part.mark))
                else:
                    parts.append(part)
            messages.append(replace(message, parts=tuple(parts)))
        return replace(request, messages=tuple(messages))

    async def _text(self, tenant: str, part: DocumentPart) -> str:
        """The text of one document: from the cache, or read now, by one reader however many wait for it."""
        n_bytes, limit = len(part.data), self._limits.document_bytes_max
        if n_bytes > limit:
            raise _refused(part, f"has {n_bytes:,} bytes, limit {limit:,} (document_bytes_max)")
        try:
            kind, charset = kind_of(part.media_type)
            order = Order(
                kind,
                charset,
                self._limits.document_chars_max,
                self._limits.document_s_max,
                self._limits.document_memory_bytes_max,
            )
            key = await self._key(tenant, order, part.data)
            async with self._same.one(key):
                text = self._texts.get(key)
                if text is None:
                    async with self._tenants.one(tenant), self._all:
                        text = await self._extract(
                            order, part.data, self._limits.document_s_max, document_environment()
                        )
                    self._texts.put(key, text)
        except DocumentFault as fault:
            raise _refused(part, str(fault)) from fault
        return text

    def _check_total(self, part: DocumentPart, n_chars: int) -> None:
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


class Places(Generic[K]):
    """So many places for each key. What a key takes here is kept while somebody holds or waits for one of its places."""

    def __init__(self, n_places: int) -> None:
        self._n_places = n_places
        self._kept: dict[K, tuple[asyncio.Semaphore, int]] = {}  # with how many hold or wait

    def __len__(self) -> int:
        return len(self._kept)

    @asynccontextmanager
    async def one(self, key: K) -> AsyncIterator[None]:
        """One of the key's places, in the order of asking."""
        places, n_users = self._kept.get(key) or (asyncio.Semaphore(self._n_places), 0)
        self._kept[key] = places, n_users + 1
        try:
            async with places:
                yield
        finally:
            _, n_users = self._kept.pop(key)
            if n_users > 1:
                self._kept[key] = places, n_users - 1


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
