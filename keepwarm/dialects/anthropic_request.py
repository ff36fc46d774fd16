"""Anthropic's request bodies as types, and their way into the neutral request.

Decided here: what is accepted, ignored and refused. Unknown members are ignored, and so are those that ask for nothing a
server of one model could do otherwise (metadata, service_tier, speed, inference_geo, container, effort, a tool's strict);
sampling parameters are accepted whatever the API version. What asks for something that cannot be done is refused by name.
Messages are in anthropic_content.py, cache breakpoints in anthropic_marks.py.
"""

import re
from collections.abc import Sequence
from typing import Annotated, Any

from msgspec import UNSET, Meta, Struct, UnsetType
from msgspec.structs import replace

from keepwarm.core.request import (
    AnswerFormat,
    AnyText,
    ChatRequest,
    JsonSchema,
    Sampling,
    Tool,
    ToolChoice,
    ToolMode,
)
from keepwarm.dialects import WireBounds
from keepwarm.dialects.anthropic_block import CacheControl, Content, MessageParam, ToolParam
from keepwarm.dialects.anthropic_content import neutral_messages
from keepwarm.dialects.anthropic_marks import Marks, marks_of
from keepwarm.dialects.body import (
    invalid,
    json_text,
    quoted,
    require_at_most,
    require_new_name,
    require_stop_string,
)
from keepwarm.dialects.openai_request import ModelName

DEFAULT_TEMPERATURE = 1.0
BUDGET_TOKENS_MIN = 1024
ANSWER_NAME = "answer"  # of a schema: Anthropic's have none
TOOL_NAME = re.compile(r"[a-zA-Z0-9_-]{1,128}", re.ASCII)
TOOL_MODES = {"auto": ToolMode.AUTO, "any": ToolMode.REQUIRED, "none": ToolMode.NONE, "tool": ToolMode.NAMED}
THINKING = {"enabled": True, "adaptive": None, "between_tools": True, "disabled": False}  # adaptive: as the model can


class ToolChoiceParam(Struct):
    """Whether tools may, must or must not be called; `name` with the type "tool"."""

    type: Annotated[str, Meta(extra_json_schema={"enum": list(TOOL_MODES)})]
    name: str | None = None


class ThinkingParam(Struct):
    """Whether the model thinks before it answers. `display` "omitted" leaves the thoughts out of the answer."""

    type: Annotated[str, Meta(extra_json_schema={"enum": list(THINKING)})]
    budget_tokens: int | None = None
    display: str | None = None


class OutputFormat(Struct):
    """The answer is JSON that fits `schema`."""

    type: Annotated[str, Meta(extra_json_schema={"enum": ["json_schema"]})]
    schema: dict[str, Any] | None = None


class OutputConfig(Struct):
    """`format` constrains the answer; an effort is accepted and has no meaning."""

    format: OutputFormat | None = None


class DiagnosticsParam(Struct):
    """Its presence asks why the cache was missed; `previous_message_id` is the turn to compare with."""

    previous_message_id: str | None = None


class CountTokensRequest(Struct, kw_only=True):
    """The body of POST /messages/count_tokens."""

    model: ModelName
    messages: tuple[MessageParam, ...]
    system: Content | None = None
    tools: tuple[ToolParam, ...] | None = None
    tool_choice: ToolChoiceParam | None = None
    cache_control: CacheControl | None = None
    thinking: ThinkingParam | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = None  # output_config.format, as it was called before


class MessagesRequest(CountTokensRequest, kw_only=True):
    """The body of POST /messages. `max_tokens` 0 computes and caches the prompt and answers nothing."""

    max_tokens: Annotated[int, Meta(ge=0)]
    stop_sequences: tuple[str, ...] | None = None
    stream: bool | None = None
    temperature: Annotated[float, Meta(ge=0, le=1)] | None = None
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=0, le=1_000_000)] | None = None
    diagnostics: DiagnosticsParam | UnsetType | None = UNSET


def neutral_count(body: CountTokensRequest, bounds: WireBounds) -> ChatRequest:
    """The request whose prompt is to be counted. Raises ApiError(INVALID_REQUEST)."""
    require_at_most(body.messages, bounds.messages_max, "messages", "messages")
    if not body.messages:
        raise invalid("messages", "must not be empty")
    require_at_most(body.tools or (), bounds.tools_max, "tools", "tools")
    marks = marks_of(body.tools or (), body.system, body.messages, body.cache_control)
    tools = _tools(body.tools or (), marks, bounds)
    request = ChatRequest(
        model=body.model,
        messages=neutral_messages(body.system, body.messages, marks, bounds),
        tools=tools,
        tool_choice=_tool_choice(body.tool_choice, tools),
        answer_format=_answer_format(body, bounds),
        thinking=_thinking(body.thinking),
    )
    _require_sense(request)
    return request


