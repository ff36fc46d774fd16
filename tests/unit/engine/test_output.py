import pytest

from keepwarm.core.event import Delta, ReasoningDelta, TextDelta, TokenLogprob, ToolCallDelta
from keepwarm.core.prompt import OutputRules, ToolFormat
from keepwarm.engine.output import OutputReader

HERMES = OutputRules(100, tool_format=ToolFormat.HERMES)
LLAMA3 = OutputRules(100, tool_format=ToolFormat.LLAMA3)
MISTRAL = OutputRules(100, tool_format=ToolFormat.MISTRAL)
THINKING = OutputRules(100, reasoning=True)
CALL = '<tool_call>\n{"name": "f", "arguments": {"x": [1, "a"]}}\n</tool_call>'
ARGUMENTS = '{"x": [1, "a"]}'


def read(rules: OutputRules, *pieces: str | bytes) -> tuple[list[Delta], str | None]:
    """All deltas of an answer given in `pieces`, texts that follow each other joined, and the stop string."""
    reader = OutputReader(rules)
    deltas: list[Delta] = []
    stop = None
    for piece in pieces:
        found, stop = reader.feed(piece if isinstance(piece, bytes) else piece.encode())
        deltas += found
        if stop is not None:
            break
    return joined([*deltas, *reader.finish()]), stop


def joined(deltas: list[Delta]) -> list[Delta]:
    merged: list[Delta] = []
    for delta in deltas:
        last = merged[-1] if merged else None
        if isinstance(delta, TextDelta) and isinstance(last, TextDelta):
            merged[-1] = TextDelta(last.text + delta.text)
        elif isinstance(delta, ReasoningDelta) and isinstance(last, ReasoningDelta):
            merged[-1] = ReasoningDelta(last.text + delta.text)
        else:
            merged.append(delta)
    return merged


def call(index: int, name: str = "f", arguments: str = ARGUMENTS) -> list[Delta]:
    return [ToolCallDelta(index, name), ToolCallDelta(index, arguments=arguments)]


def fed(rules: OutputRules, *pieces: str) -> list[list[Delta]]:
    """The deltas of each piece, and of the end."""
    reader = OutputReader(rules)
    return [*(reader.feed(piece.encode())[0] for piece in pieces), reader.finish()]


def test_text_is_told_at_once() -> None:
    assert fed(OutputRules(9), "Hello", " you") == [[TextDelta("Hello")], [TextDelta(" you")], []]


def test_characters_are_never_torn() -> None:
    euro = "€".encode()
    reader = OutputReader(OutputRules(9))
    assert [reader.feed(bytes([byte]))[0] for byte in euro] == [[], [], [TextDelta("€")]]
    assert reader.finish() == []


def test_an_incomplete_character_at_the_end_is_replaced() -> None:
    assert read(OutputRules(9), "a", "€".encode()[:2]) == ([TextDelta("a\ufffd")], None)
    assert read(OutputRules(9), b"a\xff", "b") == ([TextDelta("a\ufffdb")], None)


def test_a_stop_string_ends_the_answer_and_is_not_told() -> None:
    assert read(OutputRules(9, ("END",)), "one END two") == ([TextDelta("one ")], "END")


def test_a_stop_string_is_found_across_tokens_and_what_may_begin_it_is_held_back() -> None:
    rules = OutputRules(9, ("\n\nQ:",))
    assert fed(rules, "yes\n", "\n", "Q") == [[TextDelta("yes")], [], [], [TextDelta("\n\nQ")]]
    assert read(rules, "yes\n", "\n", "Q", ": no") == ([TextDelta("yes")], "\n\nQ:")
    assert read(rules, "yes\n", "\n", "Why") == ([TextDelta("yes\n\nWhy")], None)


@pytest.mark.parametrize(
    "stops, text, told, stop",
    [
        (("abcd", "bc"), "xabcd", "xa", "bc"),
        (("bc", "abc"), "xabc", "x", "abc"),
        (("aab",), "aaab", "a", "aab"),
        (("b", "a"), "xyab", "xy", "a"),
        (("€",), "1€2", "1", "€"),
        (("", "q"), "abc", "abc", None),
    ],
)
def test_the_first_stop_string_to_be_complete_counts(
    stops: tuple[str, ...], text: str, told: str, stop: str | None
) -> None:
    rules = OutputRules(9, stops)
    assert read(rules, text) == ([TextDelta(told)], stop)
    assert read(rules, *text) == ([TextDelta(told)], stop)


def test_after_a_stop_string_nothing_is_told() -> None:
    reader = OutputReader(OutputRules(9, ("END",)))
    reader.feed(b"END")
    assert reader.feed(b"more") == ([], "END")
    assert reader.finish() == []


