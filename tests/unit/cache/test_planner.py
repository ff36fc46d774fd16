import numpy as np
import pytest

from keepwarm.cache.planner import Settle, goes_on, output_rules, plan_object, plan_settling, plan_turn
from keepwarm.cache.render import Built
from keepwarm.config import Limits
from keepwarm.core.cache_object import CacheObject, ObjectStatus
from keepwarm.core.errors import ApiError, ErrorKind
from keepwarm.core.event import FinishReason
from keepwarm.core.prompt import Lease, OutputRules, Plan, Priority, Prompt, ToolFormat
from keepwarm.core.request import (
    AnswerFormat,
    AnyJson,
    ChatRequest,
    JsonSchema,
    Message,
    Sampling,
    TextPart,
    Tool,
    ToolChoice,
    ToolMode,
)

USER, ASSISTANT = (Message(role, (TextPart("x"),)) for role in ("user", "assistant"))
WEATHER = Tool("get_weather", "", '{"type":"object"}')
LEASE = Lease("lease-1", 64)
CHOICES = {mode: ToolChoice(mode, "get_weather" if mode is ToolMode.NAMED else None) for mode in ToolMode}


def built(n_tokens: int, tool_format: ToolFormat | None = None, *, reasoning: bool = False) -> Built:
    return Built(Prompt("t", np.zeros(n_tokens, np.int32)), tool_format, reasoning)


def request(**members: object) -> ChatRequest:
    return ChatRequest("m", **{"messages": (USER,), **members})


def to_gbnf(schema: str) -> str:
    return f"root ::= {schema}"


def rules(request: ChatRequest, prompt: Built, n_ctx: int = 8192) -> OutputRules:
    return output_rules(request, prompt, n_ctx, Limits(), to_gbnf)


def test_max_tokens_that_fit_are_taken() -> None:
    assert rules(request(max_tokens=1024), built(7168)).max_tokens == 1024
    assert rules(request(max_tokens=1), built(10)).max_tokens == 1


def test_max_tokens_by_default_are_what_the_window_leaves() -> None:
    assert rules(request(), built(10)).max_tokens == 1024
    assert rules(request(), built(8000)).max_tokens == 192
    assert rules(request(), built(8191)).max_tokens == 1


def test_a_prompt_too_long_is_refused_with_both_numbers() -> None:
    with pytest.raises(ApiError) as caught:
        rules(request(max_tokens=1024), built(9120))
    assert caught.value.kind is ErrorKind.PROMPT_TOO_LONG
    assert caught.value.message == (
        "prompt has 9,120 tokens and max_tokens is 1,024: together 10,144, the model's window is 8,192"
    )
    with pytest.raises(ApiError, match=r"prompt has 8,192 tokens, the model's window is 8,192") as caught:
        rules(request(), built(8192))
    assert (caught.value.kind, caught.value.param) == (ErrorKind.PROMPT_TOO_LONG, "messages")


@pytest.mark.parametrize("n_prompt, param", [(7169, "max_tokens"), (8192, "messages")])
def test_the_error_names_what_can_be_shortened(n_prompt: int, param: str) -> None:
    with pytest.raises(ApiError) as caught:
        rules(request(max_tokens=1024), built(n_prompt))
    assert caught.value.param == param


def test_rules_of_the_request_are_passed_on() -> None:
    found = rules(request(stop=("a", "b"), top_logprobs=3), built(10, ToolFormat.MISTRAL, reasoning=True))
    assert found == OutputRules(1024, ("a", "b"), None, ToolFormat.MISTRAL, 3, reasoning=True)


@pytest.mark.parametrize(
    "answer_format, schema",
    [(AnyJson(), '{"type":"object"}'), (JsonSchema("n", '{"type":"array"}'), '{"type":"array"}')],
)
def test_json_answers_have_a_grammar(answer_format: AnswerFormat, schema: str) -> None:
    assert rules(request(answer_format=answer_format), built(10)).grammar == f"root ::= {schema}"


def test_a_schema_that_is_refused_names_the_field() -> None:
    with pytest.raises(ApiError) as caught:
        rules(request(answer_format=JsonSchema("n", '{"$ref":"http://x"}')), built(10))
    assert (caught.value.kind, caught.value.param) == (ErrorKind.INVALID_REQUEST, "response_format")


