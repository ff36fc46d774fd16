"""Google's two SDKs, imported without the warnings they give about their own and Python's age."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import httpx2  # the HTTP client of google-genai

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import google.ai.generativelanguage as glm
    import google.generativeai as generativeai
    from google import genai
    from google.api_core import exceptions, rest_streaming
    from google.generativeai import caching
    from google.generativeai import client as generativeai_client


@contextmanager
def google_client(answer: Callable[[httpx2.Request], httpx2.Response]) -> Iterator[genai.Client]:
    """google-genai's client, its calls answered by `answer` and not tried again."""
    with httpx2.Client(transport=httpx2.MockTransport(answer)) as http:
        options = genai.types.HttpOptions(
            base_url="http://127.0.0.1", httpx_client=http, retry_options=genai.types.HttpRetryOptions(attempts=1)
        )
        yield genai.Client(api_key="k", http_options=options)


__all__ = [
    "caching",
    "exceptions",
    "genai",
    "generativeai",
    "generativeai_client",
    "glm",
    "google_client",
    "rest_streaming",
]
