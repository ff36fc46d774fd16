"""The baseline's process, `python -m keepwarm.bench.raw`: questions on stdin, times on stdout (raw_frames.py).

Every call goes through the binding straight to llama.cpp: no scheduler, no store, no events, no HTTP. The model is the
server's: the same prepared file, context, streams, ubatch, threads and attention. It computes only while it is asked.
"""

import sys
from collections.abc import Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from keepwarm.bench.raw_frames import Base, Cold, DecodeAll, Follow, Load, Loaded, Question, Took, Warm, encoded
from keepwarm.core.clock import Clock, SystemClock
from keepwarm.core.request import Sampling
from keepwarm.engine.model import Blob, DecodeStep, Model
from keepwarm.engine.prepare import prepare

GREEDY = Sampling(temperature=0.0)


class Raw:
    """A model and the one state that is kept of it."""

    def __init__(self, model: Model, clock: Clock) -> None:
        self._model, self._clock = model, clock
        self._samplers = [model.sampler(GREEDY, None, 0) for _ in range(model.n_streams)]
        self._base: tuple[int, Blob] | None = None
        self._cut: tuple[int, Blob] | None = None  # the base's first tokens, as asked for last

    def answer(self, question: Cold | Base | Warm | DecodeAll) -> Took:
        """Do it and say how long it took."""
        match question:
            case Cold(tokens, rows):
                return self._cold(tokens, rows)
            case Base(tokens, rows):
                took = self._cold(tokens, rows)
                self._base, self._cut = (len(tokens), self._model.save(0).copy()), None
                return took
            case Warm(n_cached, tokens, rows):
                return self._warm(n_cached, tokens, rows)
            case DecodeAll(follows, strict):
                return self._decode_all(follows, strict=strict)

    def _now_ms(self) -> float:
        return self._clock.monotonic() * 1000

    def _cold(self, tokens: list[int], rows: list[int]) -> Took:
        self._model.forget(0, 0, -1)
        prompt = np.array(tokens, np.int32)
        begin = self._now_ms()
        self._evaluate(0, prompt, 0, rows)
        self._samplers[0].sample(-1)
        return Took(self._now_ms() - begin)

    def _warm(self, n_cached: int, tokens: list[int], rows: list[int]) -> Took:
        state = self._state(n_cached)
        prompt = np.array(tokens, np.int32)
        begin = self._now_ms()
        if state is not None:
            self._model.load(0, state)
        restored = self._now_ms()
        self._evaluate(0, prompt, n_cached, rows)
        evaluated = self._now_ms()
        self._samplers[0].sample(-1)
        n_bytes = None if state is None else len(state)
        return Took(self._now_ms() - begin, restored - begin, evaluated - restored, n_bytes)

    def _decode_all(self, follows: Sequence[Follow], *, strict: bool) -> Took:
        token, pos = [], []
        states = [self._state(follow.n_cached) for follow in follows]  # all first: making one empties stream 0
        for stream, (follow, state) in enumerate(zip(follows, states, strict=True)):
            if state is not None:
                self._model.load(stream, state)
            self._evaluate(stream, np.array(follow.tokens, np.int32), follow.n_cached, follow.rows)
            token.append(self._samplers[stream].sample(-1))
            pos.append(follow.n_cached + len(follow.tokens))
        begin = self._now_ms()
        for i in range(max(follow.n_steps for follow in follows)):
            running = [stream for stream, follow in enumerate(follows) if i < follow.n_steps]
            for together in [[stream] for stream in running] if strict else [running]:
                self._model.decode([DecodeStep(stream, token[stream], pos[stream]) for stream in together])
                for row, stream in enumerate(together):
                    token[stream] = self._samplers[stream].sample(row)
                    pos[stream] += 1
        took = Took(self._now_ms() - begin)
        for stream in range(len(follows)):
            self._model.forget(stream, 0, -1)
        return took

    def _evaluate(self, stream: int, tokens: NDArray[np.int32], pos: int, rows: Sequence[int]) -> None:
        assert sum(rows) == len(tokens)
        at = 0
        for n in rows:
            last = at + n == len(tokens)
            self._model.evaluate(stream, tokens[at : at + n], pos + at, want_logits=last)
            at += n

    def _state(self, n_tokens: int) -> Blob | None:
        """The kept state of the first `n_tokens` tokens; stream 0 is empty afterwards. Not part of any time."""
        self._model.forget(0, 0, -1)
        if n_tokens == 0:
            return None
        if self._cut is None or self._cut[0] != n_tokens:
            assert self._base is not None and self._base[0] >= n_tokens
            self._model.load(0, self._base[1])
            self._model.forget(0, n_tokens, -1)
            self._cut = n_tokens, self._model.save(0).copy()
            self._model.forget(0, 0, -1)
        return self._cut[1]


def main() -> None:
    """Answer until stdin ends."""
    clock = SystemClock()
    raw: Raw | None = None
    for line in sys.stdin.buffer:
        question: Question = msgspec.json.decode(line, type=Question)
        if isinstance(question, Load):
            prepared = prepare(question.config, clock, lambda _line: None)
            model = prepared.model
            raw = Raw(model, clock)
            answer: Loaded | Took = Loaded(prepared.digest, prepared.attention, model.n_ctx, model.n_streams)
        else:
            assert raw is not None
            answer = raw.answer(question)
        sys.stdout.buffer.write(encoded(answer))
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
