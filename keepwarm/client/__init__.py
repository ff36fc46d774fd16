"""The application's side: many questions over one body of knowledge, with Kimi's cache objects and the openai SDK.

`CacheBook` and `AsyncCacheBook` keep, in a SQLite file that all workers share, which cache object holds which knowledge;
they create, renew and replace objects, and hand back the messages to send. An application never meets an error of the
cache: where there is no usable object, the knowledge itself is sent.

Nothing of the server is imported here but the clock, so the kit works against any server with Kimi's caching API. It needs
the openai SDK: `pip install 'keepwarm[client]'`.
"""

from keepwarm.client.async_book import AsyncCacheBook
from keepwarm.client.book import CacheBook
from keepwarm.client.decision import Policy
from keepwarm.client.knowledge import Form, Knowledge, Sending

__all__ = ["AsyncCacheBook", "CacheBook", "Form", "Knowledge", "Policy", "Sending"]
