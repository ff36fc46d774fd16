"""Gemini's request bodies as types, and their way into the neutral request.

Decided here: what is accepted, ignored and refused. Unknown members are ignored, and so are those that ask for nothing a
server of one model could do otherwise (safetySettings, labels, serviceTier, mediaResolution, speechConfig). What asks for
something that cannot be done is refused by name. A last content of the role "model" is continued by the answer. Contents are
in gemini_content.py, functions and schemas in gemini_schema.py.
"""

import re
from typing import Annotated, Any

from msgspec import Meta, Struct
from msgspec.structs import replace

from keepwarm.core.errors import ApiError, ErrorKind
from keepwarm.core.request import (
    AnswerFormat,
    AnyJson,
    AnyText,
    CacheUse,
    ChatRequest,
    JsonSchema,
    Sampling,
)
from keepwarm.dialects import WireBounds
from keepwarm.dialects.body import invalid, json_text, quoted, require_at_most, require_stop_string
from keepwarm.dialects.gemini_content import MODALITIES, GeminiTurn, neutral_contents, system_message
from keepwarm.dialects.gemini_json import ProtoEnum
from keepwarm.dialects.gemini_model import MODEL_PREFIX, TEMPERATURE_MAX
from keepwarm.dialects.gemini_schema import GeminiTool, GeminiToolConfig, json_schema, neutral_tools
from keepwarm.dialects.openai_request import SEED_MAX

ANSWER_NAME = "answer"  # of a schema: Gemini's have none
MODEL_CHARS_MAX = 256  # echoed in every chunk
PENALTY_MAX = 2
JSON_TYPE = "application/json"
TEXT_TYPE = "text/plain"
CACHE_CONFLICT = (  # clients look for these words
    "CachedContent can not be used with GenerateContent request setting system_instruction, tools or tool_config.\n\n"
    "Proposed fix: move those values to CachedContent from GenerateContent request."
)

_CACHE_NAME = re.compile(r"cachedContents/(?P<id>[A-Za-z0-9_-]{1,128})", re.ASCII)


class Modality(ProtoEnum):
    """What an answer may consist of; this server's is text."""

    MODALITY_UNSPECIFIED = "MODALITY_UNSPECIFIED"
    TEXT = "TEXT"
    IMAGE = "IMAGE"
    AUDIO = "AUDIO"


class ThinkingConfig(Struct, rename="camel"):
    """A budget of 0 turns thinking off, -1 and none leave it to the model. `include_thoughts` tells them in the answer."""

    include_thoughts: bool | None = None
    thinking_budget: Annotated[int, Meta(ge=-1)] | None = None
    thinking_level: Any = None


class GenerationConfig(Struct, rename="camel"):
    """How the answer is made."""

    temperature: Annotated[float, Meta(ge=0, le=TEMPERATURE_MAX)] | None = None
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=0, le=1_000_000)] | None = None
    max_output_tokens: Annotated[int, Meta(ge=1)] | None = None
    stop_sequences: tuple[str, ...] | None = None
    candidate_count: Annotated[int, Meta(ge=1)] | None = None
    seed: Annotated[int, Meta(ge=-SEED_MAX, le=SEED_MAX)] | None = None
    presence_penalty: Annotated[float, Meta(ge=-PENALTY_MAX, le=PENALTY_MAX)] | None = None
    frequency_penalty: Annotated[float, Meta(ge=-PENALTY_MAX, le=PENALTY_MAX)] | None = None
    response_mime_type: str | None = None
    response_schema: dict[str, Any] | None = None
    response_json_schema: dict[str, Any] | None = None
    response_logprobs: bool | None = None
    logprobs: Annotated[int, Meta(ge=0)] | None = None
    response_modalities: tuple[Modality, ...] | None = None
    thinking_config: ThinkingConfig | None = None


class GenerateContentRequest(Struct, rename="camel"):
    """The body of POST /models/{model}:generateContent and :streamGenerateContent; the model is in the path."""

    contents: tuple[GeminiTurn, ...] | None = None
    system_instruction: GeminiTurn | None = None
    tools: tuple[GeminiTool, ...] | None = None
    tool_config: GeminiToolConfig | None = None
    generation_config: GenerationConfig | None = None
    cached_content: str | None = None
    model: str | None = None
    safety_settings: Any = None


class GeminiCountTokensRequest(Struct, rename="camel"):
    """The body of POST /models/{model}:countTokens: contents alone, or a whole request."""

    contents: tuple[GeminiTurn, ...] | None = None
    generate_content_request: GenerateContentRequest | None = None


def neutral_generate(body: GenerateContentRequest, model: str, bounds: WireBounds) -> ChatRequest:
    """The request for `model`, the name as it is in the path. Raises ApiError(INVALID_REQUEST)."""
    return _continued(_neutral(body, model, bounds))


def neutral_gemini_count(body: GeminiCountTokensRequest, model: str, bounds: WireBounds) -> ChatRequest:
    """The request whose prompt is to be counted. Raises ApiError(INVALID_REQUEST)."""
    inner = body.generate_content_request
    if inner is None:
        return _neutral(GenerateContentRequest(contents=body.contents), model, bounds)
    if body.contents:
        raise invalid("generateContentRequest", "and contents exclude each other")
    return _neutral(inner, model, bounds)


