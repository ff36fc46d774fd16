"""Tokenising rendered text against a naive twin; hostile text never gives control tokens; marks never change tokens."""

from functools import cache

from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from keepwarm.cache.encode import Encoder, Shield, weave
from keepwarm.cache.render import Templating
from keepwarm.core.request import Mark, Message, TextPart, Tool, ToolCall, ToolChoice
from keepwarm.engine import SpecialToken
from tests.tokenizers import CHATML, SPECIALS, ByteTokenizer, WordTokenizer, naive_encode

SHIELD = "\ue000"
PIECES = [
    *(special.text for special in SPECIALS),
    "<|",
    "|>",
    "im_",
    "end",
    "[",
    "]",
    "<",
    ">",
    "s",
    " ",
    "\n",
    "é",
    "word",
    "一",
]
texts = st.lists(st.sampled_from(PIECES), max_size=10).map("".join)
# Control tokens that overlap, contain and begin each other.
tangled = st.lists(st.text("ab<", min_size=2, max_size=4), min_size=1, max_size=5, unique=True).map(
    lambda names: tuple(
        SpecialToken(name, 1000 + i) for i, name in enumerate(sorted(names, key=lambda n: (-len(n), n)))
    )
)
templates = st.sampled_from(
    [
        CHATML,
        "{% for m in messages %}<|im_start|>{{ m.content | trim }}<|im_end|>{% endfor %}",
        "{% for m in messages %}<|{{ m.content }}|>{{ m.content }}{% endfor %}",
        "{% for m in messages %}<{{ m.content }}{% endfor %}>",
    ]
)

