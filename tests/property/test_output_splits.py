"""However an answer's bytes are split into tokens, the reader tells the same; and it tells the text up to the first stop."""

from hypothesis import given
from hypothesis import strategies as st

from keepwarm.core.event import Delta, ReasoningDelta, TextDelta, TokenLogprob, ToolCallDelta
from keepwarm.core.prompt import OutputRules, ToolFormat
from keepwarm.engine.output import OutputReader

PIECES = [
    "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "<|python_tag|>", "<think>", "</think>", "<", ">", "[", "]", "{", "}", ";",
    '{"name": "f", "arguments": {"x": "}"}}', '{"name": "g", "parameters": {}}', '[{"name": "h"}]', '"', "\\", "\n", " ",
    "a", "ab", "b", "é", "你好", "🙂",
]  # fmt: skip
texts = st.lists(st.sampled_from(PIECES), max_size=12).map("".join)
few = st.text("ab<é", max_size=30)
stops = st.lists(st.text("ab<é", min_size=1, max_size=4), max_size=3).map(tuple)
rules = st.builds(
    OutputRules,
    max_tokens=st.just(100),
    stop=stops,
    tool_format=st.sampled_from([None, *ToolFormat]),
    reasoning=st.booleans(),
)


@st.composite
def splits(draw: st.DrawFn, raw: bytes) -> list[bytes]:
    cuts = sorted(draw(st.lists(st.integers(0, len(raw)), max_size=12)))
    return [raw[a:b] for a, b in zip([0, *cuts], [*cuts, len(raw)], strict=True)]


def read(rules: OutputRules, pieces: list[bytes]) -> tuple[list[Delta], str | None, list[TokenLogprob]]:
    reader = OutputReader(rules)
    deltas: list[Delta] = []
    stop = None
    for i, piece in enumerate(pieces):
        found, stop = reader.feed(piece, TokenLogprob(piece, -float(i)))
        deltas += found
        if stop is not None:
            break
    deltas += reader.finish()
    logprobs = [p for delta in deltas if isinstance(delta, TextDelta) for p in delta.logprobs]
    return joined(deltas), stop, logprobs


def joined(deltas: list[Delta]) -> list[Delta]:
    merged: list[Delta] = []
    for delta in deltas:
        last = merged[-1] if merged else None
        if isinstance(delta, TextDelta):
            if isinstance(last, TextDelta):
                merged[-1] = TextDelta(last.text + delta.text)
            elif delta.text:
                merged.append(TextDelta(delta.text))
        elif isinstance(delta, ReasoningDelta) and isinstance(last, ReasoningDelta):
            merged[-1] = ReasoningDelta(last.text + delta.text)
        else:
            merged.append(delta)
    return merged


def first_stop(text: str, stops: tuple[str, ...]) -> tuple[str, str | None]:
    """The text before the stop string that is complete first, found the slow way."""
    for end in range(1, len(text) + 1):
        ended = [stop for stop in stops if text[:end].endswith(stop)]
        if ended:
            stop = max(ended, key=len)
            return text[: end - len(stop)], stop
    return text, None


@given(st.data(), few, stops)
def test_text_is_cut_at_the_first_stop_string(data: st.DataObject, text: str, stops: tuple[str, ...]) -> None:
    deltas, stop, _ = read(OutputRules(100, stops), data.draw(splits(text.encode())))
    told, expected_stop = first_stop(text, stops)
    assert (deltas, stop) == ([TextDelta(told)] if told else [], expected_stop)


@given(st.data(), st.one_of(texts, few), rules)
def test_splits_never_matter(data: st.DataObject, text: str, rules: OutputRules) -> None:
    raw = text.encode()
    whole = read(rules, [raw])
    split = read(rules, data.draw(splits(raw)))
    single = read(rules, [raw[i : i + 1] for i in range(len(raw))])
    assert whole[:2] == split[:2] == single[:2]


@given(st.data(), st.binary(max_size=40), rules)
def test_bytes_that_are_no_text_are_replaced_the_same_way(data: st.DataObject, raw: bytes, rules: OutputRules) -> None:
    deltas, stop, _ = read(rules, data.draw(splits(raw)))
    assert (deltas, stop) == read(rules, [raw])[:2]
    if rules.tool_format is None and not rules.reasoning and stop is None:
        assert "".join(d.text for d in deltas if isinstance(d, TextDelta)) == raw.decode("utf-8", "replace")


@given(st.data(), texts, rules)
def test_no_logprob_is_lost_or_told_early(data: st.DataObject, text: str, rules: OutputRules) -> None:
    pieces = data.draw(splits(text.encode()))
    _, stop, logprobs = read(rules, pieces)
    assert [p.token for p in logprobs] == pieces[: len(logprobs)]
    assert stop is not None or len(logprobs) == len(pieces)


@given(texts, st.sampled_from([None, *ToolFormat]))
def test_nothing_but_calls_and_the_space_around_them_is_lost(text: str, tool_format: ToolFormat | None) -> None:
    deltas, _, _ = read(OutputRules(100, tool_format=tool_format), [text.encode()])
    if any(isinstance(delta, ToolCallDelta) for delta in deltas):
        rest = text
        for delta in deltas:  # what was told as text is in the answer, in order
            if isinstance(delta, TextDelta):
                assert delta.text in rest
                rest = rest[rest.index(delta.text) + len(delta.text) :]
    else:
        assert "".join(d.text for d in deltas if isinstance(d, TextDelta)) == text
