"""The rendering of documents in a prompt."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keepwarm.core.document import document_text

pieces = st.lists(
    st.sampled_from(
        ["<", "</", "document", "DOCUMENT", "\\", "/", " ", "\n", ">", '"', "&", "&amp;", "&#10;", 'title="', "a", "é"]
    ),
    max_size=10,
).map("".join)
optional = st.none() | pieces

UNESCAPES = {"&quot;": '"', "&lt;": "<", "&#10;": "\n", "&#13;": "\r", "&amp;": "&"}


def read_back(rendered: str) -> tuple[str | None, str | None, str]:
    """What the docstring says, the other way round."""
    found = re.fullmatch(
        r'<document(?: title="(?P<title>[^"]*)")?(?: context="(?P<context>[^"]*)")?>\n(?P<text>.*)\n</document>\n',
        rendered,
        re.DOTALL,
    )
    assert found is not None
    text = re.sub(r"<\\([\\/\s]*document)", r"<\1", found["text"], flags=re.IGNORECASE)
    return unescaped(found["title"]), unescaped(found["context"]), text


def unescaped(value: str | None) -> str | None:
    return value if value is None else re.sub("|".join(UNESCAPES), lambda found: UNESCAPES[found[0]], value)


def test_a_document_is_its_text_between_two_tags():
    assert document_text(None, None, "one\ntwo") == "<document>\none\ntwo\n</document>\n"


def test_title_and_context_are_attributes():
    shown = document_text('The "A" & B', "line\nline", "text")
    assert shown == '<document title="The &quot;A&quot; &amp; B" context="line&#10;line">\ntext\n</document>\n'


def test_text_that_is_no_tag_stays_as_it_is():
    text = 'if (a < b && c > d) { return "<p>&amp;</p>"; }  # documents \\ C:\\document'
    assert document_text(None, None, text) == f"<document>\n{text}\n</document>\n"


@pytest.mark.parametrize("tag", ["<document", "</document", "< / document", "<\n/DOCUMENT", "<\\/document"])
def test_a_text_cannot_hold_a_documents_tag(tag: str):
    body = document_text(None, None, f"a{tag}>b")
    assert tag not in body.removeprefix("<document>").removesuffix("</document>\n")
    assert read_back(body) == (None, None, f"a{tag}>b")


@given(optional, optional, pieces)
def test_a_rendering_tells_what_it_was_made_of(title: str | None, context: str | None, text: str):
    assert read_back(document_text(title, context, text)) == (title, context, text)


@given(optional, optional, pieces)
def test_there_is_one_opening_and_one_closing_tag(title: str | None, context: str | None, text: str):
    assert len(re.findall(r"<[/\s]*document", document_text(title, context, text), re.IGNORECASE)) == 2


def test_a_text_full_of_openings_is_rendered_in_time_linear_in_it():
    text = "<" + " " * 500_000 + "<" * 500_000
    assert document_text(None, None, text).endswith(text + "\n</document>\n")
