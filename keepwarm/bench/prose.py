"""English text of any length, made of the documentation's sentences in an order drawn from a seed. Pure."""

import re
from collections.abc import Callable, Iterator

import numpy as np

CODE = re.compile(r"```.*?```|<!--.*?-->", re.DOTALL)
SENTENCE_END = re.compile(r"(?<=[.:;!?])\s+")
MARKUP = re.compile(r"\[([^\]]*)\]\([^)]*\)|[`*_#>|]+")
SENTENCE_CHARS_MIN = 25  # headings and crumbs of tables say nothing

CountTokens = Callable[[str], int]


class Prose:
    """A source of text. `count_tokens` must not shrink when text is added."""

    def __init__(self, document: str, count_tokens: CountTokens) -> None:
        self._sentences = sentences(document)
        self._count_tokens = count_tokens

    def passage(self, seed: int, n_tokens: int) -> str:
        """Begins like no other seed's, so nothing of it is cached; the longest run of words with at most `n_tokens` tokens."""
        words = self._words(seed)
        text: list[str] = [f"Collection {seed}."]
        while self._count_tokens(" ".join(text)) <= n_tokens:
            text.extend(next(words) for _ in range(max(1, len(text))))
        fits, too_long = 1, len(text)
        while too_long - fits > 1:
            middle = (fits + too_long) // 2
            if self._count_tokens(" ".join(text[:middle])) <= n_tokens:
                fits = middle
            else:
                too_long = middle
        return " ".join(text[:fits])

    def question(self, seed: int, n_tokens: int) -> str:
        """About `n_tokens` tokens, different from the first one on for different seeds."""
        words = self._words(seed)
        text = f"{seed}"
        while self._count_tokens(longer := f"{text} {next(words)}") <= n_tokens:
            text = longer
        return text

    def _words(self, seed: int) -> Iterator[str]:
        order = np.random.default_rng(seed)
        while True:
            for i in order.permutation(len(self._sentences)):
                yield from self._sentences[i].split()


def sentences(document: str) -> list[str]:
    """The sentences of a Markdown document, without code and markup; each one once, in order."""
    plain = MARKUP.sub(lambda found: found[1] or " ", CODE.sub(" ", document))
    parts = (" ".join(part.split()) for line in plain.split("\n\n") for part in SENTENCE_END.split(line))
    return list(dict.fromkeys(part for part in parts if len(part) >= SENTENCE_CHARS_MIN))