def neutral_request(body: MessagesRequest, bounds: WireBounds) -> ChatRequest:
    """Raises ApiError(INVALID_REQUEST)."""
    request = neutral_count(body, bounds)
    if body.max_tokens == 0:
        _require_warming(body, request)
    elif body.thinking is not None and (body.thinking.budget_tokens or 0) >= body.max_tokens:
        problem = f"is {body.thinking.budget_tokens:,}, it must be less than max_tokens, {body.max_tokens:,}"
        raise invalid("thinking.budget_tokens", problem)
    return replace(
        request,
        max_tokens=body.max_tokens,
        sampling=Sampling(
            temperature=DEFAULT_TEMPERATURE if body.temperature is None else body.temperature,
            top_p=1.0 if body.top_p is None else body.top_p,
            top_k=body.top_k or 0,
        ),
        stop=_stop(body.stop_sequences or (), bounds),
        compare_with=body.diagnostics.previous_message_id or None if body.diagnostics else None,
    )


def _require_sense(request: ChatRequest) -> None:
    """Combinations Anthropic refuses."""
    is_forced = request.tool_choice.mode in (ToolMode.REQUIRED, ToolMode.NAMED)
    is_continued = request.messages[-1].partial
    if request.thinking and is_forced:
        raise invalid("thinking", "cannot be enabled when tool_choice forces a call")
    if request.thinking and is_continued:
        raise invalid("thinking", "cannot be enabled when the last message is the assistant's, to be continued")
    if is_continued and not isinstance(request.answer_format, AnyText):
        raise invalid("output_config.format", "cannot be combined with a last message that is to be continued")


def _require_warming(body: MessagesRequest, request: ChatRequest) -> None:
    """What cannot be combined with max_tokens 0."""
    refusals = {
        "stream": bool(body.stream),
        "thinking": bool(request.thinking),
        "output_config.format": not isinstance(request.answer_format, AnyText),
        "tool_choice": request.tool_choice.mode in (ToolMode.REQUIRED, ToolMode.NAMED),
    }
    for path, is_there in refusals.items():
        if is_there:
            raise invalid(path, "cannot be combined with max_tokens 0, which answers nothing")


def _tools(tools: Sequence[ToolParam], marks: Marks, bounds: WireBounds) -> tuple[Tool, ...]:
    neutral: dict[str, Tool] = {}
    for i, tool in enumerate(tools):
        path = f"tools[{i}]"
        if tool.type not in (None, "custom"):
            problem = (
                f"{quoted(tool.type)} is one of Anthropic's own tools, this server has none; define a 'custom' one"
            )
            raise invalid(f"{path}.type", problem)
        if tool.name is None:
            raise invalid(f"{path}.name", "is required")
        require_new_name(tool.name, neutral, f"{path}.name", TOOL_NAME)
        if tool.input_schema is None:
            raise invalid(f"{path}.input_schema", "is required")
        parameters = json_text(tool.input_schema, f"{path}.input_schema", bounds)
        neutral[tool.name] = Tool(tool.name, tool.description or "", parameters, marks.get(path))
    return tuple(neutral.values())


def _tool_choice(choice: ToolChoiceParam | None, tools: Sequence[Tool]) -> ToolChoice:
    if choice is None:
        return ToolChoice()
    mode = TOOL_MODES.get(choice.type)
    if mode is None:
        raise invalid("tool_choice.type", f"{quoted(choice.type)} is not one of {', '.join(TOOL_MODES)}")
    if mode is ToolMode.REQUIRED and not tools:
        raise invalid("tool_choice", "'any' needs at least one tool in tools")
    if mode is not ToolMode.NAMED:
        return ToolChoice(mode)
    if choice.name is None:
        raise invalid("tool_choice.name", "is required")
    if all(tool.name != choice.name for tool in tools):
        raise invalid("tool_choice.name", f"{quoted(choice.name)} is not a tool in tools")
    return ToolChoice(mode, choice.name)


def _answer_format(body: CountTokensRequest, bounds: WireBounds) -> AnswerFormat:
    path, wanted = "output_config.format", body.output_config.format if body.output_config is not None else None
    if wanted is None:
        path, wanted = "output_format", body.output_format
    if wanted is None:
        return AnyText()
    if wanted.type != "json_schema":
        raise invalid(f"{path}.type", f"{quoted(wanted.type)} is not 'json_schema'")
    if wanted.schema is None:
        raise invalid(f"{path}.schema", "is required")
    return JsonSchema(ANSWER_NAME, json_text(wanted.schema, f"{path}.schema", bounds))


def _thinking(wanted: ThinkingParam | None) -> bool | None:
    if wanted is None:
        return None
    if wanted.type not in THINKING:
        raise invalid("thinking.type", f"{quoted(wanted.type)} is not one of {', '.join(THINKING)}")
    if wanted.type == "enabled" and wanted.budget_tokens is None:
        raise invalid("thinking.budget_tokens", "is required with the type 'enabled'")
    if wanted.budget_tokens is not None and wanted.budget_tokens < BUDGET_TOKENS_MIN:
        raise invalid(
            "thinking.budget_tokens", f"is {wanted.budget_tokens:,}, at least {BUDGET_TOKENS_MIN:,} are needed"
        )
    return THINKING[wanted.type]


def _stop(strings: tuple[str, ...], bounds: WireBounds) -> tuple[str, ...]:
    require_at_most(strings, bounds.stop_strings_max, "stop_sequences", "strings")
    for i, string in enumerate(strings):
        require_stop_string(string, f"stop_sequences[{i}]", bounds)
    return strings