HERMES = (
    "{% for tool in tools or [] %}<tool>{{ tool | tojson }}</tool>{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
with_tools = st.sampled_from([CHATML, CHATML.replace("message['content']", "(message['content'] | trim)"), HERMES])
TOOL, CALL = Tool("f", "d", "{}"), ToolCall("1", "f", '{"a": 1}')
marks = st.sampled_from([None, None, Mark(), Mark(300), Mark(3600)])
tools = st.lists(st.builds(Tool, st.sampled_from("fgh"), texts, st.just("{}"), marks), min_size=1, max_size=3)


def conversations(mark: st.SearchStrategy[Mark | None], n_max: int) -> st.SearchStrategy[list[Message]]:
    """Up to `n_max` messages of any roles, at least one; some of the assistant's have calls."""
    parts = st.lists(st.builds(TextPart, texts, mark), max_size=3).map(tuple)
    said = st.builds(Message, st.sampled_from(["system", "user", "assistant", "tool"]), parts, mark=mark)
    called = st.builds(
        Message, st.just("assistant"), parts, tool_calls=st.sampled_from([(CALL,), (CALL, CALL)]), mark=mark
    )
    return st.lists(said | called, min_size=1, max_size=n_max)


@cache
def templating(template: str, words: bool) -> Templating:
    """One for all examples: compiling a template takes longer than using it."""
    return Templating((WordTokenizer if words else ByteTokenizer)(template), fragment_cache_bytes=1000)


@given(texts, st.booleans())
def test_encode_equals_its_naive_twin(text: str, bos: bool) -> None:
    tokenizer = ByteTokenizer(bos=1004 if bos else None)
    assert Encoder(tokenizer, fragment_cache_bytes=1000).encode("t", text).tokens.tolist() == naive_encode(
        tokenizer, text
    )


@given(tangled, st.text("ab<", max_size=20))
def test_encode_equals_its_twin_with_tangled_control_tokens(specials: tuple[SpecialToken, ...], text: str) -> None:
    tokenizer = ByteTokenizer(specials=specials)
    assert Encoder(tokenizer, fragment_cache_bytes=1000).encode("t", text).tokens.tolist() == naive_encode(
        tokenizer, text
    )


@given(tangled, st.text("ab<", min_size=1, max_size=12), st.text("ab<", max_size=4), st.text("ab<", max_size=4))
def test_no_control_token_holds_a_character_of_shielded_text(
    specials: tuple[SpecialToken, ...], text: str, before: str, after: str
) -> None:
    shield = Shield(specials)
    covered = weave(text, [(position, SHIELD) for position in shield.everywhere(text)])
    whole = before + covered + after
    for special in specials:
        at = whole.find(special.text)
        while at >= 0:
            assert at + len(special.text) <= len(before) or at >= len(before) + len(covered)
            at = whole.find(special.text, at + 1)


@given(templates, st.lists(texts, min_size=1, max_size=3))
def test_client_text_gives_no_control_tokens(template: str, contents: list[str]) -> None:
    subject = Templating(ByteTokenizer(template), fragment_cache_bytes=1000)

    def controls(contents: list[str]) -> list[int]:
        messages = [Message("user", (TextPart(content),)) for content in contents]
        tokens = subject.build("t", messages, (), ToolChoice(), object_tokens=None).prompt.tokens.tolist()
        return [token for token in tokens if token > 255]

    assert controls(contents) == controls(["q"] * len(contents))


@given(
    templates, st.lists(st.lists(st.tuples(texts, st.booleans()), max_size=3), min_size=1, max_size=3), st.booleans()
)
def test_marks_never_change_tokens(template: str, contents: list[list[tuple[str, bool]]], words: bool) -> None:
    subject = Templating((WordTokenizer if words else ByteTokenizer)(template), fragment_cache_bytes=1000)
    marked = [
        Message("user", tuple(TextPart(text, Mark(300) if mark else None) for text, mark in parts))
        for parts in contents
    ]
    plain = [Message("user", (TextPart(message.text),)) for message in marked]
    with_marks = subject.build("t", marked, (), ToolChoice(), object_tokens=None).prompt
    without = subject.build("t", plain, (), ToolChoice(), object_tokens=None).prompt
    assert with_marks.tokens.tolist() == without.tokens.tolist()
    assert without.marks == ()
    assert list(with_marks.marks) == sorted(set(with_marks.marks))
    assert all(1 <= mark <= with_marks.n_tokens for mark in with_marks.marks)


@given(with_tools, st.booleans(), conversations(marks, 3), conversations(st.none(), 2), st.lists(texts, max_size=2))
def test_what_follows_a_mark_never_moves_it(
    template: str, words: bool, head: list[Message], tail: list[Message], appended: list[str]
) -> None:
    subject = templating(template, words)
    built = subject.build("t", head, (TOOL,), ToolChoice(), object_tokens=None)
    last = head[-1]
    if last.mark is None and not last.tool_calls:
        head = [*head[:-1], replace(last, parts=(*last.parts, *map(TextPart, appended)))]
    other = subject.build("t", [*head, *tail], (TOOL,), ToolChoice(), object_tokens=None)
    assert other.breakpoints == built.breakpoints
    assert other.prompt.marks == built.prompt.marks == tuple(one.end for one in built.breakpoints)
    n = max(built.prompt.marks, default=0)
    assert other.prompt.tokens[:n].tolist() == built.prompt.tokens[:n].tolist()


@given(with_tools, st.booleans(), tools, tools, conversations(st.none(), 2), conversations(st.none(), 2))
def test_a_tools_mark_depends_on_the_tools_up_to_it(
    template: str, words: bool, head: list[Tool], tail: list[Tool], one: list[Message], other: list[Message]
) -> None:
    subject = templating(template, words)
    built = subject.build("t", one, head, ToolChoice(), object_tokens=None)
    unmarked = [replace(tool, mark=None) for tool in tail]
    longer = subject.build("t", other, [*head, *unmarked], ToolChoice(), object_tokens=None)
    assert longer.breakpoints == built.breakpoints
    assert len(built.breakpoints) == sum(tool.mark is not None for tool in head)
    n = max(built.prompt.marks, default=0)
    assert longer.prompt.tokens[:n].tolist() == built.prompt.tokens[:n].tolist()


@given(with_tools, st.booleans(), conversations(marks, 3), tools, st.booleans())
def test_marks_anywhere_never_change_tokens(
    template: str, words: bool, messages: list[Message], described: list[Tool], generate: bool
) -> None:
    subject = templating(template, words)
    plain = [replace(m, parts=tuple(TextPart(part.text) for part in m.texts), mark=None) for m in messages]
    bare = [replace(tool, mark=None) for tool in described]
    with_marks, without = (
        subject.build("t", chat, shown, ToolChoice(), object_tokens=None, generate=generate)
        for chat, shown in ((messages, described), (plain, bare))
    )
    assert with_marks.prompt.tokens.tolist() == without.prompt.tokens.tolist()
    assert without.breakpoints == ()
    found = [one.end for one in with_marks.breakpoints]
    assert found == sorted(set(found))
    assert all(1 <= end <= with_marks.prompt.n_tokens for end in found)


@given(texts, texts)
def test_what_follows_an_object_begins_with_its_prefix(held: str, question: str) -> None:
    subject = Templating(WordTokenizer(CHATML), fragment_cache_bytes=1000)
    messages = [Message("system", (TextPart(held),))]
    prefix = subject.object_prefix("t", messages, ()).prompt
    asked = [*messages, Message("user", (TextPart(question),))]
    whole = subject.build("t", asked, (), ToolChoice(), object_tokens=prefix.n_tokens).prompt
    assert whole.tokens[: prefix.n_tokens].tolist() == prefix.tokens.tolist()
    assert whole.marks == prefix.marks
