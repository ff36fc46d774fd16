"""Gemini's files: the File resource, and the resumable uploads of both SDKs.

    new SDK   POST …/files  X-Goog-Upload-Command: start       → X-Goog-Upload-URL
              POST <url>    X-Goog-Upload-Command: upload | upload, finalize | finalize | query | cancel
    old SDK   POST …/files?uploadType=resumable                → Location
              PUT <url>     Content-Range: bytes 0-4/5 | bytes */5     → 308 and Range, or the file

Both are one upload: whoever has its URL can go on with it, in either form, without a key. URLs are built from what the
client itself called the server, since it comes back by them.
"""

import re
from base64 import b64encode, urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Mapping, Sequence
from typing import Annotated
from urllib.parse import unquote, urlencode

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from keepwarm.core.errors import ApiError, ErrorKind
from keepwarm.core.file import FileState, NewFile, StoredFile, unknown_file
from keepwarm.dialects.body import invalid, quoted, require_at_most
from keepwarm.dialects.gemini_json import NS_PER_S, ProtoBody, timestamp_text

DIALECT = "gemini"
NAME_PREFIX = "files/"
DISPLAY_NAME_CHARS_MAX = 512
MEDIA_TYPE_CHARS_MAX = 255
PAGE_SIZE_DEFAULT, PAGE_SIZE_MAX = 10, 100  # Google's
INVALID_ARGUMENT = 3  # of google.rpc.Code
US_PER_S = 1_000_000
UPLOAD_ID = "upload_id"
STATUS_HEADER = "X-Goog-Upload-Status"
COMMANDS = frozenset({"upload", "finalize", "query", "cancel"})

Headers = tuple[tuple[str, str], ...]
Query = Sequence[tuple[str, str]]

_PATH = re.compile(r"(?P<mount>.*?)(?:/upload)?/(?P<version>v1beta|v1)/files(?:/.*)?", re.DOTALL)
_ID = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,38}[a-z0-9])?", re.ASCII)
_NUMBER = re.compile(r"[0-9]{1,15}", re.ASCII)
_RANGE = re.compile(r"bytes (?:(?P<first>[0-9]{1,15})-(?P<last>[0-9]{1,15})|\*)/(?P<total>[0-9]{1,15}|\*)", re.ASCII)
_URI = re.compile(r"(?:.*/)?files/(?P<id>[^/?#:]+)(?:[?#].*)?", re.DOTALL)


class NewFileMembers(Struct, rename="camel"):
    """What a client says of a file ahead of its bytes."""

    name: str | None = None
    display_name: str | None = None
    mime_type: str | None = None
    size_bytes: Annotated[int, Meta(ge=0)] | None = None


class NewFileRequest(Struct, rename="camel"):
    """The body of POST /upload/…/files that begins an upload."""

    file: NewFileMembers | None = None


class FileError(Struct):
    """Why a file has no text: google.rpc.Status."""

    code: int
    message: str


class FileReply(Struct, rename="camel"):
    """A File. `sha256_hash` is the digest in base64."""

    name: str
    mime_type: str
    size_bytes: str
    create_time: str
    update_time: str
    sha256_hash: str
    uri: str
    state: Annotated[str, Meta(extra_json_schema={"enum": [state.value for state in FileState]})]
    source: str
    display_name: str | UnsetType = UNSET
    expiration_time: str | UnsetType = UNSET
    error: FileError | UnsetType = UNSET


class UploadedReply(Struct):
    """The answer to the last bytes of an upload."""

    file: FileReply


class FileListReply(Struct, rename="camel", omit_defaults=True):
    """A page of files, newest first; empty without any."""

    files: tuple[FileReply, ...] = ()
    next_page_token: str = ""


class Site(Struct, frozen=True):
    """Where the client finds this server, as it said itself: "http://host:80" and the mount, "/gemini" or ""."""

    base: str
    version: str

    def upload_url(self, upload_id: str) -> str:
        query = urlencode({UPLOAD_ID: upload_id, "upload_protocol": "resumable"})
        return f"{self.base}/upload/{self.version}/files?{query}"

    def uri(self, file: StoredFile) -> str:
        return f"{self.base}/{self.version}/{NAME_PREFIX}{file.id}"


class Step(Struct, frozen=True):
    """One request to an upload's URL. `offset` None: no bytes come with it.

    `is_finalize` None: when `total` bytes are there. `is_put`: the old SDK's form.
    """

    is_put: bool = False
    offset: int | None = None
    is_finalize: bool | None = False
    is_cancel: bool = False
    total: int | None = None

    def ends_at(self, n_bytes: int) -> bool:
        """Whether the upload is to become a file, with so many bytes received."""
        return n_bytes == self.total if self.is_finalize is None else self.is_finalize


