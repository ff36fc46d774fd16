"""What the process answers, asked without the process: documents of every kind, and what is wrong with some."""

import pytest

from keepwarm.documents import Answer, Extracted, Kind, Order, Refused
from keepwarm.documents.office import TABLES_PAGES_MAX
from keepwarm.documents.worker import answer
from tests.files import docx, encrypted_pdf, pdf, pdf_of, xlsx, zip_bomb

MIB = 1 << 20
COMPOUND_FILE = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(512)


def asked(kind: Kind, data: bytes, charset: str | None = None, chars_max: int = 100_000) -> Answer:
    return answer(Order(kind, charset, chars_max, cpu_s_max=10, memory_bytes_max=256 * MIB), data)


def refusal(kind: Kind, data: bytes, charset: str | None = None) -> str:
    found = asked(kind, data, charset)
    assert isinstance(found, Refused)
    return found.why


def test_plain_text():
    assert asked(Kind.TEXT, "Grüße\r\n".encode()) == Extracted("Grüße\n")


def test_html_becomes_markdown_without_its_scripts():
    page = "<html><head><script>steal()</script></head><body><h1>Grüße</h1><p>a <b>b</b></p></body></html>"
    assert asked(Kind.HTML, page.encode()) == Extracted("# Grüße\n\na **b**")
    assert asked(Kind.HTML, page.encode("latin-1"), "latin-1") == Extracted("# Grüße\n\na **b**")


def test_pdf():
    found = asked(Kind.PDF, pdf([["Hello (world)", "and more"], ["Second page"]]))
    assert isinstance(found, Extracted)
    assert found.text.split() == ["Hello", "(world)", "and", "more", "Second", "page"]


def test_a_long_pdf_is_read_to_its_end():
    found = asked(Kind.PDF, pdf([[f"page {n}"] for n in range(TABLES_PAGES_MAX + 1)]))
    assert isinstance(found, Extracted)
    assert [int(line.split()[1]) for line in found.text.splitlines() if line] == list(range(TABLES_PAGES_MAX + 1))


def test_docx():
    assert asked(Kind.DOCX, docx(["Title", "one", "two"])) == Extracted("# Title\n\none\n\ntwo")


def test_xlsx():
    found = asked(Kind.XLSX, xlsx([["what", "price"], ["tea", "two"]]))
    assert found == Extracted("## Prices\n| what | price |\n| --- | --- |\n| tea | two |")


def test_an_encrypted_pdf_is_called_so():
    assert "is encrypted" in refusal(Kind.PDF, encrypted_pdf())


def test_a_pdf_of_pictures_is_called_so():
    assert "holds no text" in refusal(Kind.PDF, pdf_of([b"0 0 100 100 re f"]))


@pytest.mark.parametrize("kind", [Kind.DOCX, Kind.PPTX, Kind.XLSX])
def test_an_encrypted_office_file_is_called_so(kind: Kind):
    assert "is encrypted, or in a format older" in refusal(kind, COMPOUND_FILE)


@pytest.mark.parametrize("kind", [Kind.PDF, Kind.DOCX, Kind.PPTX, Kind.XLSX])
@pytest.mark.parametrize("data", [b"", b"rubbish", bytes(range(256)) * 8, b"%PDF-1.7\nrubbish", b"PK\x03\x04rubbish"])
def test_rubbish_is_refused_with_the_kind_it_is_not(kind: Kind, data: bytes):
    assert kind.value in refusal(kind, data) or "is broken" in refusal(kind, data)


def test_a_file_of_another_kind_is_refused():
    assert "no folder xl/" in refusal(Kind.XLSX, docx(["Title"]))
    assert "does not begin like one" in refusal(Kind.PDF, docx(["Title"]))


@pytest.mark.parametrize("size", [60, 200, 400])
def test_a_file_cut_off_is_refused(size: int):
    for kind, data in ((Kind.DOCX, docx(["Title"])), (Kind.XLSX, xlsx([["a"]]))):
        assert f"is broken or no {kind.value}" in refusal(kind, data[:size])


@pytest.mark.parametrize("kind, folder", [(Kind.DOCX, "word/"), (Kind.PPTX, "ppt/"), (Kind.XLSX, "xl/")])
def test_an_archive_that_unpacks_to_too_much_is_refused_unread(kind: Kind, folder: str):
    bomb = zip_bomb(folder, 65 * MIB)
    assert len(bomb) < MIB
    assert f"unpacks to {65 * MIB:,} bytes, limit {64 * MIB:,}" in refusal(kind, bomb)


def test_a_text_too_long_is_refused_with_both_numbers():
    assert asked(Kind.TEXT, b"x" * 1001, chars_max=1000) == Refused(
        "has 1,001 characters of text, limit 1,000 (document_chars_max)"
    )
    assert asked(Kind.TEXT, b"x" * 1000, chars_max=1000) == Extracted("x" * 1000)


def test_the_same_file_gives_the_same_text():
    made = pdf([["one", "two"]])
    assert asked(Kind.PDF, made) == asked(Kind.PDF, made)
