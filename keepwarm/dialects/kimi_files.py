"""Kimi's files: the multipart form of an upload as it arrives, and the answers of /files.

The form's members may come in any order, so whether the purpose is right is known at its end only. A file's content is
told as the small JSON document that Kimi's users paste into a message; it is a function of file and name, so it makes the
same prefix every time. There is no clock here and nothing is kept: the file's bytes are handed on piece by piece.
"""

import re
from collections.abc import Mapping, Sequence

import msgspec
from msgspec import Struct
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from keepwarm.core.errors import ApiError, ErrorKind
from keepwarm.core.file import FileState, NewFile, StoredFile
from keepwarm.dialects.body import invalid, quoted, require_at_most

DIALECT = "kimi"
ID_PREFIX = "file-"
PURPOSE = "file-extract"
FILE_PART, PURPOSE_PART = "file", "purpose"
FILE_NAME_CHARS_MAX = 255
PARTS_MAX = 16  # a form has two
FIELD_BYTES_MAX = 1024  # of a part that is no file
FORM_BYTES_MAX = 64 * 1024  # what a form may have beside its file
STATUSES = {FileState.PROCESSING: "processing", FileState.ACTIVE: "ok", FileState.FAILED: "error"}

_FOLDERS = re.compile(r".*[/\\]", re.DOTALL)


class KimiFileReply(Struct):
    """A file. `status` is "ok" or "error" once it was read."""

    id: str
    object: str
    bytes: int
    created_at: int
    filename: str
    purpose: str
    status: str
    status_details: str


class KimiFileListReply(Struct):
    """All files, newest first."""

    object: str
    data: tuple[KimiFileReply, ...]
    has_more: bool = False


class KimiFileDeletedReply(Struct):
    """The answer to DELETE /files/{id}."""

    id: str
    object: str
    deleted: bool


class KimiFileContent(Struct):
    """A file's text, as it is pasted into a message."""

    content: str
    file_type: str
    filename: str
    title: str
    type: str


