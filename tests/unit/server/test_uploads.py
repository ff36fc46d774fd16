"""Files over the wire: both SDKs' uploads, broken and resumed, Kimi's forms, and every error in its dialect's shape."""

import base64
import hashlib
import itertools
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from keepwarm.config import Limits
from keepwarm.gateway.auth import DevAuth
from tests.unit.server.uploading import MOUNT, Site, site
from tests.world import Answer

pytestmark = pytest.mark.anyio

DATA = b"the quick brown fox " * 50
CHUNK = 256
START = {
    "x-goog-upload-protocol": "resumable",
    "x-goog-upload-command": "start",
    "x-goog-upload-header-content-length": str(len(DATA)),
    "x-goog-upload-header-content-type": "text/plain",
    "x-goog-upload-file-name": "fox.txt",
}
BOUNDARY = "xYzZY"


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Site]:
    async with site(tmp_path) as running:
        yield running


async def begun(server: Site, path: str = "/upload/v1beta/files", body: bytes = b"{}", **headers: str) -> str:
    answer = await server.request("POST", path, body, {**START, **headers})
    assert answer.status == 200, answer.body
    assert answer.headers["x-goog-upload-status"] == "active"
    assert answer.headers["location"] == answer.headers["x-goog-upload-url"]
    return answer.headers["x-goog-upload-url"].removeprefix("http://kw:80")


async def step(
    server: Site, url: str, command: str, offset: int | None = None, body: Any = b"", **options: Any
) -> Answer:
    headers = {"x-goog-upload-command": command}
    if offset is not None:
        headers["x-goog-upload-offset"] = str(offset)
    return await server.request("POST", url, body, headers, key=None, **options)


@pytest.mark.parametrize("mount, version", [("", "v1beta"), ("", "v1"), (MOUNT, "v1beta")])
async def test_the_new_sdks_upload_in_chunks(server: Site, mount: str, version: str):
    body = b'{"file":{"display_name":"The fox","mime_type":"text/plain","size_bytes":1000}}'
    url = await begun(server, f"{mount}/upload/{version}/files", body)
    for start in range(0, len(DATA), CHUNK):
        is_last = start + CHUNK >= len(DATA)
        answer = await step(
            server, url, "upload, finalize" if is_last else "upload", start, DATA[start : start + CHUNK]
        )
        assert answer.status == 200
        assert answer.headers["x-goog-upload-status"] == ("final" if is_last else "active")
    file = answer.json()["file"]
    assert file == {
        "name": file["name"],
        "displayName": "The fox",
        "mimeType": "text/plain",
        "sizeBytes": "1000",
        "createTime": "2023-11-14T22:13:20Z",
        "updateTime": "2023-11-14T22:13:20Z",
        "expirationTime": "2023-11-16T22:13:20Z",
        "sha256Hash": base64.b64encode(hashlib.sha256(DATA).digest()).decode(),
        "uri": f"http://kw:80{mount}/{version}/{file['name']}",
        "state": "PROCESSING",
        "source": "UPLOADED",
    }
    await server.settled(file)
    told = (await server.request("GET", f"{mount}/v1beta/{file['name']}")).json()
    assert told == {**file, "state": "ACTIVE", "uri": f"http://kw:80{mount}/v1beta/{file['name']}"}


@pytest.mark.parametrize("n_kept", [0, 1, 100, CHUNK])
async def test_broken_at_every_chunk_border_and_inside_and_resumed_by_query(server: Site, n_kept: int):
    url = await begun(server)
    n_bytes = 0
    while n_bytes < len(DATA):
        kept = DATA[n_bytes : n_bytes + n_kept]
        broken = await step(server, url, "upload, finalize", n_bytes, [kept], is_broken=True)
        assert broken.status == 499
        asked = await step(server, url, "query")
        assert (asked.status, asked.headers["x-goog-upload-status"]) == (200, "active")
        assert asked.headers["x-goog-upload-size-received"] == str(n_bytes + len(kept))
        n_bytes += len(kept)
        chunk = DATA[n_bytes : n_bytes + CHUNK]
        answer = await step(server, url, "upload", n_bytes, chunk)
        n_bytes += len(chunk)
        assert answer.headers["x-goog-upload-size-received"] == str(n_bytes)
    final = await step(server, url, "finalize")
    assert final.json()["file"]["sha256Hash"] == base64.b64encode(hashlib.sha256(DATA).digest()).decode()


async def test_an_answer_that_was_lost_is_given_again(server: Site):
    url = await begun(server)
    first = await step(server, url, "upload, finalize", 0, DATA)
    for again in (
        await step(server, url, "upload, finalize", 0, DATA),
        await step(server, url, "finalize"),
        await step(server, url, "query"),
    ):
        assert again.headers["x-goog-upload-status"] == "final"
        assert again.json()["file"]["name"] == first.json()["file"]["name"]
    assert len((await server.request("GET", "/v1beta/files")).json()["files"]) == 1