def _neutral(body: GenerateContentRequest, model: str, bounds: WireBounds) -> ChatRequest:
    if not body.contents:
        raise invalid("contents", "contents is not specified")
    cache = _cache_use(body)
    config = body.generation_config or GenerationConfig()
    tools, tool_choice = neutral_tools(body.tools or (), body.tool_config, bounds)
    return ChatRequest(
        model=_model(model),
        messages=(*system_message(body.system_instruction), *neutral_contents(body.contents, bounds)),
        tools=tools,
        tool_choice=tool_choice,
        sampling=_sampling(config),
        max_tokens=config.max_output_tokens,
        stop=_stop(config.stop_sequences or (), bounds),
        n=_n(config.candidate_count, bounds),
        top_logprobs=_top_logprobs(config, bounds),
        answer_format=_answer_format(config, bounds),
        cache=cache,
        thinking=_thinking(config.thinking_config),
    )


def _continued(request: ChatRequest) -> ChatRequest:
    last = request.messages[-1]
    if last.role != "assistant":
        return request
    if last.tool_calls:
        raise invalid(
            "contents", "the last one is continued, so it can hold no functionCall; send its functionResponse"
        )
    if not isinstance(request.answer_format, AnyText):
        raise invalid("generationConfig.responseMimeType", "a JSON format cannot go on from a content of the model's")
    return replace(request, messages=(*request.messages[:-1], replace(last, partial=True)))


def _model(name: str) -> str:
    model = name.removeprefix(MODEL_PREFIX)
    if not 0 < len(model) <= MODEL_CHARS_MAX:
        raise invalid("model", f"has {len(model):,} characters, from 1 to {MODEL_CHARS_MAX} are allowed")
    return model


def _cache_use(body: GenerateContentRequest) -> CacheUse | None:
    if not body.cached_content:
        return None
    if body.system_instruction is not None or body.tools or body.tool_config is not None:
        raise ApiError(ErrorKind.INVALID_REQUEST, CACHE_CONFLICT, param="cachedContent")
    found = _CACHE_NAME.fullmatch(body.cached_content)
    if found is None:
        raise invalid("cachedContent", f"{quoted(body.cached_content)} is not a name such as 'cachedContents/abc'")
    return CacheUse(object_id=found["id"], dialect="gemini")


def _sampling(config: GenerationConfig) -> Sampling:
    defaults = Sampling()
    return Sampling(
        temperature=defaults.temperature if config.temperature is None else config.temperature,
        top_p=defaults.top_p if config.top_p is None else config.top_p,
        top_k=defaults.top_k if config.top_k is None else config.top_k,
        seed=config.seed,
        presence_penalty=config.presence_penalty or 0.0,
        frequency_penalty=config.frequency_penalty or 0.0,
    )


def _stop(strings: tuple[str, ...], bounds: WireBounds) -> tuple[str, ...]:
    path = "generationConfig.stopSequences"
    require_at_most(strings, bounds.stop_strings_max, path, "strings")
    for i, string in enumerate(strings):
        require_stop_string(string, f"{path}[{i}]", bounds)
    return strings


def _n(n: int | None, bounds: WireBounds) -> int:
    if n is not None and n > bounds.choices_max:
        raise invalid("generationConfig.candidateCount", f"is {n:,}, at most {bounds.choices_max} are allowed")
    return 1 if n is None else n


def _top_logprobs(config: GenerationConfig, bounds: WireBounds) -> int | None:
    path = "generationConfig.logprobs"
    if not config.response_logprobs:
        if config.logprobs is not None:
            raise invalid(path, "needs responseLogprobs to be true")
        return None
    top = config.logprobs or 0
    if top > bounds.top_logprobs_max:
        raise invalid(path, f"is {top:,}, at most {bounds.top_logprobs_max} are allowed")
    return top


def _answer_format(config: GenerationConfig, bounds: WireBounds) -> AnswerFormat:
    path = "generationConfig"
    if any(
        modality not in (Modality.TEXT, Modality.MODALITY_UNSPECIFIED) for modality in config.response_modalities or ()
    ):
        raise invalid(f"{path}.responseModalities", f"the model's output modalities are {MODALITIES}")
    wanted = config.response_mime_type or TEXT_TYPE
    if wanted not in (TEXT_TYPE, JSON_TYPE):
        raise invalid(f"{path}.responseMimeType", f"{quoted(wanted)} is not one of {TEXT_TYPE}, {JSON_TYPE}")
    schema, free = config.response_schema, config.response_json_schema
    if schema is None and free is None:
        return AnyText() if wanted == TEXT_TYPE else AnyJson()
    if schema is not None and free is not None:
        raise invalid(f"{path}.responseJsonSchema", "and responseSchema exclude each other")
    if wanted != JSON_TYPE:
        raise invalid(f"{path}.responseMimeType", f"must be {JSON_TYPE} with a schema, not {wanted}")
    if schema is not None:
        return JsonSchema(ANSWER_NAME, json_schema(schema, f"{path}.responseSchema", bounds))
    assert free is not None
    return JsonSchema(ANSWER_NAME, json_text(free, f"{path}.responseJsonSchema", bounds))


def _thinking(config: ThinkingConfig | None) -> bool | None:
    if config is None:
        return None
    if config.thinking_budget is not None and config.thinking_budget >= 0:
        return config.thinking_budget > 0
    return True if config.thinking_level not in (None, 0, "", "THINKING_LEVEL_UNSPECIFIED") else None
