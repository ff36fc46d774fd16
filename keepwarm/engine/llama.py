"""llama.cpp through llama-cpp-python's low-level API: the only file that knows it. No policy, no JSON but the schema call.

Streams are separate buffers (`kv_unified = False`) because with a unified buffer logits depend on which cells a sequence
got. A failed assertion in llama.cpp ends the process, so the model lives in the engine's process; the gateway opens the
vocabulary only.
"""

import ctypes
import json
from collections.abc import Sequence
from pathlib import Path

import llama_cpp as lc
import numpy as np
from llama_cpp.llama_grammar import SchemaConverter
from numpy.typing import NDArray

from keepwarm.core.prompt import Tokens
from keepwarm.core.request import Sampling
from keepwarm.engine import SpecialToken, window
from keepwarm.engine.amx import refuse_tiles
from keepwarm.engine.memory import touched
from keepwarm.engine.model import Blob, DecodeStep, GrammarFault, KvType, ModelFault
from keepwarm.engine.segments import MARKERS

VERSION = lc.__version__
WEIGHT_TYPES = {  # names llama.cpp uses in model descriptions -> ftype for llama_model_quantize
    "Q4_0": lc.LLAMA_FTYPE_MOSTLY_Q4_0,
    "Q4_1": lc.LLAMA_FTYPE_MOSTLY_Q4_1,
    "Q8_0": lc.LLAMA_FTYPE_MOSTLY_Q8_0,
    "Q4_K_M": lc.LLAMA_FTYPE_MOSTLY_Q4_K_M,
    "BF16": lc.LLAMA_FTYPE_MOSTLY_BF16,
}
KV_TYPES: dict[KvType, int] = {  # GGML's numbers
    "f16": lc.GGML_TYPE_F16,
    "bf16": 30,  # GGML_TYPE_BF16, which the binding does not name
    "f32": lc.GGML_TYPE_F32,
    "q8_0": lc.GGML_TYPE_Q8_0,
    "q4_0": lc.GGML_TYPE_Q4_0,
}
FLASH_ONLY: tuple[KvType, ...] = ("q8_0", "q4_0")  # plain attention reads V by columns, which quantised rows have not
BLOB_SLACK = 1 << 20  # the state's headers beside the cells' bytes: a few bytes a layer and cell
PIECE_BYTES = 256
PENALTY_TOKENS = 1 << 20  # penalties look at the whole answer, however long


@lc.llama_log_callback  # type: ignore[untyped-decorator]
def _log(level: int, text: bytes, user_data: object) -> None:
    """Swallows llama.cpp's own log: what matters is reported by return codes."""


def init_backend() -> None:
    """Once per process that computes, before anything else here."""
    refuse_tiles()
    lc.llama_log_set(_log, ctypes.c_void_p(0))
    lc.llama_backend_init()


class _EscapingConverter(SchemaConverter):
    """The packaged converter leaves backslashes in literals as they are, which llama.cpp's grammar parser refuses."""

    def _format_literal(self, literal: str) -> str:
        return str(super()._format_literal(literal.replace("\\", "\\\\")))  # type: ignore[no-untyped-call]


def json_schema_to_gbnf(schema: str) -> str:
    """GBNF for a JSON Schema (JSON text); the start rule is "root". Raises ValueError. References are never fetched."""
    try:
        converter = _EscapingConverter(prop_order={}, allow_fetch=False, dotall=False, raw_pattern=False)  # type: ignore[no-untyped-call]
        converter.visit(converter.resolve_refs(json.loads(schema), "schema"), "")  # type: ignore[no-untyped-call]
        return str(converter.format_grammar())  # type: ignore[no-untyped-call]
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError, RecursionError, IndexError) as exc:
        raise ValueError(f"this JSON Schema cannot be turned into a grammar: {type(exc).__name__}: {exc}") from exc


