"""OpenAI chat bodies as types, and their way into the neutral request. Kimi's bodies extend these (kimi.py).

Decided here: what is accepted, ignored and refused. Unknown members are ignored; members that ask for something this
server cannot do (legacy functions, pictures, spoken answers) are refused by name rather than dropped, since the answer
would not be what was asked for. Paths in errors are the body's own: "messages[1].content[0].text".
"""

import re
from collections.abc import Sequence
from typing import Annotated, Any

from msgspec import Meta, Struct

from keepwarm.core.errors import ApiError
from keepwarm.core.request import (
    AnswerFormat,
    AnyJson,
    AnyText,
    ChatRequest,
    JsonSchema,
    Mark,
    Message,
    Role,
    Sampling,
    TextPart,
    Tool,
    ToolCall,
    ToolChoice,
    ToolMode,
)
from keepwarm.dialects import Parsed, WireBounds
from keepwarm.dialects.body import (
    invalid,
    json_text,
    quoted,
    require_at_most,
    require_new_name,
    require_stop_string,
)

SEED_MAX = 2**63 - 1
LOGIT_BIAS_MAX = 100.0
NO_PARAMETERS = '{"type":"object","properties":{}}'

ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",  # OpenAI's newer word for it
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}
CACHE_MODES = ("implicit", "explicit")
TURN_ID_CHARS_MAX = 256  # ours have 30
TOOL_MODES = {"auto": ToolMode.AUTO, "none": ToolMode.NONE, "required": ToolMode.REQUIRED}

_TOKEN_ID = re.compile(r"[0-9]{1,9}", re.ASCII)

ModelName = Annotated[str, Meta(min_length=1, max_length=256)]  # echoed in every chunk, so bounded


class CacheBreakpoint(Struct):
    """Marks the end of a prefix worth keeping, after the part that carries it."""

    mode: str | None = None


class ContentPart(Struct):
    """A piece of a message. `text` parts carry text, `refusal` parts an earlier answer's refusal."""

    type: str
    text: str | None = None
    refusal: str | None = None
    prompt_cache_breakpoint: CacheBreakpoint | None = None


class FunctionCall(Struct):
    """The function an assistant message called; `arguments` is JSON text."""

    name: str
    arguments: str


class AssistantToolCall(Struct):
    """One call of an assistant message."""

    id: str
    function: FunctionCall
    type: str | None = None


class ChatMessage(Struct):
    """One message of the conversation."""

    role: Annotated[str, Meta(extra_json_schema={"enum": list(ROLES)})]
    content: str | tuple[ContentPart, ...] | None = None
    name: str | None = None
    tool_calls: tuple[AssistantToolCall, ...] | None = None
    tool_call_id: str | None = None
    function_call: Any = None


class FunctionDefinition(Struct):
    """A function the model may call; `parameters` is its JSON Schema."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None


class FunctionTool(Struct):
    """A tool; `function` is the only type."""

    type: str
    function: FunctionDefinition


class NamedFunction(Struct):
    """A function by its name."""

    name: str


class NamedToolChoice(Struct):
    """Forces a call of one function."""

    type: str
    function: NamedFunction | None = None


class JsonSchemaFormat(Struct):
    """A named JSON Schema for the answer."""

    name: str = "answer"
    schema: dict[str, Any] | None = None


class ResponseFormat(Struct):
    """The answer's format."""

    type: Annotated[str, Meta(extra_json_schema={"enum": ["text", "json_object", "json_schema"]})]
    json_schema: JsonSchemaFormat | None = None


class StreamOptions(Struct):
    """`include_usage`: one more chunk at the end with the whole turn's usage."""

    include_usage: bool | None = None


class PromptCacheOptions(Struct):
    """`comparison_response_id` names an earlier turn to explain a cache miss against.

    Prompts are cached in either mode and stay until they are evicted: `mode` and `ttl` are accepted, no more.
    """

    mode: Annotated[str, Meta(extra_json_schema={"enum": list(CACHE_MODES)})] | None = None
    ttl: str | None = None
    comparison_response_id: Annotated[str, Meta(max_length=TURN_ID_CHARS_MAX)] | None = None


class ChatCompletionRequest(Struct):
    """The body of POST /chat/completions. `top_k` and `min_p` are extensions."""

    model: ModelName
    messages: tuple[ChatMessage, ...]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Meta(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Meta(ge=1)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=1_000_000)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    n: Annotated[int, Meta(ge=1)] | None = None
    stop: str | tuple[str, ...] | None = None
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    logit_bias: dict[str, Annotated[float, Meta(ge=-LOGIT_BIAS_MAX, le=LOGIT_BIAS_MAX)]] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0)] | None = None
    seed: Annotated[int, Meta(ge=-SEED_MAX, le=SEED_MAX)] | None = None
    response_format: ResponseFormat | None = None
    tools: tuple[FunctionTool, ...] | None = None
    tool_choice: str | NamedToolChoice | None = None
    modalities: tuple[str, ...] | None = None
    prompt_cache_options: PromptCacheOptions | None = None
    functions: Any = None
    function_call: Any = None


