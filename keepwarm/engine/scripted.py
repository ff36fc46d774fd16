"""A model without weights: deterministic, exact, fast to load; for tests, and for measuring everything but llama.cpp.

It stands below the same scheduler, store and layout as llama.cpp, and it is as picky: a cell's value depends on all
tokens before it *and on how they were cut into ubatches*, with a granularity of its own, on rows evaluated alone, and on
decoding alone or in company. So every rule of chunks.py that is broken changes its answers. Text is UTF-8 bytes as tokens,
answers are lower-case letters and spaces drawn from a hash of the last cell.
"""

from collections.abc import Sequence

import numpy as np
from blake3 import blake3
from msgspec.structs import replace
from numpy.typing import NDArray

from keepwarm.core.prompt import Tokens
from keepwarm.core.request import Sampling
from keepwarm.engine import SpecialToken
from keepwarm.engine.layout import Assembler, Layout, block_views, parse
from keepwarm.engine.model import Blob, DecodeStep, GrammarFault, ModelFault

N_CTX = 8192
IM_START, IM_END, END_OF_TEXT = 256, 257, 258
N_VOCAB = 259
ODD = np.uint64(0x9E3779B97F4A7C15)  # multiplier of the chain; odd, so it can be inverted modulo 2**64
ODD_INVERSE = np.uint64(pow(0x9E3779B97F4A7C15, -1, 1 << 64))
LETTERS = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz ", np.uint8)
MEAN_ANSWER = 32  # tokens; one state in so many ends the answer
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LAYOUT = Layout(
    magic=0x6B776D31, version=1, n_stream=8, n_layer=2, k_type=0, k_row=8, v_type=0, v_trans=True, v_rows=4, v_bytes=2
)

BYTES = 256