def quantize(source: Path, target: Path, weight_type: str, n_threads: int) -> None:
    """Write `source` re-quantised to `weight_type` into `target`. Raises ModelFault, KeyError for an unknown type."""
    params = lc.llama_model_quantize_default_params()
    params.ftype = WEIGHT_TYPES[weight_type]
    params.allow_requantize = True
    params.nthread = n_threads
    status = lc.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params))
    if status != 0:
        raise ModelFault(f"llama.cpp could not write {source.name} as {weight_type} (status {status})")


class Vocab:
    """A model's vocabulary and chat template (`keepwarm.engine.Tokenizer`). Thread-safe: llama.cpp only reads it."""

    def __init__(self, model: int, *, owns: bool) -> None:
        self._model, self._owns = model, owns
        self._vocab = lc.llama_model_get_vocab(model)
        self.n_vocab = int(lc.llama_vocab_n_tokens(self._vocab))
        self.specials = tuple(self._read_specials())
        bos = int(lc.llama_vocab_bos(self._vocab))
        self.bos = bos if bos >= 0 and lc.llama_vocab_get_add_bos(self._vocab) else None
        template = lc.llama_model_chat_template(model, None)
        self.chat_template = template.decode("utf-8", "replace") if template else ""

    @classmethod
    def open(cls, path: Path) -> "Vocab":
        """Load the vocabulary of a GGUF file without its weights. Raises ModelFault."""
        lc.llama_log_set(_log, ctypes.c_void_p(0))
        params = lc.llama_model_default_params()
        params.vocab_only = True
        model = lc.llama_model_load_from_file(str(path).encode(), params)
        if not model:
            raise ModelFault(f"llama.cpp cannot read {path}: is it a GGUF model file?")
        return cls(model, owns=True)

    def close(self) -> None:
        """Free the vocabulary."""
        if self._owns and self._model:
            lc.llama_model_free(self._model)
            self._model = 0

    def special_text(self, name: str) -> str:
        token = {"bos": lc.llama_vocab_bos, "eos": lc.llama_vocab_eos}[name](self._vocab)
        return self.text(int(token)) if token >= 0 else ""

    def text(self, token: int) -> str:
        """The vocabulary's own spelling of a token."""
        raw = lc.llama_vocab_get_text(self._vocab, token)
        return raw.decode("utf-8", "replace") if raw else ""

    def encode_plain(self, text: str) -> list[int]:
        return [int(token) for token in self.encode(text, parse_special=False)]

    def encode(self, text: str, *, parse_special: bool) -> Tokens:
        """Token ids, shape (n_tokens,), without BOS."""
        raw = text.encode("utf-8")
        room = len(raw) + 8
        ids = np.empty(room, np.int32)
        pointer = ids.ctypes.data_as(ctypes.POINTER(lc.llama_token))
        n = lc.llama_tokenize(self._vocab, raw, len(raw), pointer, room, False, parse_special)
        if n < 0:  # a vocabulary that makes more tokens than bytes
            room = -n
            ids = np.empty(room, np.int32)
            pointer = ids.ctypes.data_as(ctypes.POINTER(lc.llama_token))
            n = lc.llama_tokenize(self._vocab, raw, len(raw), pointer, room, False, parse_special)
        return ids[:n].copy()

    def piece(self, token: int) -> bytes:
        """The token's bytes, b"" for control tokens."""
        buffer = ctypes.create_string_buffer(PIECE_BYTES)
        n = lc.llama_token_to_piece(self._vocab, token, buffer, PIECE_BYTES, 0, False)
        if n < 0:
            buffer = ctypes.create_string_buffer(-n)
            n = lc.llama_token_to_piece(self._vocab, token, buffer, -n, 0, False)
        return buffer.raw[:n]

    def is_end(self, token: int) -> bool:
        """Whether the token ends an answer (end of text, of turn, of message)."""
        return bool(lc.llama_vocab_is_eog(self._vocab, token))

    def _read_specials(self) -> list[SpecialToken]:
        found = []
        wanted = lc.LLAMA_TOKEN_ATTR_CONTROL | lc.LLAMA_TOKEN_ATTR_USER_DEFINED | lc.LLAMA_TOKEN_ATTR_UNKNOWN
        for token in range(self.n_vocab):
            attributes = int(lc.llama_vocab_get_attr(self._vocab, token))
            if attributes & wanted and (text := self.text(token)):
                found.append(
                    SpecialToken(
                        text,
                        token,
                        bool(attributes & lc.LLAMA_TOKEN_ATTR_LSTRIP),
                        bool(attributes & lc.LLAMA_TOKEN_ATTR_RSTRIP),
                    )
                )
        return found


