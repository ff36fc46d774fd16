"""Who may have a document read when: a process for each, so many at once, and one always left to the other tenants.

Documents that take all the time they are given hold up their own tenant's only. It makes no difference whether a document
came with a request or was uploaded before: the same bytes of the same type give the same text.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Generic, TypeVar

from keepwarm.config import Limits, document_environment
from keepwarm.documents import Order, kind_of
from keepwarm.documents.extraction import Document, extract

K = TypeVar("K")
Extract = Callable[[Order, Document, float, Mapping[str, str]], Awaitable[str]]


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


class Reading:
    """Has documents read."""

    def __init__(self, limits: Limits = Limits(), extract_text: Extract = extract) -> None:
        """`extract_text` raises DocumentFault; any other exception is no fault of the document."""
        self._limits = limits
        self._extract = extract_text
        self._tenants = Places[str](max(1, limits.documents_at_once_max - 1))
        self._all = asyncio.Semaphore(limits.documents_at_once_max)

    def order(self, media_type: str) -> Order:
        """What is asked for a document of this type. Raises DocumentFault when there is no way to read one."""
        kind, charset = kind_of(media_type)
        limits = self._limits
        return Order(kind, charset, limits.document_chars_max, limits.document_s_max, limits.document_memory_bytes_max)

    async def text(self, tenant: str, order: Order, document: Document) -> str:
        """The document's text, read now. Raises DocumentFault, ReaderFault, OSError."""
        async with self._tenants.one(tenant), self._all:
            return await self._extract(order, document, self._limits.document_s_max, document_environment())
