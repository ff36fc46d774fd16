"""From a rendered request to what the engine shall do: how the answer ends and is read, what is reused, stored, pinned.

Pure. A plan is an intention; what was done the engine counts. Reading from and writing to the prefix store go together,
and happen for prompts of `auto_tokens_min` tokens or more, or of any length when the request uses a cache object.

A settling plan evaluates a conversation with its answer once more, at idle priority and without output, so that the
conversation's next turn finds it. Worth it (`settle` "auto") when the conversation is likely to go on: the answer ended
by itself or in a tool call, and it was not the first one, or a tool's result is due.
"""

from collections.abc import Callable
from typing import Literal

from msgspec.structs import replace

from keepwarm.cache.breakpoints import Chosen
from keepwarm.cache.render import Built
from keepwarm.cache.schema import schema_grammar
from keepwarm.cache.tools import either, tool_grammar
from keepwarm.config import Limits
from keepwarm.core.cache_object import CacheObject
from keepwarm.core.errors import ApiError, ErrorKind
from keepwarm.core.event import FinishReason
from keepwarm.core.prompt import Lease, OutputRules, Plan, Priority
from keepwarm.core.request import AnyText, ChatRequest, JsonSchema, ToolChoice, ToolMode

Settle = Literal["auto", "always", "off"]

_ANY_OBJECT = '{"type":"object"}'
_MUST_CALL = (ToolMode.REQUIRED, ToolMode.NAMED)


def output_rules(
    request: ChatRequest, built: Built, n_ctx: int, limits: Limits, to_gbnf: Callable[[str], str], *,
    max_tokens_cut: bool = False,
) -> OutputRules:  # fmt: skip
    """How the answer to `request` ends and is read. A used cache object's tools must be in the request by now.

    `to_gbnf` turns a JSON Schema into GBNF with the rule "root", or raises ValueError. `max_tokens_cut`: more than the
    window leaves is cut to that instead of being refused. Raises ApiError(PROMPT_TOO_LONG)
    with both numbers, ApiError(INVALID_REQUEST) for a schema or a tool choice that cannot be enforced.
    """
    return OutputRules(
        max_tokens=_max_tokens(
            request.max_tokens, built.prompt.n_tokens, n_ctx, limits.max_tokens_default, cut=max_tokens_cut
        ),
        stop=request.stop,
        grammar=_grammar(request, built, limits, to_gbnf),
        tool_format=built.tool_format,
        top_logprobs=request.top_logprobs,
        reasoning=built.reasoning,
    )


def plan_turn(
    turn_id: str,
    request: ChatRequest,
    built: Built,
    rules: OutputRules,
    lease: Lease | None,
    *,
    auto_tokens_min: int,
    uses_object: bool,
    chosen: Chosen | None = None,
) -> Plan:
    """The plan that answers `request`. `chosen` is what its breakpoints with a lifetime read and write, if it has any."""
    cached = uses_object or chosen is not None or built.prompt.n_tokens >= auto_tokens_min
    plan = Plan(
        turn_id,
        built.prompt,
        rules,
        sampling=request.sampling,
        reuse=cached,
        store=cached,
        lease_id=lease.lease_id if cached and lease is not None else None,
    )
    if chosen is not None:
        return replace(plan, read_end=chosen.read_end, write_end=chosen.write_end, write_long_end=chosen.write_long_end)
    breakpoints = built.prompt.marks[uses_object:]  # the first mark is the end of the object, if one is in use
    return replace(plan, write_end=breakpoints[-1] if cached and breakpoints else 0)


def plan_object(turn_id: str, obj: CacheObject, built: Built, lease: Lease | None) -> Plan:
    """The plan that makes a cache object's prefix (`Templating.object_prefix`) resident and keeps it so."""
    return Plan(
        turn_id,
        built.prompt,
        OutputRules(max_tokens=0),
        pin_id=obj.id,
        write_end=built.prompt.n_tokens,
        lease_id=lease.lease_id if lease is not None else None,
    )


def goes_on(request: ChatRequest, reason: FinishReason, settle: Settle) -> bool:
    """Whether the conversation that `request` and its answer make is likely to have another turn."""
    if settle != "auto":
        return settle == "always"
    return reason == "tool_calls" or (reason == "stop" and any(m.role == "assistant" for m in request.messages))


def plan_settling(
    turn_id: str,
    request: ChatRequest,
    reason: FinishReason,
    continuation: Built,
    lease: Lease | None,
    *,
    settle: Settle,
    auto_tokens_min: int,
) -> Plan | None:
    """The plan that settles an answered conversation, or None when that is not worth it.

    `continuation` is the conversation with the answer in it, built with `generate=False` and the same cache object.
    """
    if not goes_on(request, reason, settle) or continuation.prompt.n_tokens < auto_tokens_min:
        return None
    return Plan(
        turn_id,
        continuation.prompt,
        OutputRules(max_tokens=0),
        lease_id=lease.lease_id if lease is not None else None,
        priority=Priority.IDLE,
    )


def _max_tokens(asked: int | None, n_prompt: int, n_ctx: int, default: int, *, cut: bool) -> int:
    if asked is None or (asked and cut):
        if n_prompt >= n_ctx:
            message = f"prompt has {n_prompt:,} tokens, the model's window is {n_ctx:,} and must hold the answer too"
            raise ApiError(ErrorKind.PROMPT_TOO_LONG, message, param="messages")
        return min(default if asked is None else asked, n_ctx - n_prompt)
    if n_prompt + asked > n_ctx:
        message = (
            f"prompt has {n_prompt:,} tokens and max_tokens is {asked:,}: together {n_prompt + asked:,}, "
            f"the model's window is {n_ctx:,}"
        )
        raise ApiError(ErrorKind.PROMPT_TOO_LONG, message, param="messages" if n_prompt >= n_ctx else "max_tokens")
    return asked


def _grammar(request: ChatRequest, built: Built, limits: Limits, to_gbnf: Callable[[str], str]) -> str | None:
    """Tool calls go before the answer format: a forced call is the whole answer, an optional one an alternative to it."""
    must_call = request.tool_choice.mode in _MUST_CALL
    answer = None if must_call else _answer_grammar(request, limits, to_gbnf)
    if built.tool_format is None or (not must_call and answer is None):
        return answer
    choice = request.tool_choice if must_call else ToolChoice(ToolMode.REQUIRED)
    calls = tool_grammar(built.tool_format, request.tools, choice, to_gbnf, schema_bytes_max=limits.schema_bytes_max)
    assert calls is not None
    return calls if answer is None else either((answer, calls))


def _answer_grammar(request: ChatRequest, limits: Limits, to_gbnf: Callable[[str], str]) -> str | None:
    wanted = request.answer_format
    if isinstance(wanted, AnyText):
        return None
    schema = wanted.schema if isinstance(wanted, JsonSchema) else _ANY_OBJECT
    return schema_grammar(schema, to_gbnf, param="response_format", bytes_max=limits.schema_bytes_max)