class LlamaModel:
    """A model in memory with a context of `n_streams` streams (`keepwarm.engine.model.Model`)."""

    def __init__(
        self,
        path: Path,
        *,
        n_ctx: int | None,
        n_streams: int,
        n_ubatch: int,
        n_threads: int,
        flash: bool,
        kv_type: KvType = "f16",
    ) -> None:
        if kv_type in FLASH_ONLY and not flash:
            raise ModelFault(f"a KV cache of {kv_type} needs flash attention: set model.attention to flash or auto")
        self._model = lc.llama_model_load_from_file(str(path).encode(), lc.llama_model_default_params())
        if not self._model:
            raise ModelFault(f"llama.cpp cannot load {path}: is it a GGUF model file, whole and readable?")
        self.vocab = Vocab(self._model, owns=False)
        self.n_vocab = self.vocab.n_vocab
        self.n_ctx = min(n_ctx or 1 << 30, int(lc.llama_model_n_ctx_train(self._model)))
        self.n_streams, self.n_ubatch, self.flash = n_streams, n_ubatch, flash
        params = lc.llama_context_default_params()
        params.n_ctx, params.n_seq_max = self.n_ctx * n_streams, n_streams
        params.n_batch = params.n_ubatch = n_ubatch
        params.n_threads = params.n_threads_batch = n_threads
        params.flash_attn_type = 1 if flash else 0
        params.kv_unified, params.swa_full, params.no_perf = False, True, True
        params.type_k = params.type_v = KV_TYPES[kv_type]
        self._context = lc.llama_init_from_model(self._model, params)
        if not self._context:
            raise ModelFault(
                f"no context of {n_streams} streams of {self.n_ctx} tokens with a KV cache of {kv_type}: "
                "too little memory, or this model's rows do not fit the type; set model.n_streams, n_ctx or kv_type"
            )
        self._memory = lc.llama_get_memory(self._context)
        self._pieces: dict[int, bytes] = {}
        self._scratch = self._unwindowed = np.empty(0, np.uint8)
        self._init_batch()

    @property
    def weights(self) -> str:
        """llama.cpp's description of the weights, such as "llama 135M Q4_0"."""
        buffer = ctypes.create_string_buffer(256)
        lc.llama_model_desc(self._model, buffer, 256)
        return buffer.value.decode("utf-8", "replace")

    @property
    def forgets(self) -> bool:
        """Whether some layers keep less than all tokens, by the model's own word: a sliding window, a recurrent state.

        Such a state cannot be cut, and llama.cpp does not say so when asked to drop a part of it.
        """
        recurrent = lc.llama_model_is_recurrent(self._model) or lc.llama_model_is_hybrid(self._model)
        return self.n_window > 0 or bool(recurrent)

    @property
    def n_window(self) -> int:
        """Tokens a sliding window reaches back; 0 when no layer has one."""
        return int(lc.llama_model_n_swa(self._model))

    def kq_buffer_bytes(self, n_ctx: int | None) -> int:
        """What plain attention needs for its KQ matrix at `n_ctx` tokens (None: the trained context), in bytes."""
        n_tokens = min(n_ctx or 1 << 30, int(lc.llama_model_n_ctx_train(self._model)))
        return self.n_ubatch * n_tokens * int(lc.llama_model_n_head(self._model)) * 4

    def close(self) -> None:
        """Free the context and the weights."""
        lc.llama_free(self._context)
        lc.llama_model_free(self._model)

    def _init_batch(self) -> None:
        n = max(self.n_ubatch, self.n_streams)
        self._token, self._pos = np.zeros(n, np.int32), np.zeros(n, np.int32)
        self._n_seq_id, self._wanted = np.ones(n, np.int32), np.zeros(n, np.int8)
        self._stream_ids = np.arange(self.n_streams, dtype=np.int32)
        first = self._stream_ids.ctypes.data
        self._stream_address = np.array([first + 4 * s for s in range(self.n_streams)], np.uint64)
        self._seq_id = np.full(n, first, np.uint64)
        p32 = ctypes.POINTER(ctypes.c_int32)
        self._batch = lc.llama_batch(
            n_tokens=0,
            token=self._token.ctypes.data_as(p32),
            embd=None,
            pos=self._pos.ctypes.data_as(p32),
            n_seq_id=self._n_seq_id.ctypes.data_as(p32),
            seq_id=ctypes.cast(self._seq_id.ctypes.data, ctypes.POINTER(p32)),
            logits=self._wanted.ctypes.data_as(ctypes.POINTER(ctypes.c_int8)),
        )

    def _run(self, n: int) -> None:
        self._batch.n_tokens = n
        status = lc.llama_decode(self._context, self._batch)
        if status != 0:
            raise ModelFault(f"llama_decode of {n} tokens failed with status {status}")

    def evaluate(self, stream: int, tokens: Tokens, pos: int, *, want_logits: bool) -> None:
        n = len(tokens)
        assert 0 < n <= self.n_ubatch, n
        self._token[:n] = tokens
        self._pos[:n] = np.arange(pos, pos + n, dtype=np.int32)
        self._seq_id[:n] = self._stream_address[stream]
        self._wanted[:n] = 0
        self._wanted[n - 1] = want_logits
        self._run(n)

    def decode(self, steps: Sequence[DecodeStep]) -> None:
        for i, step in enumerate(steps):
            self._token[i], self._pos[i] = step.token, step.pos
            self._seq_id[i] = self._stream_address[step.stream]
        self._wanted[: len(steps)] = 1
        self._run(len(steps))

    def logits(self, row: int) -> NDArray[np.float32]:
        return np.ctypeslib.as_array(lc.llama_get_logits_ith(self._context, row), shape=(self.n_vocab,))

    def sampler(self, sampling: Sampling, grammar: str | None, seed: int) -> "LlamaSampler":
        return LlamaSampler(self, self._context, sampling, grammar, seed)

    def piece(self, token: int) -> bytes:
        known = self._pieces.get(token)
        if known is None:  # bounded by the vocabulary
            text = self.vocab.text(token)  # markers of calls and thoughts are control tokens in some vocabularies
            known = self._pieces[token] = text.encode() if text in MARKERS else self.vocab.piece(token)
        return known

    def is_end(self, token: int) -> bool:
        return self.vocab.is_end(token)

    def forget(self, stream: int, start: int, end: int) -> None:
        lc.llama_memory_seq_rm(self._memory, stream, start, end)

    def n_held(self, stream: int) -> int:
        return int(lc.llama_memory_seq_pos_max(self._memory, stream)) + 1

    def save(self, stream: int) -> Blob:
        n = int(lc.llama_state_seq_get_size(self._context, stream))
        if n > len(self._scratch):
            self._scratch = touched(n + BLOB_SLACK)
        pointer = self._scratch.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        written = int(lc.llama_state_seq_get_data(self._context, pointer, n, stream))
        if written != n:
            raise ModelFault(f"llama.cpp wrote {written} of {n} bytes of a stream's state")
        return self._scratch[:n]

    def load(self, stream: int, blob: Blob) -> None:
        self.forget(stream, 0, -1)
        if self.n_window and window.n_missing(blob):
            blob = self._padded(blob)
        pointer = blob.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        read = int(lc.llama_state_seq_set_data(self._context, pointer, len(blob), stream))
        if read != len(blob):
            raise ModelFault(f"llama.cpp took {read} of {len(blob)} bytes of a stored state")

    def _padded(self, blob: Blob) -> Blob:
        n = window.padded_bytes(blob)
        if n > len(self._unwindowed):
            self._unwindowed = touched(n + BLOB_SLACK)
        window.pad(blob, self._unwindowed[:n])
        return self._unwindowed[:n]


