"""Gemini's files on the wire: what begins an upload, what goes on with it, and how a file is told."""

from collections.abc import Callable

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from keepwarm.core.errors import ApiError, ErrorKind
from keepwarm.core.file import FileState, NewFile, StoredFile
from keepwarm.dialects.gemini_files import GeminiFiles, Step, file_id_of, site

FILES = GeminiFiles(ttl_s=60.0)
RESUMABLE = {"x-goog-upload-protocol": "resumable"}
STORED = StoredFile(
    id="abc",
    tenant="t",
    dialect="gemini",
    key="k" * 20,
    name="",
    media_type="text/plain",
    n_bytes=3_000_000_000,
    sha256=bytes(32),
    created_at=1_788_743_897.438678,
    updated_at=1_788_743_898.0,
    expires_at=None,
    state=FileState.ACTIVE,
    seq=7,
)


@pytest.mark.parametrize(
    "headers, body, expected",
    [
        ({}, b"", NewFile("gemini", ttl_s=60.0)),
        ({}, b'{"file":{"display_name":"d","mime_type":"text/html","size_bytes":"5"}}', NewFile("gemini", "d", "text/html", 5, ttl_s=60.0)),
        ({}, b'{"file":{"displayName":"d","name":"files/x-1"}}', NewFile("gemini", "d", id="x-1", ttl_s=60.0)),
        ({}, b'{"file":{"name":"x"}}', NewFile("gemini", id="x", ttl_s=60.0)),
        (
            {"x-goog-upload-header-content-length": "9", "x-goog-upload-header-content-type": "text/csv", "x-goog-upload-file-name": "a%20b.csv"},
            b'{"file":{"mimeType":"text/html"}}',
            NewFile("gemini", "a b.csv", "text/csv", 9, ttl_s=60.0),
        ),
        ({"x-upload-content-type": "text/csv", "x-upload-content-length": "0"}, b"{}", NewFile("gemini", "", "text/csv", 0, ttl_s=60.0)),
        ({"x-goog-upload-file-name": "gr\xc3\xb6\xc3\x9fe"}, b"{}", NewFile("gemini", "größe", ttl_s=60.0)),
        ({"x-goog-upload-file-name": "gr\xf6\xdfe"}, b"{}", NewFile("gemini", "größe", ttl_s=60.0)),
    ],
)  # fmt: skip
def test_what_a_client_says_ahead(headers, body, expected):
    assert FILES.parse_start({**RESUMABLE, **headers}, [], body) == expected
    assert FILES.parse_start(headers, [("uploadType", "resumable")], body) == expected


@pytest.mark.parametrize(
    "headers, body",
    [
        ({"x-goog-upload-protocol": "multipart"}, b"{}"),
        ({}, b'{"file":{"name":"files/../x"}}'),
        ({}, b'{"file":{"name":"files/-x"}}'),
        ({}, b'{"file":{"name":"files/' + b"x" * 41 + b'"}}'),
        ({}, b'{"file":{"displayName":"' + b"x" * 513 + b'"}}'),
        ({}, b'{"file":{"mimeType":"' + b"x" * 256 + b'"}}'),
        ({"x-goog-upload-header-content-length": "five"}, b"{}"),
        ({"x-goog-upload-header-content-length": "9" * 16}, b"{}"),
    ],
)
def test_what_cannot_begin_an_upload(headers, body):
    with pytest.raises(ApiError) as caught:
        FILES.parse_start({**RESUMABLE, **headers}, [], body)
    assert caught.value.kind is ErrorKind.INVALID_REQUEST


@pytest.mark.parametrize(
    "headers, step",
    [
        ({"x-goog-upload-command": "upload", "x-goog-upload-offset": "8"}, Step(offset=8)),
        ({"x-goog-upload-command": "upload, finalize", "x-goog-upload-offset": "0"}, Step(offset=0, is_finalize=True)),
        ({"x-goog-upload-command": "UPLOAD,Finalize", "x-goog-upload-offset": "0"}, Step(offset=0, is_finalize=True)),
        ({"x-goog-upload-command": "finalize"}, Step(is_finalize=True)),
        ({"x-goog-upload-command": "query"}, Step()),
        ({"x-goog-upload-command": "cancel"}, Step(is_cancel=True)),
    ],
)
def test_commands(headers, step):
    assert FILES.parse_step("POST", headers) == step


