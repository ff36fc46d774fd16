"""A documentation assistant in the terminal: reads a folder of Markdown, then answers questions about it.

    pip install 'keepwarm[client]'
    keepwarm serve --dev                     # in another terminal
    python examples/assistant.py docs/

The texts are one cache object; `keepwarm.client` makes it, keeps it alive while questions come, and makes a new one when a
text has changed. Works against any server with Kimi's caching API: --url, --model, and the key in OPENAI_API_KEY.
An empty line or the end of the input leaves; /new begins another conversation.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import openai

from keepwarm.client import CacheBook, Knowledge, Policy

INSTRUCTION = (
    "You answer questions about the documents below, briefly, and name the document. Say so if they do not tell."
)
OUTPUT_TOKENS_MAX = 400


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Answers questions about a folder of Markdown.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--url", default="http://127.0.0.1:8080/v1", help="the API, with /v1 (%(default)s)")
    parser.add_argument("--model", default="moonshot-v1-8k", help="answers (%(default)s)")
    parser.add_argument("--family", default="moonshot-v1", help="what cache objects are made for (%(default)s)")
    parser.add_argument("--book", type=Path, default=Path("assistant.sqlite3"), help="the cache book (%(default)s)")
    parser.add_argument("--ttl", type=int, default=3600, help="an object's lifetime after a question, seconds")
    parser.add_argument("--chars", type=int, default=20_000, help="most characters of documents (%(default)s)")
    return parser.parse_args()


def documents(folder: Path, chars_max: int) -> str:
    """The folder's Markdown in a fixed order, so that the same files give the same prompt. What does not fit is left out."""
    texts: list[str] = []
    room = chars_max
    for path in sorted(folder.rglob("*.md")):
        name = path.relative_to(folder).as_posix()
        text = f"## Document {name}\n\n{path.read_text(encoding='utf-8', errors='replace')}\n"
        if len(text) > room:
            print(f"left out, --chars is {chars_max:,}: {name}", file=sys.stderr)
            continue
        texts.append(text)
        room -= len(text)
    return "\n".join(texts)


def show(stream: openai.Stream[Any]) -> str:
    """Print an answer as it comes, then how much of the prompt came from the cache. Returns its text."""
    pieces: list[str] = []
    usage: dict[str, Any] = {}
    with stream:
        for chunk in stream:
            for choice in chunk.choices:
                pieces.append(choice.delta.content or "")
                print(pieces[-1], end="", flush=True)
                usage = (choice.model_extra or {}).get("usage") or usage  # Kimi's place for it
    print()
    if usage:
        print(f"[{usage.get('cached_tokens', 0):,} of {usage['prompt_tokens']:,} prompt tokens from the cache]")
    return "".join(pieces)


def talk(book: CacheBook, known: Knowledge, key: str, model: str) -> None:
    book.prepare(key, known)  # the object is computed while the first question is typed
    conversation: list[dict[str, str]] = []
    while question := read_question():
        if question == "/new":
            conversation = []
            continue
        asked = [*conversation, {"role": "user", "content": question}]
        try:
            stream = book.ask(key, known, asked, model=model, stream=True, max_tokens=OUTPUT_TOKENS_MAX)
            conversation = [*asked, {"role": "assistant", "content": show(stream)}]
        except openai.APIError as error:  # the question's own: too long, server down; never the cache's
            print(f"\n{error}", file=sys.stderr)


def read_question() -> str:
    try:
        return input("\n> ").strip()
    except (EOFError, KeyboardInterrupt):
        print()
        return ""


def main() -> None:
    given = options()
    text = documents(given.folder, given.chars)
    if not text:
        sys.exit(f"no Markdown in {given.folder}, or none that fits")
    known = Knowledge([{"role": "system", "content": f"{INSTRUCTION}\n\n{text}"}])
    with openai.OpenAI(base_url=given.url, api_key=os.environ.get("OPENAI_API_KEY", "sk-me")) as client:
        book = CacheBook(client, given.book, model=given.family, policy=Policy(ttl_s=given.ttl))
        talk(book, known, str(given.folder.resolve()), given.model)


if __name__ == "__main__":
    main()
