"""Kimi's upload form, cut anywhere; the parser must not care."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keepwarm.core.errors import ApiError, ErrorKind
from keepwarm.core.file import NewFile
from keepwarm.dialects.kimi_files import FileForm, KimiFiles

BOUNDARY = b"--b"
PURPOSE = b'Content-Disposition: form-data; name="purpose"\r\n\r\nfile-extract'
HEAD = b'Content-Disposition: form-data; name="file"; filename="%b"\r\nContent-Type: text/plain\r\n\r\n%b'


def form(*parts: bytes) -> bytes:
    return b"".join(b"--" + BOUNDARY + b"\r\n" + part + b"\r\n" for part in parts) + b"--" + BOUNDARY + b"--\r\n"


def fed(body: bytes, cuts: list[int]) -> tuple[FileForm, bytes]:
    reader, data = FileForm(BOUNDARY), b""
    for start, end in itertools.pairwise([0, *sorted({cut % (len(body) + 1) for cut in cuts}), len(body)]):
        data += reader.feed(body[start:end])
    reader.finish()
    return reader, data


@given(
    st.one_of(
        st.binary(max_size=200), st.lists(st.sampled_from([b"\r\n", b"--", BOUNDARY, b"\r", b"x"])).map(b"".join)
    ),
    st.lists(st.integers(0, 10_000), max_size=30),
    st.booleans(),
)
def test_a_form_cut_anywhere_gives_the_files_bytes(data: bytes, cuts: list[int], is_file_first: bool):
    if b"\r\n--" + BOUNDARY in b"\r\n" + data:
        return  # that would end the part: a client takes another boundary
    parts = [HEAD % (b"a.txt", data), PURPOSE]
    reader, got = fed(form(*(parts if is_file_first else parts[::-1])), cuts)
    assert got == data
    assert reader.new == NewFile("kimi", "a.txt", "text/plain", id_prefix="file-")


@pytest.mark.parametrize(
    "sent, name",
    [
        (b"a.txt", "a.txt"),
        ("größe.txt".encode(), "größe.txt"),
        ("größe.txt".encode("latin-1"), "größe.txt"),
        ("文件.txt".encode(), "文件.txt"),
        (b"../../etc/passwd", "passwd"),
        (b"C:\\Users\\me\\a.txt", "a.txt"),
        (b"", ""),
    ],
)
def test_a_name_is_text_without_folders(sent: bytes, name: str):
    reader, _ = fed(form(PURPOSE, HEAD % (sent, b"x")), [])
    assert reader.new is not None
    assert reader.new.name == name


@given(st.binary(max_size=300))
def test_rubbish_is_refused_in_order(body: bytes):
    with pytest.raises(ApiError) as caught:
        fed(b"--" + BOUNDARY + b"\r\n" + body, [])
    assert caught.value.kind is ErrorKind.INVALID_REQUEST


@pytest.mark.parametrize(
    "content_type", ["", "multipart/form-data", "multipart/mixed; boundary=x", "text/plain; boundary=x"]
)
def test_what_is_no_form(content_type: str):
    with pytest.raises(ApiError, match="multipart/form-data"):
        KimiFiles().form({"content-type": content_type})


def test_quoted_boundaries_are_read():
    KimiFiles().form({"content-type": 'Multipart/Form-Data; boundary="a b"; charset=utf-8'})