class FileForm:
    """A form as it arrives: `feed` every piece, then `finish`. `new` is there from the piece on that the file begins in."""

    def __init__(self, boundary: bytes) -> None:
        self.new: NewFile | None = None
        self._purpose: str | None = None
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._part_begun,
                "on_header_field": self._header_named,
                "on_header_value": self._header_said,
                "on_header_end": self._header_ended,
                "on_headers_finished": self._headers_ended,
                "on_part_data": self._part_said,
                "on_part_end": self._part_ended,
                "on_end": self._ended,
            },
        )
        self._n_parts = 0
        self._name = ""  # of the part that is being read
        self._headers: dict[str, str] = {}
        self._header = [bytearray(), bytearray()]
        self._field = bytearray()
        self._data: list[bytes] = []  # the file's, of the piece that is being fed
        self._is_complete = False

    def feed(self, piece: bytes) -> bytes:
        """What of the file is in this piece of the form. Raises ApiError(INVALID_REQUEST)."""
        try:
            self._parser.write(piece)
        except FormParserError as exc:
            raise ApiError(ErrorKind.INVALID_REQUEST, f"the body is no multipart form: {exc}") from exc
        data, self._data = self._data, []
        return data[0] if len(data) == 1 else b"".join(data)

    def finish(self) -> None:
        """The form is whole, and is one for a file that is to be read. Raises ApiError(INVALID_REQUEST)."""
        if not self._is_complete:
            raise ApiError(
                ErrorKind.INVALID_REQUEST, "the body is no whole multipart form: its last boundary is missing"
            )
        if self.new is None:
            raise invalid(FILE_PART, "is required: a part with a filename")
        if self._purpose != PURPOSE:
            said = "is required" if self._purpose is None else f"{quoted(self._purpose)} is not possible here"
            raise invalid(PURPOSE_PART, f"{said}; it is {PURPOSE!r}")

    def _part_begun(self) -> None:
        self._n_parts += 1
        if self._n_parts > PARTS_MAX:
            raise ApiError(ErrorKind.INVALID_REQUEST, f"the form has more than {PARTS_MAX} parts")
        self._headers = {}
        self._field.clear()

    def _header_named(self, data: bytes, start: int, end: int) -> None:
        self._header[0] += data[start:end]

    def _header_said(self, data: bytes, start: int, end: int) -> None:
        self._header[1] += data[start:end]

    def _header_ended(self) -> None:
        name, value = (bytes(text).decode("latin-1") for text in self._header)
        self._headers[name.lower()] = value
        self._header = [bytearray(), bytearray()]

    def _headers_ended(self) -> None:
        _, options = parse_options_header(self._headers.get("content-disposition", ""))
        self._name = options.get(b"name", b"").decode("utf-8", "replace")
        if self._name != FILE_PART:
            return
        if self.new is not None:
            raise invalid(FILE_PART, "is there twice; send one file a request")
        file_name = _FOLDERS.sub("", _text(options.get(b"filename", b"")))
        require_at_most(file_name, FILE_NAME_CHARS_MAX, FILE_PART, "characters in its filename")
        media_type = self._headers.get("content-type")
        if media_type is not None:
            require_at_most(media_type, FILE_NAME_CHARS_MAX, FILE_PART, "characters in its content-type")
        self.new = NewFile(DIALECT, file_name, media_type, id_prefix=ID_PREFIX)

    def _part_said(self, data: bytes, start: int, end: int) -> None:
        if self._name == FILE_PART:
            self._data.append(data[start:end])
            return
        self._field += data[start:end]
        if len(self._field) > FIELD_BYTES_MAX:
            raise invalid(quoted(self._name), f"has more than {FIELD_BYTES_MAX:,} bytes")

    def _part_ended(self) -> None:
        if self._name == PURPOSE_PART:
            self._purpose = self._field.decode("utf-8", "replace")
        self._name = ""

    def _ended(self) -> None:
        self._is_complete = True


class KimiFiles:
    """Parses and renders /files."""

    dialect = DIALECT

    def __init__(self) -> None:
        self._encoder = msgspec.json.Encoder()

    def form(self, headers: Mapping[str, str]) -> FileForm:
        """Of a request with these headers. Raises ApiError(INVALID_REQUEST)."""
        kind, options = parse_options_header(headers.get("content-type", ""))
        boundary = options.get(b"boundary", b"")
        if kind != b"multipart/form-data" or not boundary:
            raise ApiError(
                ErrorKind.INVALID_REQUEST, "a file is sent as multipart/form-data with a boundary, see docs/api/kimi.md"
            )
        try:
            return FileForm(boundary)
        except FormParserError as exc:
            raise ApiError(ErrorKind.INVALID_REQUEST, f"the body is no multipart form: {exc}") from exc

    def render_file(self, file: StoredFile) -> bytes:
        return self._encoder.encode(_reply(file))

    def render_list(self, files: Sequence[StoredFile]) -> bytes:
        return self._encoder.encode(KimiFileListReply("list", tuple(_reply(file) for file in files)))

    def render_deleted(self, file_id: str) -> bytes:
        return self._encoder.encode(KimiFileDeletedReply(file_id, "file", deleted=True))

    def render_content(self, file: StoredFile, text: str) -> bytes:
        media_type = file.media_type.partition(";")[0].strip()
        return self._encoder.encode(KimiFileContent(text, media_type, file.name, "", "file"))


def _reply(file: StoredFile) -> KimiFileReply:
    return KimiFileReply(
        id=file.id,
        object="file",
        bytes=file.n_bytes,
        created_at=int(file.created_at),
        filename=file.name,
        purpose=PURPOSE,
        status=STATUSES[file.state],
        status_details=file.error or "",
    )


def _text(raw: bytes) -> str:
    """A file's name in the bytes that clients send: UTF-8, or what else it may be."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw.decode("latin-1")