@pytest.mark.parametrize(
    "said, step, ends_at",
    [
        ("bytes 0-4/5", Step(is_put=True, offset=0, is_finalize=None, total=5), 5),
        ("bytes 3-4/*", Step(is_put=True, offset=3, is_finalize=None), None),
        ("bytes */5", Step(is_put=True, total=5), None),
        ("bytes */*", Step(is_put=True), None),
        ("bytes */0", Step(is_put=True, is_finalize=True, total=0), 0),
    ],
)
def test_content_ranges(said: str, step: Step, ends_at: int | None):
    parsed = FILES.parse_step("PUT", {"content-range": said})
    assert parsed == step
    assert [n for n in range(7) if parsed.ends_at(n)] == (
        [] if ends_at is None else list(range(7)) if ends_at == 0 else [ends_at]
    )


@pytest.mark.parametrize("path", ["/v1beta/files", "/upload/v1beta/files", "/v1beta/files/x", "/$discovery/rest"])
@pytest.mark.parametrize("mount", ["", "/gemini", "/a/upload/v1/b"])
def test_urls_are_where_the_client_found_us(mount: str, path: str):
    at = site("https", "kw.example:8443", mount + path)
    assert at.uri(STORED) == f"https://kw.example:8443{mount}/v1beta/files/abc"
    url = f"https://kw.example:8443{mount}/upload/v1beta/files?upload_id=u&upload_protocol=resumable"
    assert at.upload_url("u") == url
    assert file_id_of(at.uri(STORED), "p") == "abc"


@pytest.mark.parametrize("uri", ["files/abc", "/v1/files/abc", "http://x/v1beta/files/abc?alt=media"])
def test_ids_in_uris(uri: str):
    assert file_id_of(uri, "p") == "abc"


@pytest.mark.parametrize(
    "uri, kind",
    [
        ("", ErrorKind.INVALID_REQUEST),
        ("gs://bucket/object", ErrorKind.INVALID_REQUEST),
        ("https://www.youtube.com/watch?v=1", ErrorKind.INVALID_REQUEST),
        ("files/", ErrorKind.INVALID_REQUEST),
        ("files/..", ErrorKind.UNKNOWN_FILE),
        ("files/%2e%2e", ErrorKind.UNKNOWN_FILE),
        ("files/ABC", ErrorKind.UNKNOWN_FILE),
        ("files/a\0", ErrorKind.UNKNOWN_FILE),
    ],
)
def test_what_names_no_file(uri: str, kind: ErrorKind):
    with pytest.raises(ApiError) as caught:
        file_id_of(uri, "contents[0].parts[0].fileData.fileUri")
    assert (caught.value.kind, caught.value.param) == (kind, "contents[0].parts[0].fileData.fileUri")


def test_how_a_file_is_told():
    at = site("http", "h", "/v1beta/files")
    told = msgspec.json.decode(FILES.render_file(STORED, at))
    assert told == {
        "name": "files/abc",
        "mimeType": "text/plain",
        "sizeBytes": "3000000000",
        "createTime": "2026-09-07T01:18:17.438678Z",
        "updateTime": "2026-09-07T01:18:18Z",
        "sha256Hash": "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=",
        "uri": "http://h/v1beta/files/abc",
        "state": "ACTIVE",
        "source": "UPLOADED",
    }


def test_a_page_token_is_read_back():
    at = site("http", "h", "/v1beta/files")
    token = msgspec.json.decode(FILES.render_list([STORED], at, has_more=True))["nextPageToken"]
    page = FILES.parse_list([("page_size", "1000"), ("pageToken", token)])
    assert (page.limit, page.older_than) == (100, 7)
    assert FILES.parse_list([("pageSize", "0")]).limit == 10
    assert FILES.render_list([], at, has_more=False) == b"{}"


@given(st.text(), st.text(), st.sampled_from(["POST", "PUT"]))
def test_whatever_a_client_says_it_is_read_or_refused(command: str, number: str, method: str):
    headers = {"x-goog-upload-command": command, "x-goog-upload-offset": number, "content-range": number}
    assert refused_kind(lambda: FILES.parse_step(method, headers)) in (None, ErrorKind.INVALID_REQUEST)
    query = [("pageSize", number), ("pageToken", command)]
    assert refused_kind(lambda: FILES.parse_list(query)) in (None, ErrorKind.INVALID_REQUEST)


def refused_kind(call: Callable[[], object]) -> ErrorKind | None:
    try:
        call()
    except ApiError as error:
        return error.kind
    return None