class ScriptedVocab:
    """Bytes as tokens, and three control tokens (`keepwarm.engine.Tokenizer`)."""

    bos = None
    chat_template = TEMPLATE
    specials = (
        SpecialToken("<|im_start|>", IM_START),
        SpecialToken("<|im_end|>", IM_END),
        SpecialToken("<|endoftext|>", END_OF_TEXT),
    )

    def special_text(self, name: str) -> str:
        return {"bos": "", "eos": "<|im_end|>"}[name]

    def encode_plain(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def piece(self, token: int) -> bytes:
        return bytes([token]) if token < BYTES else b""


class ScriptedModel:
    """A chain of 64-bit values, one a cell (`keepwarm.engine.model.Model`). `granularity` is the one its bits have.

    With `forgets` it is like a model with a recurrent state: the saved state is the last value alone, nothing can be cut out
    of it, and dropping a part of a stream is refused without a word.
    """

    def __init__(
        self,
        *,
        n_streams: int = 8,
        n_ctx: int = N_CTX,
        n_ubatch: int = 512,
        granularity: int = 1,
        forgets: bool = False,
    ) -> None:
        self.forgets = forgets
        self.n_streams, self.n_ctx, self.n_ubatch, self.n_vocab = n_streams, n_ctx, n_ubatch, N_VOCAB
        self.granularity = granularity
        self._layout = replace(LAYOUT, n_stream=n_streams)
        self._cells = np.zeros((n_streams, n_ctx), np.uint64)
        self._used = np.zeros((n_streams, n_ctx), np.bool_)
        self._blob = np.zeros(self._layout.blob_bytes(n_ctx), np.uint8)
        self._assembler = Assembler(self._layout, n_ctx, self._blob)
        self._rows: list[np.uint64] = []
        self.n_evaluated = 0

    def evaluate(self, stream: int, tokens: Tokens, pos: int, *, want_logits: bool) -> None:
        n = len(tokens)
        assert 0 < n <= self.n_ubatch
        full = n - n % self.granularity
        group = np.where(np.arange(n) < full, self.granularity, n % self.granularity)
        if n == 1:
            group[:] = 1 << 20  # a row alone runs other code
        within = np.where(np.arange(n) < full, np.arange(n) % self.granularity, np.arange(n) - full)
        self._extend(stream, tokens, pos, group.astype(np.uint64) << np.uint64(8) | within.astype(np.uint64))
        self.n_evaluated += n
        self._rows = [self._cells[stream, pos + n - 1]] if want_logits else []

    def _extend(self, stream: int, tokens: Tokens, pos: int, how: NDArray[np.uint64]) -> None:
        n = len(tokens)
        n_before = int(self._used[stream].sum()) if not self.forgets else self.n_held(stream)
        if pos + n > self.n_ctx or n_before != pos or self.n_held(stream) != pos:
            raise ModelFault(f"stream {stream} does not hold exactly the {pos} tokens before this")
        with np.errstate(over="ignore"):
            before = self._cells[stream, pos - 1] if pos else np.uint64(0)
            mixed = (tokens.astype(np.uint64) + np.uint64(1)) * (how + np.uint64(3)) + np.arange(
                pos, pos + n, dtype=np.uint64
            )
            powers = np.full(n, ODD, np.uint64).cumprod()  # ODD**1 .. ODD**n
            inverse = np.full(n, ODD_INVERSE, np.uint64).cumprod()
            self._cells[stream, pos : pos + n] = powers * (before + (mixed * inverse).cumsum())
        self._used[stream, pos : pos + n] = True

    def decode(self, steps: Sequence[DecodeStep]) -> None:
        streams = {step.stream for step in steps}
        assert len(streams) == len(steps)
        rows = []
        for step in steps:
            in_company = step.stream - 1 in streams or step.stream + 1 in streams
            how = np.array([(2 if in_company else 1) << 24], np.uint64)
            self._extend(step.stream, np.array([step.token], np.int32), step.pos, how)
            rows.append(self._cells[step.stream, step.pos])
        self._rows = rows

    def logits(self, row: int) -> NDArray[np.float32]:
        state = self._rows[row]
        raw = np.frombuffer(blake3(state.tobytes()).digest(length=N_VOCAB), np.uint8).astype(np.float32) * np.float32(
            1 / 64
        )
        raw[LETTERS] += 8
        if int(state >> np.uint64(17)) % MEAN_ANSWER == 0:
            raw[IM_END] += 32
        return raw

    def sampler(self, sampling: Sampling, grammar: str | None, seed: int) -> "ScriptedSampler":
        if grammar is not None:
            raise GrammarFault("the scripted model knows no grammars")
        return ScriptedSampler(self, sampling, seed)

    def piece(self, token: int) -> bytes:
        return bytes([token]) if token < IM_START else b""

    def is_end(self, token: int) -> bool:
        return token in (IM_END, END_OF_TEXT)

    def forget(self, stream: int, start: int, end: int) -> None:
        if self.forgets and (start > 0 or end >= 0):
            return
        self._used[stream, start : None if end < 0 else end] = False

    def n_held(self, stream: int) -> int:
        used = np.flatnonzero(self._used[stream])
        return int(used[-1]) + 1 if len(used) else 0

    def save(self, stream: int) -> Blob:
        if self.forgets:
            return self._save_last(stream)
        positions = np.flatnonzero(self._used[stream]).astype(np.int32)
        values = self._cells[stream, positions]
        n = len(positions)
        block = np.empty(n * self._layout.cell_bytes, np.uint8)
        k, v = block_views(self._layout, block, n)
        as_bytes = values.view(np.uint8).reshape(n, 8)
        k[0], k[1] = as_bytes, ~as_bytes
        v[:] = as_bytes.reshape(n, 4, 2).transpose(1, 0, 2)
        blob = self._assembler.blob([(block, n)], n)
        parse(blob).positions[:] = positions
        return blob

    def _save_last(self, stream: int) -> Blob:
        """What a recurrent model has: the last value, where it stands, and a sum over both."""
        n = self.n_held(stream)
        last = self._cells[stream, n - 1] if n else np.uint64(0)
        body = np.array([n, last], np.uint64).tobytes()
        return np.frombuffer(body + blake3(body).digest(length=8), np.uint8).copy()

    def _load_last(self, stream: int, blob: Blob) -> None:
        body = blob[:16].tobytes()
        if len(blob) != 24 or blake3(body).digest(length=8) != blob[16:].tobytes():
            raise ModelFault("state is torn")
        n, last = (int(value) for value in np.frombuffer(body, np.uint64))
        self._used[stream] = False
        if n:
            self._cells[stream, n - 1], self._used[stream, n - 1] = last, True

    def load(self, stream: int, blob: Blob) -> None:
        if self.forgets:
            self._load_last(stream, blob)
            return
        cells = parse(blob)
        k, v = cells.k, cells.v
        whole = (k[0] == ~k[1]).all() and (v == k[0].reshape(-1, 4, 2).transpose(1, 0, 2)).all()
        if cells.layout != self._layout or not whole:
            raise ModelFault("state is torn")
        self._used[stream] = False
        self._cells[stream, cells.positions] = np.ascontiguousarray(k[0]).view(np.uint64)[:, 0]
        self._used[stream, cells.positions] = True


class ScriptedSampler:
    """Greedy at temperature 0, otherwise a draw from the softmax with its own seeded generator."""

    def __init__(self, model: ScriptedModel, sampling: Sampling, seed: int) -> None:
        self._model, self._sampling = model, sampling
        self._random = np.random.Generator(np.random.PCG64(seed))

    def sample(self, row: int) -> int:
        logits = self._model.logits(row)
        if self._sampling.temperature <= 0:
            return int(logits.argmax())
        weights = np.exp((logits - logits.max()).astype(np.float64) / self._sampling.temperature)
        return int(self._random.choice(len(weights), p=weights / weights.sum()))

    def close(self) -> None:
        """Nothing is held."""
