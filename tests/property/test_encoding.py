"""Tokenising rendered text against a naive twin; hostile text never gives control tokens; marks never change tokens."""

from hypothesis import given
from hypothesis import strategies as st

from keepwarm.cache.encode import Encoder, Sentinels, Shield, weave
from keepwarm.cache.render import Templating
from keepwarm.core.request import Message, TextPart, ToolChoice
from keepwarm.engine import SpecialToken
from tests.tokenizers import CHATML, SPECIALS, ByteTokenizer, WordTokenizer, naive_encode

SHIELD, MARK = "\ue000", "\ue001"
SENTINELS = Sentinels(SHIELD, MARK)
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
    marked = [Message("user", tuple(TextPart(text, mark) for text, mark in parts)) for parts in contents]
    plain = [Message("user", (TextPart(message.text),)) for message in marked]
    with_marks = subject.build("t", marked, (), ToolChoice(), object_tokens=None).prompt
    without = subject.build("t", plain, (), ToolChoice(), object_tokens=None).prompt
    assert with_marks.tokens.tolist() == without.tokens.tolist()
    assert without.marks == ()
    assert list(with_marks.marks) == sorted(set(with_marks.marks))
    assert all(1 <= mark <= with_marks.n_tokens for mark in with_marks.marks)


@given(texts, texts)
def test_what_follows_an_object_begins_with_its_prefix(held: str, question: str) -> None:
    subject = Templating(WordTokenizer(CHATML), fragment_cache_bytes=1000)
    messages = [Message("system", (TextPart(held),))]
    prefix = subject.object_prefix("t", messages, ()).prompt
    asked = [*messages, Message("user", (TextPart(question),))]
    whole = subject.build("t", asked, (), ToolChoice(), object_tokens=prefix.n_tokens).prompt
    assert whole.tokens[: prefix.n_tokens].tolist() == prefix.tokens.tolist()
    assert whole.marks == prefix.marks
