"""Bytes to text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keepwarm.documents import DocumentFault
from keepwarm.documents.plain import clean, decode

TEXTS = {  # long enough to tell the encodings apart
    "cp1252": "Die Überprüfung der größeren Straßen in Köln hat gezeigt, dass viele Häuser über sechzig Jahre alt sind. "
    * 8,
    "shift_jis": "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。何でも薄暗いじめじめした所で泣いていた。"
    * 8,
    "gb18030": "学而时习之,不亦说乎?有朋自远方来,不亦乐乎?人不知而不愠,不亦君子乎?这是论语的第一句话。" * 8,
    "koi8-r": "Все счастливые семьи похожи друг на друга, каждая несчастливая семья несчастлива по-своему. " * 8,
    "euc-kr": "모든 국민은 인간으로서의 존엄과 가치를 가지며, 행복을 추구할 권리를 가진다. 국가는 이를 보장할 의무를 진다. "
    * 8,
}


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\ufeff")))
def test_utf_8_is_read_as_it_is(text: str):
    assert decode(text.encode(), None) == text


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_says_the_encoding_and_is_no_part_of_the_text(encoding: str):
    assert decode("Grüße".encode(encoding), None) == "Grüße"
    assert decode("Grüße".encode(encoding), "latin-1") == "Grüße"


@pytest.mark.parametrize("encoding", ["latin-1", "shift_jis", "utf-16-le"])
def test_a_named_charset_is_believed(encoding: str):
    text = {"latin-1": "Grüße", "shift_jis": "こんにちは", "utf-16-le": "Grüße"}[encoding]
    assert decode(text.encode(encoding), encoding) == text


@pytest.mark.parametrize("encoding", TEXTS)
def test_an_encoding_that_nothing_names_is_found(encoding: str):
    assert decode(TEXTS[encoding].encode(encoding), None) == TEXTS[encoding]


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf_16_without_a_mark_is_found(encoding: str):
    text = "It is a truth universally acknowledged, that a single man must be in want of a wife. " * 8
    assert decode(text.encode(encoding), None) == text


@pytest.mark.parametrize("charset", ["klingon", "zlib", "hex", "rot13"])
def test_a_charset_that_is_none_is_refused(charset: str):
    with pytest.raises(DocumentFault, match=f"charset '{charset}', which is not known"):
        decode(b"abc", charset)


@pytest.mark.parametrize("data, charset", [(b"\xff\xfe\xfd", None), ("Grüße".encode("latin-1"), "utf-8")])
def test_bytes_that_do_not_fit_what_names_them_are_refused(data: bytes, charset: str | None):
    with pytest.raises(DocumentFault, match="is not in the charset"):
        decode(data, charset)


def test_bytes_that_are_no_text_are_refused():
    with pytest.raises(DocumentFault, match="no text in any common encoding"):
        decode(bytes(range(256)) * 16, None)


def test_nothing_is_an_empty_text():
    assert decode(b"", None) == ""


def test_cleaning_leaves_one_kind_of_line_end_and_no_character_that_cannot_be_sent():
    assert clean("a\r\nb\rc\fd\0e\ud800f") == "a\nb\nc\nde?f"