async def test_the_old_sdks_upload_whole_and_in_parts(server: Site):
    discovery = (await server.request("GET", "/$discovery/rest?version=v1beta&key=k", key=None)).json()
    upload = discovery["resources"]["media"]["methods"]["upload"]
    assert discovery["rootUrl"] == "http://kw:80/"
    assert upload["mediaUpload"]["protocols"]["resumable"]["path"] == "/upload/v1beta/files"
    start = {"x-upload-content-type": "text/markdown", "x-upload-content-length": str(len(DATA))}
    path = "/upload/v1beta/files?key=k&alt=json&uploadType=resumable"
    answer = await server.request("POST", path, b'{"file":{"displayName":"zz"}}', start, key=None)
    url = answer.headers["location"].removeprefix("http://kw:80")

    async def put(first: int, last: int, **options: Any) -> Answer:
        spoken = {"content-range": f"bytes {first}-{last}/{len(DATA)}"}
        return await server.request("PUT", url, DATA[first : last + 1], spoken, key=None, **options)

    async def asked() -> Answer:
        return await server.request("PUT", url, b"", {"content-range": f"bytes */{len(DATA)}"}, key=None)

    nothing = await asked()
    assert (nothing.status, nothing.headers.get("range")) == (308, None)
    part = await put(0, 255)
    assert (part.status, part.headers["range"], part.body) == (308, "bytes=0-255", b"")
    assert (await put(256, 999, is_broken=True)).status == 499
    assert (await put(0, 99)).headers["range"] == "bytes=0-99"
    assert (await asked()).headers["range"] == "bytes=0-99"
    whole = await put(100, len(DATA) - 1)
    assert whole.status == 200
    file = whole.json()["file"]
    assert (file["displayName"], file["mimeType"], file["sizeBytes"]) == ("zz", "text/markdown", "1000")
    assert (await asked()).json()["file"] == file


async def test_an_empty_file_in_both_forms(server: Site):
    url = await begun(server, **{"x-goog-upload-header-content-length": "0"})
    assert (await step(server, url, "upload, finalize", 0)).json()["file"]["sizeBytes"] == "0"
    url = await begun(server, **{"x-goog-upload-header-content-length": "0"})
    assert (await server.request("PUT", url, key=None)).json()["file"]["sizeBytes"] == "0"


async def test_a_cancelled_upload_is_unknown_and_leaves_nothing(server: Site):
    url = await begun(server)
    await step(server, url, "upload", 0, DATA[:10])
    assert (await step(server, url, "cancel")).headers["x-goog-upload-status"] == "cancelled"
    assert (await step(server, url, "query")).status == 403
    assert list(server.directory.iterdir()) == []


async def test_lists_have_pages_and_are_empty_objects_without_files(server: Site):
    assert (await server.request("GET", "/v1beta/files")).body == b"{}"
    names = []
    for _ in range(5):
        url = await begun(server)
        names.insert(0, (await step(server, url, "upload, finalize", 0, DATA)).json()["file"]["name"])
    found, token = [], ""
    for size in itertools.count(1):
        told = (await server.request("GET", f"/v1beta/files?pageSize={size}&pageToken={token}")).json()
        found += [file["name"] for file in told["files"]]
        token = told.get("nextPageToken", "")
        if not token:
            break
    assert found == names
    assert (await server.request("DELETE", f"/v1beta/{names[0]}")).body == b"{}"
    assert (await server.request("GET", f"/v1beta/{names[0]}")).status == 403


async def test_a_file_that_cannot_be_read_says_why(server: Site):
    url = await begun(server, **{"x-goog-upload-header-content-length": "3"})
    file = (await step(server, url, "upload, finalize", 0, b"no!")).json()["file"]
    await server.settled(file)
    told = (await server.request("GET", f"/v1beta/{file['name']}")).json()
    assert (told["state"], told["error"]) == ("FAILED", {"code": 3, "message": "the document is encrypted"})


async def test_a_name_becomes_no_path_and_an_id_may_be_chosen(server: Site):
    body = b'{"file":{"name":"files/my-fox","displayName":"../../etc/passwd"}}'
    url = await begun(server, body=body)
    file = (await step(server, url, "upload, finalize", 0, DATA)).json()["file"]
    assert (file["name"], file["displayName"]) == ("files/my-fox", "../../etc/passwd")
    await server.settled(file)
    assert {path.suffix for path in server.directory.iterdir()} == {"", ".txt"}
    url = await begun(server, body=body)
    assert (await step(server, url, "upload, finalize", 0, DATA)).status == 400