class FilePage(Struct, frozen=True):
    """A list query; `older_than` is a file's `seq`."""

    limit: int
    older_than: int | None


def site(scheme: str, host: str, path: str) -> Site:
    """Of a request's `path` with a version in it, or of one of the discovery document's."""
    found = _PATH.fullmatch(path)
    mount, version = (found["mount"], found["version"]) if found else (path.partition("/$discovery")[0], "v1beta")
    return Site(f"{scheme}://{host}{mount}", version)


def file_id_of(uri: str, path: str) -> str:
    """The id in a file's `uri` or `name`. Raises ApiError: INVALID_REQUEST for what cannot be one, UNKNOWN_FILE."""
    found = _URI.fullmatch(uri)
    if found is None:
        raise invalid(path, f"{quoted(uri)} is no file of this server: upload it first, and send the uri of the answer")
    if not _ID.fullmatch(found["id"]):
        raise unknown_file(found["id"], path)
    return found["id"]


class GeminiFiles:
    """Parses and renders files and uploads. All parse functions raise ApiError(INVALID_REQUEST)."""

    dialect = DIALECT

    def __init__(self, ttl_s: float) -> None:
        """`ttl_s` is how long a file is kept."""
        self._ttl_s = ttl_s
        self._start = ProtoBody(NewFileRequest)
        self._encoder = msgspec.json.Encoder()

    def parse_start(self, headers: Mapping[str, str], query: Query, body: bytes) -> NewFile:
        """The request that begins an upload."""
        protocol = headers.get("x-goog-upload-protocol") or dict(query).get("uploadType")
        if protocol != "resumable":
            raise ApiError(
                ErrorKind.INVALID_REQUEST, "only resumable uploads are possible here: begin one, then send it"
            )
        wire = (self._start.decode(body).file if body.strip() else None) or NewFileMembers()
        said = headers.get("x-goog-upload-header-content-length") or headers.get("x-upload-content-length")
        n_bytes = wire.size_bytes if said is None else _number(said, "X-Goog-Upload-Header-Content-Length")
        name = wire.display_name or _header_text(headers.get("x-goog-upload-file-name", ""))
        require_at_most(name, DISPLAY_NAME_CHARS_MAX, "file.displayName", "characters")
        media_type = (
            headers.get("x-goog-upload-header-content-type") or headers.get("x-upload-content-type") or wire.mime_type
        )
        require_at_most(media_type or "", MEDIA_TYPE_CHARS_MAX, "file.mimeType", "characters")
        return NewFile(DIALECT, name, media_type, n_bytes, _chosen_id(wire.name), self._ttl_s)

    def parse_step(self, method: str, headers: Mapping[str, str]) -> Step:
        """A request to an upload's URL."""
        if method == "PUT":
            return _put_step(headers)
        commands = {word.strip().lower() for word in headers.get("x-goog-upload-command", "").split(",")}
        if not commands <= COMMANDS or (len(commands) > 1 and commands != {"upload", "finalize"}):
            said = quoted(headers.get("x-goog-upload-command", ""))
            raise invalid("X-Goog-Upload-Command", f"{said} is none of upload, finalize, query, cancel")
        offset = None
        if "upload" in commands:
            offset = _number(headers.get("x-goog-upload-offset", ""), "X-Goog-Upload-Offset")
        return Step(offset=offset, is_finalize="finalize" in commands, is_cancel="cancel" in commands)

    def parse_list(self, query: Query) -> FilePage:
        scalars = dict(query)
        size = scalars.get("pageSize") or scalars.get("page_size") or "0"
        limit = _number(size, "pageSize") or PAGE_SIZE_DEFAULT
        token = scalars.get("pageToken") or scalars.get("page_token") or ""
        return FilePage(min(limit, PAGE_SIZE_MAX), _seq(token) if token else None)

    def render_file(self, file: StoredFile, at: Site) -> bytes:
        return self._encoder.encode(_reply(file, at))

    def render_uploaded(self, file: StoredFile, at: Site) -> bytes:
        return self._encoder.encode(UploadedReply(_reply(file, at)))

    def render_list(self, files: Sequence[StoredFile], at: Site, *, has_more: bool) -> bytes:
        token = urlsafe_b64encode(str(files[-1].seq).encode()).decode() if has_more else ""
        return self._encoder.encode(FileListReply(tuple(_reply(file, at) for file in files), token))

    def render_discovery(self, at: Site) -> bytes:
        """The discovery document, as far as the old SDK reads it."""
        return self._encoder.encode(_discovery(at))

    def started_headers(self, upload_id: str, at: Site) -> Headers:
        """Of the answer to `parse_start`'s request, for both SDKs."""
        url = at.upload_url(upload_id)
        ours = (("X-Goog-Upload-URL", url), (STATUS_HEADER, "active"), ("X-Goog-Upload-Chunk-Granularity", "1"))
        return (*ours, ("Location", url))

    def step_headers(self, step: Step, n_bytes: int, *, status: str) -> Headers:
        """Of the answer to a step: "active", "final" or "cancelled"."""
        headers: Headers = ((STATUS_HEADER, status), ("X-Goog-Upload-Size-Received", str(n_bytes)))
        if step.is_put and status == "active" and n_bytes:
            return (*headers, ("Range", f"bytes=0-{n_bytes - 1}"))
        return headers


