"""Media types, and how what they name is read."""

import pytest

from keepwarm.documents import DocumentFault, Kind, kind_of
from tests.files import DOCX, PPTX, XLSX


@pytest.mark.parametrize(
    "media_type, expected",
    [
        ("application/pdf", (Kind.PDF, None)),
        ("Application/PDF; version=1.7", (Kind.PDF, None)),
        ("text/plain", (Kind.TEXT, None)),
        ('text/plain; format=flowed; charset="ISO-8859-1"', (Kind.TEXT, "ISO-8859-1")),
        ("text/plain;charset=utf-8", (Kind.TEXT, "utf-8")),
        ("text/x-python", (Kind.TEXT, None)),
        ("text/csv", (Kind.TEXT, None)),
        ("application/json", (Kind.TEXT, None)),
        ("text/html;charset=koi8-r", (Kind.HTML, "koi8-r")),
        (DOCX, (Kind.DOCX, None)),
        (PPTX, (Kind.PPTX, None)),
        (XLSX, (Kind.XLSX, None)),
    ],
)
def test_a_media_type_says_how_it_is_read(media_type: str, expected: tuple[Kind, str | None]):
    assert kind_of(media_type) == expected


@pytest.mark.parametrize("media_type", ["image/png", "application/msword", "application/octet-stream", "text/rtf"])
def test_types_that_are_not_read_are_named_in_the_error(media_type: str):
    with pytest.raises(DocumentFault, match=f"media type {media_type}, which is not read here; what is: PDF"):
        kind_of(media_type)


@pytest.mark.parametrize("media_type", ["", "pdf", "text/plain text/html", "a/" + "\n"])
def test_what_is_no_media_type_is_refused(media_type: str):
    with pytest.raises(DocumentFault, match="no media type"):
        kind_of(media_type)