def assert_is_rpc_status(answer: Answer, status: int, name: str, words: str) -> None:
    error = answer.json()["error"]
    assert (answer.status, error["code"], error["status"]) == (status, status, name)
    assert words in error["message"]
    assert answer.headers["content-type"] == "application/json"


async def test_every_error_has_the_rpc_status_shape(tmp_path: Path):
    async with site(tmp_path, Limits(file_bytes_max=2000, files_per_tenant_max=2)) as server:
        path = "/upload/v1beta/files"

        async def start(body: bytes = b"{}", key: str | None = "k", **headers: str) -> Answer:
            return await server.request("POST", path, body, {**START, **headers}, key=key)

        assert_is_rpc_status(await start(key=None), 403, "PERMISSION_DENIED", "API Key")
        assert_is_rpc_status(
            await start(**{"x-goog-upload-header-content-length": "2001"}), 413, "INVALID_ARGUMENT", "limit 2,000"
        )
        for headers in ({"x-goog-upload-protocol": "raw"}, {"x-goog-upload-header-content-length": "-1"}):
            assert_is_rpc_status(await start(**headers), 400, "INVALID_ARGUMENT", "")
        for body in (b"{", b'{"file":[]}', b'{"file":{"name":"files/A b"}}', b'{"file":{"size_bytes":-1}}', b'"x"'):
            told = await server.request("POST", path, body, {"x-goog-upload-protocol": "resumable"})
            assert_is_rpc_status(told, 400, "INVALID_ARGUMENT", "")
        url = await begun(server)
        for command, offset, body, words in (
            ("upload", None, DATA, "X-Goog-Upload-Offset"),
            ("upload", 1, DATA, "the offset is 1 and 0 bytes were received"),
            ("upload, finalize", 0, DATA[:9], "1,000 bytes were announced and 9 were received"),
            ("upload", 0, DATA + b"x", "1,000 were announced"),
            ("go", None, b"", "is none of upload, finalize, query, cancel"),
            ("query, cancel", None, b"", "is none of"),
            ("", None, b"", "is none of"),
        ):
            assert_is_rpc_status(await step(server, url, command, offset, body), 400, "INVALID_ARGUMENT", words)
        for said in ("bytes 5-4", "items 0-1/2", "bytes 0-1/x"):
            told = await server.request("PUT", url, b"ab", {"content-range": said}, key=None)
            assert_is_rpc_status(told, 400, "INVALID_ARGUMENT", "Content-Range")
        assert_is_rpc_status(
            await step(server, f"{path}?upload_id=none", "query"), 403, "PERMISSION_DENIED", "begin anew"
        )
        assert_is_rpc_status(await server.request("PUT", path, b""), 400, "INVALID_ARGUMENT", "begins with POST")
        await begun(server)
        assert_is_rpc_status(await start(), 429, "RESOURCE_EXHAUSTED", "limit 2 (files_per_tenant_max)")
        for method in ("GET", "DELETE"):
            told = await server.request(method, "/v1beta/files/none")
            assert_is_rpc_status(told, 403, "PERMISSION_DENIED", "access the File none or it may not exist.")
        for query in ("pageSize=x", "pageToken=%21", "pageToken=eHg="):
            told = await server.request("GET", f"/v1beta/files?{query}")
            assert_is_rpc_status(told, 400, "INVALID_ARGUMENT", query.partition("=")[0])


def form(*parts: tuple[str, bytes, str | None], end: bytes = b"--\r\n", content_type: str = "text/plain") -> bytes:
    body = b""
    for name, data, file_name in parts:
        body += f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"'.encode()
        if file_name is not None:
            body += f'; filename="{file_name}"\r\nContent-Type: {content_type}'.encode()
        body += b"\r\n\r\n" + data + b"\r\n"
    return body + f"--{BOUNDARY}".encode() + end


FORM = {"content-type": f"multipart/form-data; boundary={BOUNDARY}"}
PURPOSE = ("purpose", b"file-extract", None)
FOX = ("file", DATA, "über den Fuchs.txt")