class RequestRules(Struct, frozen=True):
    """What differs between the dialects that share these bodies."""

    bounds: WireBounds
    default_temperature: float
    function_name: re.Pattern[str]


def neutral_messages(messages: Sequence[ChatMessage], first: int = 0) -> tuple[Message, ...]:
    """`messages` in neutral form; `first` is the place of the first one in the body, for the paths in errors.

    Raises ApiError(INVALID_REQUEST).
    """
    return tuple(_message(message, first + i) for i, message in enumerate(messages))


def neutral_tools(tools: Sequence[FunctionTool] | None, rules: RequestRules) -> tuple[Tool, ...]:
    """Raises ApiError(INVALID_REQUEST): too many, not a function, a bad or repeated name, a schema too long or deep."""
    if not tools:
        return ()
    require_at_most(tools, rules.bounds.tools_max, "tools", "tools")
    seen: set[str] = set()
    neutral = []
    for i, tool in enumerate(tools):
        function = tool.function
        if tool.type != "function":
            raise invalid(f"tools[{i}].type", f"{quoted(tool.type)} is not supported, only 'function' is")
        require_new_name(function.name, seen, f"tools[{i}].function.name", rules.function_name)
        seen.add(function.name)
        parameters = NO_PARAMETERS
        if function.parameters is not None:
            parameters = json_text(function.parameters, f"tools[{i}].function.parameters", rules.bounds)
        neutral.append(Tool(function.name, function.description or "", parameters))
    return tuple(neutral)


def neutral_request(
    body: ChatCompletionRequest, messages: tuple[Message, ...], rules: RequestRules, *, tools_elsewhere: bool = False
) -> ChatRequest:
    """Everything but the messages, which the caller has made neutral already.

    `tools_elsewhere`: the tools are a cache object's, so a named choice cannot be checked against the body's.
    Raises ApiError(INVALID_REQUEST).
    """
    _refuse_unsupported(body)
    tools = neutral_tools(body.tools, rules)
    return ChatRequest(
        model=body.model,
        messages=messages,
        tools=tools,
        tool_choice=_tool_choice(body.tool_choice, None if tools_elsewhere else tools),
        sampling=_sampling(body, rules),
        max_tokens=body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens,
        stop=_stop(body.stop, rules.bounds),
        n=_n(body.n, rules.bounds),
        top_logprobs=_top_logprobs(body, rules.bounds),
        answer_format=_answer_format(body.response_format, rules.bounds),
        compare_with=_compare_with(body.prompt_cache_options),
    )


def parsed_chat(body: ChatCompletionRequest, request: ChatRequest) -> Parsed:
    """`request` with what only the renderer needs to know; `include_usage` without `stream` means nothing."""
    stream = bool(body.stream)
    include_usage = stream and body.stream_options is not None and bool(body.stream_options.include_usage)
    return Parsed(request, stream, include_usage)


def require_messages(messages: Sequence[ChatMessage], bounds: WireBounds) -> None:
    """Raises ApiError(INVALID_REQUEST) for none or too many."""
    if not messages:
        raise invalid("messages", "must not be empty")
    require_at_most(messages, bounds.messages_max, "messages", "messages")


def _message(message: ChatMessage, i: int) -> Message:
    role = ROLES.get(message.role)
    if role is None:
        raise invalid(f"messages[{i}].role", f"{quoted(message.role)} is not one of {', '.join(ROLES)}")
    if message.function_call is not None:
        raise invalid(f"messages[{i}].function_call", "is not supported, use tool_calls")
    if message.tool_calls and role != "assistant":
        raise invalid(f"messages[{i}].tool_calls", f"belong to assistant messages, not to {role} ones")
    if role == "tool" and message.tool_call_id is None:
        raise invalid(f"messages[{i}].tool_call_id", "is required in tool messages")
    if message.content is None and not message.tool_calls:
        raise invalid(f"messages[{i}].content", _missing_content(role))
    return Message(
        role=role,
        parts=_parts(message.content, i),
        name=message.name,
        tool_calls=_tool_calls(message.tool_calls, i) if message.tool_calls else (),
        tool_call_id=message.tool_call_id if role == "tool" else None,
    )


def _missing_content(role: Role) -> str:
    if role == "assistant":
        return "is required in assistant messages without tool_calls"
    return f"is required in {role} messages"


def _parts(content: str | tuple[ContentPart, ...] | None, i: int) -> tuple[TextPart, ...]:
    if isinstance(content, str):
        return (TextPart(content),)
    return tuple(_part(part, f"messages[{i}].content[{j}]") for j, part in enumerate(content or ()))


def _part(part: ContentPart, path: str) -> TextPart:
    if part.type not in ("text", "refusal"):
        raise invalid(f"{path}.type", f"{quoted(part.type)} parts are not supported, the model reads text only")
    text = part.text if part.type == "text" else part.refusal
    if text is None:
        raise invalid(f"{path}.{part.type}", "is required")
    mark = part.prompt_cache_breakpoint
    if mark is not None and mark.mode not in (None, "explicit"):
        raise invalid(f"{path}.prompt_cache_breakpoint.mode", f"{quoted(mark.mode)} is not 'explicit'")
    return TextPart(text, mark=None if mark is None else Mark())


