"""The model's own chat template, run in Jinja2's immutable sandbox.

As Hugging Face transformers runs it: `trim_blocks`, `lstrip_blocks`, break and continue, `raise_exception`, a `tojson`
that keeps characters as they are, `{% generation %}` ignored. One thing differs on purpose: there is no clock and no
chance, because a prompt that changes by itself is never found again. `strftime_now` is undefined where the template
tests for that (and then uses its own fixed date), else it gives "". `random` and `lipsum` do not exist.

Bounded per rendering: characters put out (`OUTPUT_CHARS_MIN` and eight times those that went in), look-ups, calls and
pieces of output (`STEPS_MAX`), each `range` (100,000, the sandbox's own limit). Not bounded: one that sets out to
exhaust memory, by doubling a string say, can. The file is the operator's choice; what clients send cannot change it.
"""

import json
import re
from collections.abc import Sequence
from typing import TypeAlias

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from keepwarm.core.errors import ApiError, ErrorKind

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"

OUTPUT_CHARS_MIN = 1024 * 1024  # room for a template's own words and default system message
OUTPUT_PER_INPUT = 8  # JSON escapes of control characters take six for one
STEPS_MAX = 1_000_000  # about a second; 4,096 messages with a hundred look-ups each stay below
CHATML = (  # llama.cpp's choice, too, for a model that brings no template
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_TESTS_CLOCK = re.compile(r"strftime_now\s+is\s+(not\s+)?defined")
_FAULTS = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)


class ChatTemplate:
    """A compiled template. Not thread-safe: rendering counts its steps in the environment."""

    def __init__(self, source: str, *, bos: str, eos: str) -> None:
        """Raises ValueError when `source` is not a template."""
        self._environment = _Sandbox(source)
        self._tokens = {"bos_token": bos, "eos_token": eos}
        try:
            self._template = self._environment.from_string(source)
        except jinja2.TemplateSyntaxError as exc:
            raise ValueError(f"the model's chat template is not valid Jinja, line {exc.lineno}: {exc.message}") from exc

    def render(
        self,
        messages: Sequence[Json],
        tools: Sequence[Json] | None,
        *,
        generate: bool,
        chars_in: int,
        thinking: bool | None = None,
    ) -> str:
        """The prompt's text. `chars_in` is the number of characters of client text, for the bound on the output.

        `thinking` is the template's `enable_thinking`; None leaves that undefined, for the template's own choice. Raises ApiError(INVALID_REQUEST) when the template refuses the messages or a bound is passed.
        """
        chars_max = OUTPUT_CHARS_MIN + OUTPUT_PER_INPUT * chars_in
        self._environment.steps_left = STEPS_MAX
        chosen = {} if thinking is None else {"enable_thinking": thinking}
        pieces, n_chars = [], 0
        try:
            for piece in self._template.generate(
                messages=messages, tools=tools, add_generation_prompt=generate, **self._tokens, **chosen
            ):
                self._environment.step()
                n_chars += len(piece)
                if n_chars > chars_max:
                    raise jinja2.TemplateRuntimeError(f"{chars_in:,} characters became more than {chars_max:,}")
                pieces.append(piece)
        except jinja2.TemplateError as exc:
            raise _refusal(str(exc.message or type(exc).__name__)) from exc
        except _FAULTS as exc:
            raise _refusal(f"{type(exc).__name__}: {exc}") from exc
        return "".join(pieces)


def dumps(value: Json, indent: int | None = None) -> str:
    """JSON text as templates write it: characters as they are, a space after comma and colon."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


class _GenerationTag(Extension):
    """{% generation %} marks the assistant's text for training; here it is only its content."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Sandbox(ImmutableSandboxedEnvironment):
    """The sandbox with a budget of steps."""

    def __init__(self, source: str) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, LoopControlExtension])
        self.steps_left = STEPS_MAX
        self.filters["tojson"] = _tojson
        del self.filters["random"], self.globals["lipsum"]
        self.globals["raise_exception"] = _raise_exception
        if not _TESTS_CLOCK.search(source):
            self.globals["strftime_now"] = _no_date

    def step(self) -> None:
        self.steps_left -= 1
        if self.steps_left < 0:
            raise jinja2.TemplateRuntimeError(f"more than {STEPS_MAX:,} steps")

    def getattr(self, obj: object, attribute: str) -> object:
        self.step()
        return super().getattr(obj, attribute)

    def getitem(self, obj: object, argument: object) -> object:
        self.step()
        return super().getitem(obj, argument)

    def call(self, context: Context, obj: object, *args: object, **kwargs: object) -> object:
        self.step()
        return super().call(context, obj, *args, **kwargs)


def _tojson(
    value: Json,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _no_date(_format: str) -> str:
    return ""


def _refusal(reason: str) -> ApiError:
    return ApiError(
        ErrorKind.INVALID_REQUEST, f"the model's chat template refuses these messages: {reason}", param="messages"
    )