def test_a_call_is_told_when_its_json_is_complete() -> None:
    found = fed(HERMES, "<tool_", 'call>\n{"name": "f", "arguments": {"x": [1, "a"]', "}}", "\n</tool", "_call>", "\n")
    assert found == [[], [], call(0), [], [], [], []]


def test_text_before_a_call_is_told_first() -> None:
    assert read(HERMES, f"Let me see.\n{CALL}") == ([TextDelta("Let me see.\n"), *call(0)], None)


def test_several_calls_are_numbered_and_white_space_between_them_is_dropped() -> None:
    deltas, _ = read(HERMES, f"\n {CALL}\n{CALL}\n\n{CALL}\n ")
    assert deltas == [*call(0), *call(1), *call(2)]


def test_text_after_a_call_is_told_with_its_white_space() -> None:
    assert read(HERMES, f"{CALL}\n\nDone.")[0] == [*call(0), TextDelta("\n\nDone.")]


def test_a_missing_closing_tag_is_forgiven() -> None:
    opened = CALL.removesuffix("\n</tool_call>")
    assert read(HERMES, opened)[0] == call(0)
    assert read(HERMES, f"{opened}\n{opened}")[0] == [*call(0), *call(1)]
    assert read(HERMES, f"{opened}\n</tool_ca")[0] == call(0)


def test_saw_tool_call() -> None:
    reader = OutputReader(HERMES)
    assert not reader.saw_tool_call
    reader.feed(CALL.encode())
    assert reader.saw_tool_call
    other = OutputReader(HERMES)
    other.feed(b"<tool_call>nothing</tool_call>")
    other.finish()
    assert not other.saw_tool_call


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>not JSON</tool_call> and on",
        '<tool_call>{"name": 3, "arguments": {}}</tool_call>',
        '<tool_call>{"name": "", "arguments": {}}</tool_call>',
        '<tool_call>{"arguments": {}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": [1]}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {bad}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": "text"}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {"x"',
        "<tool_call>",
        " \n<tool_call> ",
        "<tool_c",
        "  ",
        "<tool_call>" + '{"a":' * 5000,
        "[TOOL_CALLS] <|python_tag|> <think>",
    ],
)
def test_what_is_no_call_is_told_as_it_was_written(text: str) -> None:
    assert read(HERMES, text) == ([TextDelta(text)], None)
    assert read(HERMES, *text) == ([TextDelta(text)], None)


def test_what_follows_a_calls_json_is_text() -> None:
    assert read(HERMES, '<tool_call>{"name": "f" }}}')[0] == [*call(0, arguments="{}"), TextDelta("}}")]


def test_a_call_after_a_failed_one_is_found() -> None:
    assert read(HERMES, f"<tool_call>oops {CALL}")[0] == [TextDelta("<tool_call>oops "), *call(0)]


@pytest.mark.parametrize(
    "arguments", ['{"tag": "</tool_call>"}', '{"quote": "\\"}{[\\\\"}', "{}", '{ "spaces" : 1.10 }', '{"é": "你"}']
)
def test_arguments_are_told_exactly_as_written(arguments: str) -> None:
    text = f'<tool_call>{{"name": "f", "arguments": {arguments}}}</tool_call>'
    assert read(HERMES, text)[0] == call(0, arguments=arguments)
    assert read(HERMES, *text)[0] == call(0, arguments=arguments)


def test_arguments_in_a_string_and_missing_ones() -> None:
    assert read(HERMES, '<tool_call>{"name": "f", "arguments": "{\\"x\\": 1}"}')[0] == call(0, arguments='{"x": 1}')
    assert read(HERMES, '<tool_call>{"name": "now"}</tool_call>')[0] == call(0, "now", "{}")
    assert read(HERMES, '<tool_call>{"name": "f", "parameters": {"x": 1}}')[0] == call(0, arguments='{"x": 1}')


def test_llama_writes_bare_json() -> None:
    one = '{"name": "f", "parameters": {"x": [1, "a"]}}'
    assert read(LLAMA3, one)[0] == call(0)
    assert read(LLAMA3, *f"\n<|python_tag|>{one}; {one}")[0] == [*call(0), *call(1)]
    assert read(LLAMA3, f"Look: {one}")[0] == [TextDelta(f"Look: {one}")]
    assert read(LLAMA3, f"Look: <|python_tag|>{one}")[0] == [TextDelta("Look: "), *call(0)]


@pytest.mark.parametrize("text", ['{"name": "Bob", "age": 3}', '{"a": 1} {"b": 2}', '  {"open": ', "{", "no { JSON }"])
def test_json_that_is_an_answer_is_no_call(text: str) -> None:
    assert read(LLAMA3, text) == ([TextDelta(text)], None)
    assert read(LLAMA3, *text) == ([TextDelta(text)], None)