def _tool_calls(calls: Sequence[AssistantToolCall], i: int) -> tuple[ToolCall, ...]:
    for j, call in enumerate(calls):
        if call.type not in (None, "function"):
            path = f"messages[{i}].tool_calls[{j}].type"
            raise invalid(path, f"{quoted(call.type)} is not supported, only 'function' is")
    return tuple(ToolCall(call.id, call.function.name, call.function.arguments) for call in calls)


def _refuse_unsupported(body: ChatCompletionRequest) -> None:
    if body.functions is not None:
        raise invalid("functions", "is not supported, use tools")
    if body.function_call is not None:
        raise invalid("function_call", "is not supported, use tools and tool_choice")
    for modality in body.modalities or ():
        if modality != "text":
            raise invalid("modalities", f"{quoted(modality)} is not supported, the model answers in text only")


def _sampling(body: ChatCompletionRequest, rules: RequestRules) -> Sampling:
    top_k = body.top_k or 0
    return Sampling(
        temperature=rules.default_temperature if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_k=max(top_k, 0),  # -1 is vLLM's word for off
        min_p=body.min_p or 0.0,
        seed=body.seed,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        logit_bias=_logit_bias(body.logit_bias) if body.logit_bias else (),
    )


def _logit_bias(biases: dict[str, float]) -> tuple[tuple[int, float], ...]:
    by_token: dict[int, float] = {}
    for key, bias in biases.items():
        if not _TOKEN_ID.fullmatch(key):
            raise invalid("logit_bias", f"{quoted(key)} is not a token id")
        by_token[int(key)] = bias
    return tuple(by_token.items())


def _stop(stop: str | tuple[str, ...] | None, bounds: WireBounds) -> tuple[str, ...]:
    if stop is None:
        return ()
    strings = (stop,) if isinstance(stop, str) else stop
    require_at_most(strings, bounds.stop_strings_max, "stop", "strings")
    for i, string in enumerate(strings):
        require_stop_string(string, "stop" if isinstance(stop, str) else f"stop[{i}]", bounds)
    return strings


def _n(n: int | None, bounds: WireBounds) -> int:
    if n is not None and n > bounds.choices_max:
        raise invalid("n", f"is {n:,}, at most {bounds.choices_max} choices are allowed")
    return 1 if n is None else n


def _top_logprobs(body: ChatCompletionRequest, bounds: WireBounds) -> int | None:
    if not body.logprobs:
        if body.top_logprobs:
            raise invalid("top_logprobs", "needs logprobs to be true")
        return None
    top = body.top_logprobs or 0
    if top > bounds.top_logprobs_max:
        raise invalid("top_logprobs", f"is {top:,}, at most {bounds.top_logprobs_max} are allowed")
    return top


def _answer_format(wanted: ResponseFormat | None, bounds: WireBounds) -> AnswerFormat:
    if wanted is None or wanted.type == "text":
        return AnyText()
    if wanted.type == "json_object":
        return AnyJson()
    if wanted.type != "json_schema":
        problem = f"{quoted(wanted.type)} is not one of text, json_object, json_schema"
        raise invalid("response_format.type", problem)
    if wanted.json_schema is None:
        raise invalid("response_format.json_schema", "is required with the type json_schema")
    schema = json_text(wanted.json_schema.schema or {}, "response_format.json_schema.schema", bounds)
    return JsonSchema(wanted.json_schema.name, schema)


def _compare_with(options: PromptCacheOptions | None) -> str | None:
    if options is None:
        return None
    if options.mode not in (None, *CACHE_MODES):
        raise invalid("prompt_cache_options.mode", f"{quoted(options.mode)} is not one of {', '.join(CACHE_MODES)}")
    return options.comparison_response_id


def _tool_choice(choice: str | NamedToolChoice | None, tools: tuple[Tool, ...] | None) -> ToolChoice:
    """`tools` None: not known here, so the choice is not checked against them."""
    if choice is None:
        return ToolChoice()
    if isinstance(choice, str):
        mode = TOOL_MODES.get(choice)
        if mode is None:
            raise invalid("tool_choice", f"{quoted(choice)} is not one of {', '.join(TOOL_MODES)}")
        if mode is ToolMode.REQUIRED and tools == ():
            raise invalid("tool_choice", "'required' needs at least one tool in tools")
        return ToolChoice(mode)
    return _named_choice(choice, tools)


def _named_choice(choice: NamedToolChoice, tools: tuple[Tool, ...] | None) -> ToolChoice:
    if choice.type != "function":
        raise invalid("tool_choice.type", f"{quoted(choice.type)} is not supported, only 'function' is")
    if choice.function is None:
        raise invalid("tool_choice.function", "is required")
    name = choice.function.name
    if tools is not None and all(tool.name != name for tool in tools):
        raise _unknown_function("tool_choice.function.name", name)
    return ToolChoice(ToolMode.NAMED, name)


def _unknown_function(path: str, name: str) -> ApiError:
    return invalid(path, f"{quoted(name)} is not a function in tools")
