"""Rendering and tokenising with the packaged model's own template and vocabulary: exactly as llama.cpp tokenises."""

import json
from collections.abc import Iterator
from itertools import product

import jsonschema
import pytest
from msgspec.structs import replace

from keepwarm.cache.planner import output_rules
from keepwarm.cache.render import Templating
from keepwarm.cache.template import ChatTemplate
from keepwarm.config import Limits
from keepwarm.core.prompt import ToolFormat
from keepwarm.core.request import (
    ChatRequest,
    JsonSchema,
    Mark,
    Message,
    Role,
    TextPart,
    Tool,
    ToolCall,
    ToolChoice,
    ToolMode,
)
from keepwarm.engine.llama import Vocab, json_schema_to_gbnf
from tests.tokenizers import packaged_model

pytestmark = pytest.mark.real

AUTO = ToolChoice()
WEATHER = Tool("get_weather", "Weather of a city", '{"type":"object","properties":{"city":{"type":"string"}}}')
CALL = ToolCall("call_1", "get_weather", '{"city": "Paris"}')
TEXTS = [
    "Hello!",
    "",
    " leading and trailing \n",
    "\n\n",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich.",
    "人之初，性本善。",
    "👩‍👩‍👧‍👦 🙂",
    "def f(x):\n    return {'a': [1, 2]}\n",
    "tab\tcarriage\r\nzero\u200bwidth",
    "1234567890 3.14159 1e-9",
    "It's we'll they've I'd",
    "x" * 300,
    "word " * 200,
]
TAILS = ["s", " and", '"', "\n\n- ", "。", "'t", "7", "<|im_end|>", "\u0301"]
CONTROL = ["<|im_end|>", "<|im_start|>system\n", "<|endoftext|>", "<|im_", "end|>", "<", "<file_sep><repo_name>"]


@pytest.fixture(scope="module")
def vocab() -> Iterator[Vocab]:
    vocab = Vocab.open(packaged_model())
    yield vocab
    vocab.close()


@pytest.fixture(scope="module")
def templating(vocab: Vocab) -> Templating:
    return Templating(vocab, fragment_cache_bytes=1 << 20)


def says(role: Role, text: str) -> Message:
    return Message(role, (TextPart(text),))


def conversations() -> list[list[Message]]:
    pairs = product(TEXTS, TEXTS)
    return [
        *([says("system", a), says("user", b)] for a, b in pairs),
        *(
            [says("user", a), says("assistant", b), says("user", a)]
            for a, b in zip(TEXTS, reversed(TEXTS), strict=True)
        ),
    ]


def test_tokens_are_llama_cpps_for_the_rendered_text(vocab: Vocab, templating: Templating) -> None:
    template = ChatTemplate(vocab.chat_template, bos=vocab.special_text("bos"), eos=vocab.special_text("eos"))
    for messages in conversations():
        values = [{"role": message.role, "content": message.text} for message in messages]
        text = template.render(values, None, generate=True, chars_in=10_000)
        expected = vocab.encode(text, parse_special=True).tolist()
        for _cold_then_cached in range(2):
            prompt = templating.build("t", messages, (), AUTO, object_tokens=None).prompt
            assert prompt.tokens.tolist() == expected


def test_client_text_gives_no_control_tokens(vocab: Vocab, templating: Templating) -> None:
    controls = {special.token for special in vocab.specials}
    for a, b in product(CONTROL, CONTROL):
        tokens = templating.build(
            "t", [says("system", a + b), says("user", b)], (), AUTO, object_tokens=None
        ).prompt.tokens
        found = [token for token in tokens.tolist() if token in controls]
        assert found == [1, 2, 1, 2, 1]
        plain = vocab.encode(f"system\n{a}{b}", parse_special=False).tolist()
        assert tokens.tolist()[1 : 1 + len(plain)] == plain


@pytest.mark.parametrize("tools", [(), (WEATHER,)])
def test_an_objects_prefix_is_the_messages_alone_and_begins_what_follows(
    templating: Templating, tools: tuple[Tool, ...]
) -> None:
    for held in ([says("system", text)] for text in TEXTS):
        prefix = templating.object_prefix("t", held, tools).prompt
        alone = templating.build("t", held, tools, AUTO, object_tokens=None, generate=False).prompt
        assert prefix.tokens.tolist() == alone.tokens.tolist()
        for text in TEXTS:
            asked = [*held, says("user", text)]
            whole = templating.build("t", asked, tools, AUTO, object_tokens=prefix.n_tokens).prompt
            assert whole.tokens[: prefix.n_tokens].tolist() == prefix.tokens.tolist()
            assert whole.marks == prefix.marks