def test_a_schema_too_large_is_refused() -> None:
    schema = '{"description":"' + "x" * Limits().schema_bytes_max + '"}'
    with pytest.raises(ApiError, match="65,536"):
        rules(request(answer_format=JsonSchema("n", schema)), built(10))


@pytest.mark.parametrize("mode", [ToolMode.REQUIRED, ToolMode.NAMED])
def test_a_forced_call_is_the_whole_answer(mode: ToolMode) -> None:
    wanted = request(tools=(WEATHER,), tool_choice=CHOICES[mode], answer_format=AnyJson())
    grammar = rules(wanted, built(10, ToolFormat.HERMES)).grammar or ""
    assert grammar.startswith('root ::= "<tool_call>\\n" call')


def test_an_optional_call_is_an_alternative_to_json() -> None:
    wanted = request(tools=(WEATHER,), answer_format=AnyJson())
    grammar = rules(wanted, built(10, ToolFormat.HERMES)).grammar or ""
    assert grammar.startswith("root ::= any0-root | any1-root\nany0-root ::= ")
    assert 'any1-root ::= "<tool_call>\\n" any1-call' in grammar
    assert rules(request(tools=(WEATHER,)), built(10, ToolFormat.HERMES)).grammar is None


def test_no_calls_no_call_grammar() -> None:
    wanted = request(tools=(WEATHER,), tool_choice=CHOICES[ToolMode.NONE], answer_format=AnyJson())
    assert rules(wanted, built(10)).grammar == 'root ::= {"type":"object"}'


def plan(n_tokens: int, *, uses_object: bool, lease: Lease | None = LEASE) -> Plan:
    sampling = Sampling(temperature=0.3)
    return plan_turn(
        "turn-1",
        request(sampling=sampling),
        built(n_tokens),
        OutputRules(5),
        lease,
        auto_tokens_min=512,
        uses_object=uses_object,
    )


@pytest.mark.parametrize("n_tokens, uses_object, cached", [(511, False, False), (512, False, True), (3, True, True)])
def test_reuse_begins_at_the_minimum_or_with_an_object(n_tokens: int, uses_object: bool, cached: bool) -> None:
    found = plan(n_tokens, uses_object=uses_object)
    assert (found.reuse, found.store, found.lease_id) == (cached, cached, "lease-1" if cached else None)
    assert (found.turn_id, found.output, found.sampling.temperature) == ("turn-1", OutputRules(5), 0.3)
    assert (found.pin_id, found.priority) == (None, Priority.FOREGROUND)


def test_a_plan_without_a_lease() -> None:
    assert plan(600, uses_object=False, lease=None).lease_id is None


def test_an_objects_plan_pins_and_says_nothing() -> None:
    obj = CacheObject("cache-1", "t", "m", ObjectStatus.PENDING, 0, 10, (USER,), (), 0)
    found = plan_object("warm-1", obj, built(3), LEASE)
    assert (found.pin_id, found.output.max_tokens, found.lease_id) == ("cache-1", 0, "lease-1")
    assert found.reuse
    assert found.store


@pytest.mark.parametrize("settle", ["auto", "always", "off"])
@pytest.mark.parametrize("reason", ["stop", "length", "tool_calls"])
@pytest.mark.parametrize("answered_before", [False, True])
def test_when_a_conversation_is_likely_to_go_on(settle: Settle, reason: FinishReason, answered_before: bool) -> None:
    messages = (USER, ASSISTANT, USER) if answered_before else (USER,)
    likely = reason == "tool_calls" or (reason == "stop" and answered_before)
    assert goes_on(request(messages=messages), reason, settle) == {"auto": likely, "always": True, "off": False}[settle]


def settling(n_tokens: int, settle: Settle = "always") -> Plan | None:
    return plan_settling("settle-1", request(), "stop", built(n_tokens), LEASE, settle=settle, auto_tokens_min=512)


def test_settling_is_idle_stores_and_says_nothing() -> None:
    found = settling(512)
    assert found is not None
    assert (found.priority, found.output.max_tokens, found.store, found.pin_id) == (Priority.IDLE, 0, True, None)
    assert found.lease_id == "lease-1"


def test_what_is_not_reused_is_not_settled() -> None:
    assert settling(511) is None
    assert settling(512, "off") is None
    assert settling(512, "auto") is None