@pytest.mark.parametrize("parts", [(PURPOSE, FOX), (FOX, PURPOSE), (("x", b"y", None), FOX, PURPOSE)])
@pytest.mark.parametrize("n_bytes", [1, 7, 100, 100_000])
async def test_kimis_form_in_any_order_and_pieces(server: Site, parts: Any, n_bytes: int):
    body = form(*parts)
    pieces = [body[start : start + n_bytes] for start in range(0, len(body), n_bytes)]
    answer = await server.request("POST", "/v1/files", pieces, FORM)
    assert answer.status == 200, answer.body
    file = answer.json()
    assert file == {
        "id": file["id"],
        "object": "file",
        "bytes": 1000,
        "created_at": 1_700_000_000,
        "filename": "über den Fuchs.txt",
        "purpose": "file-extract",
        "status": "ok",
        "status_details": "",
    }
    assert file["id"].startswith("file-")
    assert (await server.request("GET", f"/v1/files/{file['id']}")).json() == file
    content = await server.request("GET", f"/v1/files/{file['id']}/content")
    assert content.json() == {
        "content": DATA.decode(),
        "file_type": "text/plain",
        "filename": "über den Fuchs.txt",
        "title": "",
        "type": "file",
    }
    assert (await server.request("GET", "/v1/files")).json() == {"object": "list", "data": [file], "has_more": False}
    assert (await server.request("GET", "/v1beta/files")).json() == {}
    deleted = await server.request("DELETE", f"/v1/files/{file['id']}")
    assert deleted.json() == {"id": file["id"], "object": "file", "deleted": True}
    assert (await server.request("GET", f"/v1/files/{file['id']}")).status == 404


async def test_a_form_that_is_wrong_or_breaks_off_leaves_nothing(tmp_path: Path):
    async with site(tmp_path, Limits(file_bytes_max=2000)) as server:
        whole = form(PURPOSE, FOX)
        for body, status, words, headers in (
            (form(PURPOSE), 400, "file: is required", FORM),
            (form(FOX), 400, "purpose: is required", FORM),
            (form(FOX, ("purpose", b"batch", None)), 400, "'batch' is not possible here", FORM),
            (form(PURPOSE, FOX, FOX), 400, "is there twice", FORM),
            (form(PURPOSE, ("file", DATA * 3, "a")), 413, "limit 2,000 (file_bytes_max)", FORM),
            (form(("x", b"y" * 2000, None), PURPOSE, FOX), 400, "more than 1,024 bytes", FORM),
            (form(*[("x", b"", None)] * 17), 400, "more than 16 parts", FORM),
            (form(PURPOSE, ("file", DATA, "a" * 300)), 400, "255", FORM),
            (whole[:-6], 400, "its last boundary is missing", FORM),
            (b"rubbish", 400, "no multipart form", FORM),
            (whole, 400, "multipart/form-data", {"content-type": "application/json"}),
            (whole, 400, "multipart/form-data", {"content-type": "multipart/form-data"}),
            (whole, 400, "no multipart form", {"content-type": f"multipart/form-data; boundary={'x' * 500}"}),
        ):
            answer = await server.request("POST", "/v1/files", body, headers)
            assert (answer.status, words in answer.json()["error"]["message"]) == (status, True), answer.body
        for n_bytes in range(0, len(whole), 97):
            answer = await server.request("POST", "/v1/files", [whole[:n_bytes]], FORM, is_broken=True)
            assert answer.status == 499
        assert list(server.directory.iterdir()) == []
        assert len(server.files.uploads) == 0
        assert (await server.request("POST", "/v1/files", whole, FORM)).status == 200


async def test_a_kimi_file_without_text_says_so(server: Site):
    answer = await server.request("POST", "/v1/files", form(PURPOSE, ("file", b"no!", "a.txt")), FORM)
    assert (answer.json()["status"], answer.json()["status_details"]) == ("error", "the document is encrypted")
    content = await server.request("GET", f"/v1/files/{answer.json()['id']}/content")
    assert content.status == 400
    assert "the document is encrypted" in content.json()["error"]["message"]


async def test_a_sender_that_stops_is_not_waited_for_and_can_go_on(tmp_path: Path):
    async with site(tmp_path, Limits(body_read_s_max=0.05)) as server:
        url = await begun(server)
        stopped = await step(server, url, "upload, finalize", 0, [DATA[:100]], is_silent=True)
        assert_is_rpc_status(stopped, 504, "DEADLINE_EXCEEDED", "did not arrive within 0.05 s")
        assert (await step(server, url, "query")).headers["x-goog-upload-size-received"] == "100"
        assert (await step(server, url, "upload, finalize", 100, DATA[100:])).status == 200
        assert (await server.request("POST", "/v1/files", [form(PURPOSE)[:50]], FORM, is_silent=True)).status == 504


async def test_nothing_of_a_file_and_no_upload_id_is_logged(server: Site):
    url = await begun(server)
    await step(server, url, "upload, finalize", 0, DATA)
    await server.request("POST", "/v1/files", form(PURPOSE, FOX), FORM)
    assert "fox" not in repr(server.logged)
    assert url.partition("upload_id=")[2].partition("&")[0] not in repr(server.logged)
    requests = [line for line in server.logged if line["event"] == "request"]
    assert {line["tenant"] for line in requests} == {(await DevAuth().principal("Bearer k")).tenant}
    assert [line.get("n_bytes") for line in requests] == [None, 1000, 1000]