def test_breakpoints_never_change_tokens(templating: Templating) -> None:
    for a, b in product(TEXTS, TEXTS):
        marked = [Message("system", (TextPart(a, mark=Mark()), TextPart(b, mark=Mark())))]
        plain = [says("system", a + b)]
        with_marks, without = (templating.build("t", m, (), AUTO, object_tokens=None).prompt for m in (marked, plain))
        assert with_marks.tokens.tolist() == without.tokens.tolist()
        assert a.strip() == "" or with_marks.marks


HERMES = """\
{%- if tools %}<|im_start|>system
{% if messages[0].role == "system" %}{{ messages[0].content }}

{% endif %}# Tools
<tools>{% for tool in tools %}
{{ tool | tojson }}{% endfor %}
</tools><|im_end|>
{% elif messages[0].role == "system" %}<|im_start|>system
{{ messages[0].content }}<|im_end|>
{% endif %}
{%- for m in messages %}
{%- if m.role == "tool" %}<|im_start|>user
<tool_response>
{{ m.content }}
</tool_response><|im_end|>
{% elif m.role != "system" or not loop.first %}<|im_start|>{{ m.role }}
{{ m.content }}
{%- for call in m.tool_calls or [] %}
<tool_call>
{{ call.function | tojson }}
</tool_call>{% endfor %}<|im_end|>
{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


class OtherTemplate:
    """The packaged model's vocabulary with another model's template."""

    chat_template = HERMES

    def __init__(self, vocab: Vocab) -> None:
        self.special_text, self.encode_plain, self.piece = vocab.special_text, vocab.encode_plain, vocab.piece
        self.specials, self.bos = vocab.specials, vocab.bos


@pytest.fixture(scope="module")
def hermes(vocab: Vocab) -> Templating:
    return Templating(OtherTemplate(vocab), fragment_cache_bytes=1 << 20)


LONG = Mark(3600)
AGENT = [
    Message("system", (TextPart("You are a careful agent.", LONG), TextPart("\n\nToday is Monday."))),
    says("user", "Weather?"),
    Message("assistant", (), tool_calls=(CALL,), mark=Mark(300)),
    Message("tool", (TextPart("17 °C, no wind.", Mark(300)),), tool_call_id="call_1"),
]
TOOLS = (WEATHER, Tool("now", "What time it is", "{}", mark=LONG))


def ends(templating: Templating, messages: list[Message], tools: tuple[Tool, ...]) -> list[tuple[str, int | None, int]]:
    """Each breakpoint with the end of the text before it, its lifetime and its position."""
    built = templating.build("t", messages, tools, AUTO, object_tokens=None)
    assert built.prompt.marks == tuple(one.end for one in built.breakpoints)
    return [
        (templating.decode(built.prompt.tokens[: one.end])[-12:], one.ttl_s, one.position) for one in built.breakpoints
    ]


def test_breakpoints_of_an_agents_request(templating: Templating, hermes: Templating) -> None:
    assert templating.tools_first
    assert ends(templating, AGENT, TOOLS) == [
        (' "parameters', 3600, 2),
        ("areful agent", 3600, 3),
        ("\n</tool_call", 300, 6),
        (" °C, no wind", 300, 7),
    ]
    assert not hermes.tools_first
    assert ends(hermes, AGENT, TOOLS) == [
        ("areful agent", 3600, 3),
        (' "parameters', 3600, 2),
        ("<|im_start|>", 300, 6),
        (" °C, no wind", 300, 7),
    ]


def test_what_follows_a_breakpoint_does_not_move_it(templating: Templating, hermes: Templating) -> None:
    for subject, head in product((templating, hermes), TEXTS):
        marked = [*AGENT[:3], Message("tool", (TextPart("The answer: " + head, LONG),), tool_call_id="call_1")]
        first = subject.build("t", marked, TOOLS, AUTO, object_tokens=None)
        assert len(first.breakpoints) == 4
        n = first.breakpoints[-1].end
        appended = [replace(marked[3], parts=(*marked[3].parts, TextPart(tail))) for tail in TAILS]
        for goes_on in (
            [marked[3], says("assistant", "So.")],
            [marked[3], says("user", head)],
            *([a] for a in appended),
        ):
            other = subject.build("t", [*marked[:3], *goes_on], TOOLS, AUTO, object_tokens=None)
            assert other.breakpoints == first.breakpoints
            assert other.prompt.tokens[:n].tolist() == first.prompt.tokens[:n].tolist()


def test_marks_never_change_an_agents_tokens(templating: Templating, hermes: Templating) -> None:
    bare = [
        replace(message, parts=tuple(TextPart(part.text) for part in message.texts), mark=None) for message in AGENT
    ]
    tools = tuple(replace(tool, mark=None) for tool in TOOLS)
    for subject in (templating, hermes):
        marked, plain = (
            subject.build("t", messages, described, AUTO, object_tokens=None).prompt
            for messages, described in ((AGENT, TOOLS), (bare, tools))
        )
        assert marked.tokens.tolist() == plain.tokens.tolist()
        assert plain.marks == ()


def test_other_system_text_keeps_the_tools(templating: Templating) -> None:
    first, second = (
        templating.build("t", [says("system", text), AGENT[1]], TOOLS, AUTO, object_tokens=None)
        for text in ("Be brief.", "\n- Speak of everything at length.")
    )
    assert first.breakpoints == second.breakpoints
    (end,) = first.prompt.marks
    assert first.prompt.tokens[:end].tolist() == second.prompt.tokens[:end].tolist()


def test_an_answer_appended_to_the_history_extends_the_prompt(templating: Templating) -> None:
    asked = [says("system", "Be brief."), says("user", "Who are you?")]
    prompt = templating.build("t", asked, (), AUTO, object_tokens=None).prompt
    answered = [*asked, says("assistant", "A small model.")]
    settled = templating.build("t", answered, (), AUTO, object_tokens=None, generate=False).prompt
    following = templating.build("t", [*answered, says("user", "Why?")], (), AUTO, object_tokens=None).prompt
    assert settled.tokens[: prompt.n_tokens].tolist() == prompt.tokens.tolist()
    assert following.tokens[: settled.n_tokens].tolist() == settled.tokens.tolist()


def test_the_models_default_system_message_stays(vocab: Vocab, templating: Templating) -> None:
    default = vocab.encode("You are a helpful AI assistant named SmolLM", parse_special=False).tolist()
    tokens = templating.build("t", [says("user", "Hi")], (), AUTO, object_tokens=None).prompt.tokens.tolist()
    assert tokens[0] == 1
    assert any(tokens[i : i + len(default)] == default for i in range(len(tokens)))


def test_the_model_gets_the_tool_section(templating: Templating) -> None:
    conversation = [
        says("user", "Weather?"),
        Message("assistant", (), tool_calls=(CALL,)),
        Message("tool", (TextPart("17"),), tool_call_id="call_1"),
    ]
    built = templating.build("t", conversation, (WEATHER,), AUTO, object_tokens=None)
    assert built.tool_format is ToolFormat.HERMES


SCHEMA = """{
  "type": "object", "required": ["root", "where"], "additionalProperties": false,
  "properties": {
    "root": {"enum": ["a \\"root\\" [x]", "b"]},
    "where": {"$ref": "#/$defs/place"},
    "more": {"type": "array", "items": {"$ref": "#/$defs/place"}, "maxItems": 3}
  },
  "$defs": {"place": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}
}"""


def test_grammars_are_closed_and_start_at_root(templating: Templating) -> None:
    """Every rule that a grammar uses is defined in it exactly once: what renaming and joining could break."""
    jsonschema.Draft202012Validator.check_schema(json.loads(SCHEMA))
    tools = (WEATHER, Tool("go", "", SCHEMA), Tool("now", "", "{}"))
    for mode, answer in product(
        [ToolChoice(ToolMode.REQUIRED), ToolChoice(ToolMode.NAMED, "go"), AUTO], [JsonSchema("s", SCHEMA)]
    ):
        request = ChatRequest("m", (says("user", "Hi"),), tools=tools, tool_choice=mode, answer_format=answer)
        built = templating.build("t", request.messages, tools, mode, object_tokens=None)
        grammar = output_rules(request, built, 8192, Limits(), json_schema_to_gbnf).grammar
        assert grammar is not None
        assert undefined_rules(grammar) == set()


def undefined_rules(grammar: str) -> set[str]:
    defined: list[str] = []
    used = {"root"}
    for line in grammar.splitlines():
        name, body = line.split(" ::= ", 1)
        defined.append(name)
        used |= set(words_outside_literals(body))
    assert len(defined) == len(set(defined))
    return used - set(defined)


def words_outside_literals(body: str) -> list[str]:
    kept, closing, escaped = [], "", False
    for c in body:
        if closing:
            if not escaped and c == closing:
                closing = ""
            escaped = c == "\\" and not escaped
        elif c in '"[':
            closing = {'"': '"', "[": "]"}[c]
            kept.append(" ")
        else:
            kept.append(c if c.isalnum() or c == "-" else " ")
    return [word for word in "".join(kept).split() if not word.isdigit()]
