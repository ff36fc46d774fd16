"""Prompts as the server builds them: the same messages, template, token ids and ubatches, for the baseline to evaluate."""

from collections.abc import Sequence

from msgspec import Struct

from keepwarm.cache.render import Templating
from keepwarm.config import Config
from keepwarm.core.prompt import Prompt, common_prefix
from keepwarm.core.request import Message, TextPart, ToolChoice
from keepwarm.engine import ModelInfo, Tokenizer
from keepwarm.engine.chunks import level_rows, next_rows, pieces

TENANT = "bench"
FRAGMENT_CACHE_BYTES = 1 << 20


class Ask(Struct, frozen=True):
    """A conversation of one question: the context, by value or by a cache object of `object_tokens` tokens, and the rest."""

    context: str
    question: str
    object_id: str | None = None
    object_tokens: int | None = None

    def messages(self) -> list[dict[str, str]]:
        """As a client sends them."""
        if self.object_id is not None:
            context = {"role": "cache", "content": f"cache_id={self.object_id}"}
        else:
            context = {"role": "system", "content": self.context}
        return [context, {"role": "user", "content": self.question}]


class Stored(Struct, frozen=True):
    """A context that is a cache object."""

    context: str
    object_id: str
    n_tokens: int

    def ask(self, question: str) -> Ask:
        """A question behind it."""
        return Ask(self.context, question, self.object_id, self.n_tokens)


class Prompts:
    """Builds them for one loaded model."""

    def __init__(self, tokenizer: Tokenizer, config: Config, model: ModelInfo) -> None:
        self._tokenizer = tokenizer
        self._templating = Templating(tokenizer, fragment_cache_bytes=FRAGMENT_CACHE_BYTES)
        self._granularity = model.granularity or 1
        self.n_ubatch = config.model.n_ubatch

    def count(self, text: str) -> int:
        """Tokens of plain text."""
        return len(self._tokenizer.encode_plain(text))

    def prompt(self, ask: Ask) -> Prompt:
        """The tokens that the server evaluates or restores for `ask`."""
        messages = (Message("system", (TextPart(ask.context),)), Message("user", (TextPart(ask.question),)))
        return self._templating.build(TENANT, messages, (), ToolChoice(), object_tokens=ask.object_tokens).prompt

    def rows(self, prompt: Prompt, start: int) -> list[int]:
        """The ubatches in which the server evaluates the prompt from `start` on when nobody else is there."""
        parts, pos, rows = pieces(prompt.n_tokens, prompt.marks, self._granularity), start, []
        while pos < prompt.n_tokens:
            rows_max = level_rows(pos, prompt.n_tokens, self.n_ubatch)
            rows.append(next_rows(pos, parts, self._granularity, rows_max))
            pos += rows[-1]
        return rows


def n_shared(prompts: Sequence[Prompt]) -> int:
    """How many tokens all the prompts begin with in common."""
    first = prompts[0].tokens
    return min(common_prefix(first, prompt.tokens) for prompt in prompts)