class LlamaSampler:
    """llama.cpp's sampler chain: logit bias, penalties, top-k, top-p, min-p, temperature, then greedy or random choice.

    Penalties count the answer's own tokens (OpenAI's "text so far"). A grammar is applied to the chosen token first and to
    the whole vocabulary only when that token is refused: the same answers, a fraction of the time.
    """

    def __init__(self, model: LlamaModel, context: int, sampling: Sampling, grammar: str | None, seed: int) -> None:
        self._model, self._context = model, context
        vocab = lc.llama_model_get_vocab(model._model)
        self._grammar = None
        if grammar is not None:
            self._grammar = lc.llama_sampler_init_grammar(vocab, grammar.encode(), b"root")
            if not self._grammar:
                raise GrammarFault("llama.cpp cannot read the grammar made from the schema")
        self._chain = lc.llama_sampler_chain_init(lc.llama_sampler_chain_default_params())
        for part in _chain_parts(model.n_vocab, sampling, seed):
            lc.llama_sampler_chain_add(self._chain, part)
        if self._grammar:
            self._candidates = np.zeros(model.n_vocab, np.dtype([("id", "i4"), ("logit", "f4"), ("p", "f4")]))

    def sample(self, row: int) -> int:
        if not self._grammar:
            return int(lc.llama_sampler_sample(self._chain, self._context, row))
        token = self._choose(row, constrained=False)
        if not self._allows(token):
            token = self._choose(row, constrained=True)
        lc.llama_sampler_accept(self._grammar, token)
        lc.llama_sampler_accept(self._chain, token)
        return token

    def _choose(self, row: int, *, constrained: bool) -> int:
        self._candidates["id"] = np.arange(self._model.n_vocab, dtype=np.int32)
        self._candidates["logit"] = self._model.logits(row)
        array = _candidate_array(self._candidates)
        if constrained:
            lc.llama_sampler_apply(self._grammar, ctypes.byref(array))
        lc.llama_sampler_apply(self._chain, ctypes.byref(array))
        return int(array.data[array.selected].id)

    def _allows(self, token: int) -> bool:
        one = np.zeros(1, self._candidates.dtype)
        one["id"], one["logit"] = token, 1.0
        lc.llama_sampler_apply(self._grammar, ctypes.byref(_candidate_array(one)))
        return bool(one["logit"][0] != -np.inf)

    def close(self) -> None:
        if self._chain:
            lc.llama_sampler_free(self._chain)
            self._chain = None
        if self._grammar:
            lc.llama_sampler_free(self._grammar)
            self._grammar = None