def _put_step(headers: Mapping[str, str]) -> Step:
    said = headers.get("content-range")
    if said is None:  # the whole file, which may be empty
        return Step(is_put=True, offset=0, is_finalize=True)
    found = _RANGE.fullmatch(said.strip())
    if found is None:
        raise invalid("Content-Range", f"{quoted(said)} is not like 'bytes 0-4/5' or 'bytes */5'")
    total = None if found["total"] == "*" else int(found["total"])
    if found["first"] is None:
        # An empty file is sent as this, too: there is nothing else to ask of it.
        return Step(is_put=True, is_finalize=total == 0, total=total)
    return Step(is_put=True, offset=int(found["first"]), is_finalize=None, total=total)


def _chosen_id(name: str | None) -> str | None:
    if not name:
        return None
    file_id = name.removeprefix(NAME_PREFIX)
    if not _ID.fullmatch(file_id):
        problem = "is not like files/my-report-1: at most 40 of a to z, 0 to 9 and '-', which is not first or last"
        raise invalid("file.name", f"{quoted(name)} {problem}")
    return file_id


def _number(text: str, path: str) -> int:
    if not _NUMBER.fullmatch(text):
        raise invalid(path, f"{quoted(text)} is not a whole number")
    return int(text)


def _seq(token: str) -> int:
    try:
        return int(urlsafe_b64decode(token.encode("ascii")).decode("ascii"))
    except ValueError as exc:  # wrong base64, too
        raise invalid("pageToken", f"{quoted(token)} is not from an answer of this server") from exc


def _header_text(text: str) -> str:
    """A file's name in a header, where clients put UTF-8 or percent-escapes."""
    try:
        text = text.encode("latin-1").decode("utf-8")
    except UnicodeError:
        pass  # it is what it looks like
    return unquote(text)


def _reply(file: StoredFile, at: Site) -> FileReply:
    return FileReply(
        name=NAME_PREFIX + file.id,
        mime_type=file.media_type,
        size_bytes=str(file.n_bytes),
        create_time=_time(file.created_at),
        update_time=_time(file.updated_at),
        sha256_hash=b64encode(file.sha256).decode(),
        uri=at.uri(file),
        state=file.state.value,
        source="UPLOADED",
        display_name=file.name or UNSET,
        expiration_time=UNSET if file.expires_at is None else _time(file.expires_at),
        error=UNSET if file.error is None else FileError(INVALID_ARGUMENT, file.error),
    )


def _time(unix_s: float) -> str:
    return timestamp_text(round(unix_s * US_PER_S) * (NS_PER_S // US_PER_S))


def _discovery(at: Site) -> dict[str, object]:
    path = f"{at.version}/files"
    upload = {
        "id": "generativelanguage.media.upload",
        "path": path,
        "flatPath": path,
        "httpMethod": "POST",
        "parameterOrder": [],
        "parameters": {},
        "request": {"$ref": "CreateFileRequest"},
        "response": {"$ref": "CreateFileResponse"},
        "supportsMediaUpload": True,
        "mediaUpload": {
            "accept": ["*/*"],
            "protocols": {"resumable": {"multipart": True, "path": f"/upload/{path}"}},
        },
    }
    file = {
        "id": "File",
        "type": "object",
        "properties": {"name": {"type": "string"}, "displayName": {"type": "string"}},
    }
    return {
        "kind": "discovery#restDescription",
        "discoveryVersion": "v1",
        "id": f"generativelanguage:{at.version}",
        "name": "generativelanguage",
        "version": at.version,
        "title": "Keepwarm",
        "protocol": "rest",
        "rootUrl": f"{at.base}/",
        "baseUrl": f"{at.base}/",
        "servicePath": "",
        "batchPath": "batch",
        "parameters": {
            "alt": {"type": "string", "location": "query", "default": "json"},
            "key": {"type": "string", "location": "query"},
        },
        "schemas": {
            "File": file,
            "CreateFileRequest": _holds_file("CreateFileRequest"),
            "CreateFileResponse": _holds_file("CreateFileResponse"),
        },
        "resources": {"media": {"methods": {"upload": upload}}},
    }


def _holds_file(name: str) -> dict[str, object]:
    return {"id": name, "type": "object", "properties": {"file": {"$ref": "File"}}}