def test_mistral_writes_a_list() -> None:
    one = f'{{"name": "f", "arguments": {ARGUMENTS}}}'
    assert read(MISTRAL, f"[TOOL_CALLS] [{one}, {one}]")[0] == [*call(0), *call(1)]
    assert read(MISTRAL, *f"Well. [TOOL_CALLS][{one}] ok")[0] == [TextDelta("Well. "), *call(0), TextDelta(" ok")]
    for text in ("[TOOL_CALLS][]", f'[TOOL_CALLS][{one}, {{"name": 1}}]', "[TOOL_CALLS]f{}", "[TOOL_CALLS][1"):
        assert read(MISTRAL, text)[0] == [TextDelta(text)]


def test_text_is_never_read_for_calls_without_a_format() -> None:
    assert read(OutputRules(9), CALL)[0] == [TextDelta(CALL)]


def test_reasoning_is_told_apart() -> None:
    text = "<think>\nhm <b>\n</think>\n\nYes."
    expected = [ReasoningDelta("\nhm <b>\n"), TextDelta("\n\nYes.")]
    assert read(THINKING, text)[0] == read(THINKING, *text)[0] == expected
    assert read(THINKING, "<think>cut sho</thi")[0] == [ReasoningDelta("cut sho</thi")]
    assert read(OutputRules(9), text)[0] == [TextDelta(text)]


def test_reasoning_streams() -> None:
    assert fed(THINKING, "<think>", "one", " two<", "/think>")[1:3] == [
        [ReasoningDelta("one")],
        [ReasoningDelta(" two")],
    ]


def test_calls_after_reasoning() -> None:
    rules = OutputRules(100, tool_format=ToolFormat.HERMES, reasoning=True)
    assert read(rules, f"<think>{CALL}</think>\n{CALL}")[0] == [ReasoningDelta(CALL), *call(0)]


def test_a_stop_string_inside_a_call_leaves_text() -> None:
    rules = OutputRules(100, ("arguments",), tool_format=ToolFormat.HERMES)
    assert read(rules, CALL) == ([TextDelta('<tool_call>\n{"name": "f", "')], "arguments")


def logprob(token: str) -> TokenLogprob:
    return TokenLogprob(token.encode(), -1.0)


def with_logprobs(rules: OutputRules, *tokens: str) -> list[list[tuple[str, str]]]:
    """Per token and for the end: (text, its logprobs' tokens) of each text delta."""
    reader = OutputReader(rules)
    found = [reader.feed(token.encode(), logprob(token))[0] for token in tokens]
    return [
        [(d.text, "|".join(p.token.decode() for p in d.logprobs)) for d in deltas if isinstance(d, TextDelta)]
        for deltas in (*found, reader.finish())
    ]


def test_logprobs_come_with_their_text() -> None:
    assert with_logprobs(OutputRules(9, top_logprobs=0), "a", "b") == [[("a", "a")], [("b", "b")], []]


def test_logprobs_of_text_held_back_come_with_it() -> None:
    rules = OutputRules(9, ("xyz",))
    assert with_logprobs(rules, "ax", "y", "b") == [[("a", "ax")], [], [("xyb", "y|b")], []]
    assert with_logprobs(rules, "x", "ax") == [[], [("xa", "x|ax")], [("x", "")]]
    assert with_logprobs(rules, "b", "x", "x") == [[("b", "b")], [], [("x", "x")], [("x", "x")]]


def test_logprobs_of_torn_characters_and_empty_tokens_are_not_lost() -> None:
    reader = OutputReader(OutputRules(9))
    first, second = "é".encode()[:1], "é".encode()[1:]
    assert reader.feed(first, TokenLogprob(first, -1.0))[0] == []
    (delta,) = reader.feed(second, TokenLogprob(second, -2.0))[0]
    assert isinstance(delta, TextDelta)
    assert [p.token for p in delta.logprobs] == [first, second]
    assert reader.feed(b"", TokenLogprob(b"", -3.0))[0] == []
    assert reader.finish() == [TextDelta("", logprobs=(TokenLogprob(b"", -3.0),))]


def test_logprobs_of_calls_come_with_the_end() -> None:
    assert with_logprobs(HERMES, CALL, "\n") == [[], [], [("", f"{CALL}|\n")]]


def test_logprobs_of_a_stop_string_are_not_lost() -> None:
    assert with_logprobs(OutputRules(9, ("END",)), "a", "EN", "D") == [[("a", "a")], [], [], [("", "EN|D")]]