def _candidate_array(data: NDArray[np.void]) -> lc.llama_token_data_array:
    pointer = data.ctypes.data_as(ctypes.POINTER(lc.llama_token_data))
    return lc.llama_token_data_array(data=pointer, size=len(data), selected=-1, sorted=False)


def _chain_parts(n_vocab: int, sampling: Sampling, seed: int) -> list[int]:
    parts = []
    if sampling.logit_bias:
        entries = [lc.llama_logit_bias(token, bias) for token, bias in sampling.logit_bias]
        biases = (lc.llama_logit_bias * len(entries))(*entries)
        parts.append(lc.llama_sampler_init_logit_bias(n_vocab, len(biases), biases))
    if sampling.presence_penalty or sampling.frequency_penalty:
        parts.append(
            lc.llama_sampler_init_penalties(
                n_vocab, PENALTY_TOKENS, 1.0, sampling.frequency_penalty, sampling.presence_penalty
            )
        )
    if sampling.temperature <= 0.0:
        return [*parts, lc.llama_sampler_init_greedy()]
    if sampling.top_k > 0:
        parts.append(lc.llama_sampler_init_top_k(sampling.top_k))
    if sampling.top_p < 1.0:
        parts.append(lc.llama_sampler_init_top_p(sampling.top_p, 1))
    if sampling.min_p > 0.0:
        parts.append(lc.llama_sampler_init_min_p(sampling.min_p, 1))
    return [*parts, lc.llama_sampler_init_temp(sampling.temperature), lc.llama_sampler_init_dist(seed)]
