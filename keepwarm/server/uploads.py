"""Calls on files, in Kimi's and Gemini's dialects. The bodies of uploads go to the disk as they arrive.

An upload's URL is all that who goes on with it needs, so those calls look at no key; what begins one does. A body that
breaks off leaves what came of it, and the client can ask how much that was. Tables of routes: `kimi_file_entries`,
`gemini_file_entries` under a version's mount, `gemini_upload_entries` under /upload and a version, and
`gemini_discovery_entries` at a mount's root.
"""

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing

from keepwarm.config import Limits
from keepwarm.core.errors import ApiError, ErrorKind
from keepwarm.core.file import StoredFile
from keepwarm.core.principal import Access
from keepwarm.dialects.gemini_error import GeminiErrorBody
from keepwarm.dialects.gemini_files import (
    UPLOAD_ID,
    FileListReply,
    FileReply,
    GeminiFiles,
    NewFileRequest,
    Site,
    Step,
    UploadedReply,
    site,
)
from keepwarm.dialects.kimi_files import (
    FORM_BYTES_MAX,
    FileForm,
    KimiFileContent,
    KimiFileDeletedReply,
    KimiFileListReply,
    KimiFileReply,
    KimiFiles,
)
from keepwarm.dialects.openai_error import ErrorBody
from keepwarm.dialects.openapi import Param, Route
from keepwarm.gateway.files import Files
from keepwarm.server.endpoints import Entry, query
from keepwarm.server.exchange import Exchange, Headers

RESUME_INCOMPLETE = 308
PLAIN_TYPE = "text/plain; charset=utf-8"

TAG = "files"


class KimiFileCalls:
    """/files in Kimi's dialect."""

    def __init__(self, files: Files, dialect: KimiFiles, limits: Limits) -> None:
        self._files = files
        self._dialect = dialect
        self._limits = limits

    async def create(self, exchange: Exchange) -> None:
        """POST /files. The answer comes when the file was read, as clients ask for its content next."""
        form = self._dialect.form(exchange.headers)
        async with aclosing(exchange.pieces(self._limits.file_bytes_max + FORM_BYTES_MAX)) as pieces:
            file = await self._uploaded(exchange, form, pieces)
        file = await self._files.settled(file, self._limits.turn_s_max)
        await exchange.reply(self._dialect.render_file(file))

    async def _uploaded(self, exchange: Exchange, form: FileForm, pieces: AsyncGenerator[bytes, None]) -> StoredFile:
        begin = [await _begin_of_file(form, pieces)]  # given away below, and not held until the end
        assert form.new is not None
        uploads = self._files.uploads
        upload = await uploads.begin(exchange.tenant, form.new)
        try:
            await uploads.append(upload.upload_id, 0, _file_of(begin, form, pieces))
            form.finish()
            file = await self._files.finish(upload.upload_id)
        finally:
            await uploads.cancel(upload.upload_id)  # a form cannot be gone on with; one that is a file stays
        exchange.log_fields |= {"file_id": file.id, "n_bytes": file.n_bytes}
        return file

    async def list(self, exchange: Exchange) -> None:
        """GET /files: all of them, there are no more than `files_per_tenant_max`."""
        found = await self._files.page(exchange.tenant, self._dialect.dialect, self._limits.files_per_tenant_max)
        await exchange.reply(self._dialect.render_list(found))

    async def get(self, exchange: Exchange) -> None:
        """GET /files/{file_id}."""
        await exchange.reply(self._dialect.render_file(await self._file(exchange)))

    async def delete(self, exchange: Exchange) -> None:
        """DELETE /files/{file_id}."""
        file_id = exchange.path_params["file_id"]
        await self._files.delete(exchange.tenant, file_id, dialect=self._dialect.dialect)
        await exchange.reply(self._dialect.render_deleted(file_id))

    async def content(self, exchange: Exchange) -> None:
        """GET /files/{file_id}/content."""
        file_id = exchange.path_params["file_id"]
        file = await self._files.active(exchange.tenant, file_id, dialect=self._dialect.dialect)
        text = await self._files.text_of(file)
        await exchange.reply(self._dialect.render_content(file, text), content_type=PLAIN_TYPE)

    async def _file(self, exchange: Exchange) -> StoredFile:
        file_id = exchange.path_params["file_id"]
        return await self._files.get(exchange.tenant, file_id, dialect=self._dialect.dialect)


async def _begin_of_file(form: FileForm, pieces: AsyncIterator[bytes]) -> bytes:
    """The form up to where its file begins, and what there is of that by then. Raises ApiError(INVALID_REQUEST)."""
    async for piece in pieces:
        data = form.feed(piece)
        if form.new is not None:
            return data
    form.finish()
    raise AssertionError("a form without a file is not whole")


async def _file_of(begin: list[bytes], form: FileForm, pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The file's bytes."""
    yield begin.pop()
    async for piece in pieces:
        yield form.feed(piece)


class GeminiFileCalls:
    """Files and uploads in Gemini's dialect."""

    def __init__(self, files: Files, dialect: GeminiFiles, limits: Limits) -> None:
        self._files = files
        self._dialect = dialect
        self._limits = limits

    async def list(self, exchange: Exchange) -> None:
        """GET /files."""
        page = self._dialect.parse_list(query(exchange))
        found = await self._files.page(exchange.tenant, self._dialect.dialect, page.limit + 1, page.older_than)
        has_more = len(found) > page.limit
        await exchange.reply(self._dialect.render_list(found[: page.limit], _site(exchange), has_more=has_more))

    async def get(self, exchange: Exchange) -> None:
        """GET /files/{file_id}."""
        file_id = exchange.path_params["file_id"]
        file = await self._files.get(exchange.tenant, file_id, dialect=self._dialect.dialect)
        await exchange.reply(self._dialect.render_file(file, _site(exchange)))

    async def delete(self, exchange: Exchange) -> None:
        """DELETE /files/{file_id}."""
        await self._files.delete(exchange.tenant, exchange.path_params["file_id"], dialect=self._dialect.dialect)
        await exchange.reply(b"{}")

    async def upload(self, exchange: Exchange) -> None:
        """POST and PUT /upload/{version}/files: begins an upload, or goes on with the one of `upload_id`."""
        upload_id = dict(query(exchange)).get(UPLOAD_ID)
        if upload_id is None:
            await self._begin(exchange)
        else:
            await self._go_on(exchange, upload_id)

    async def discovery(self, exchange: Exchange) -> None:
        """GET /$discovery/rest: what the old SDK asks for before it uploads; no tenant's, so it needs no key."""
        await exchange.reply(self._dialect.render_discovery(_site(exchange)))

    async def _begin(self, exchange: Exchange) -> None:
        if exchange.method != "POST":
            raise ApiError(ErrorKind.INVALID_REQUEST, "an upload begins with POST, its URL comes with the answer")
        new = self._dialect.parse_start(exchange.headers, query(exchange), await exchange.body())
        upload = await self._files.uploads.begin(exchange.tenant, new)
        await exchange.reply(b"{}", headers=self._dialect.started_headers(upload.upload_id, _site(exchange)))

    async def _go_on(self, exchange: Exchange, upload_id: str) -> None:
        uploads = self._files.uploads
        upload = uploads.get(upload_id)
        exchange.tenant = upload.tenant  # for the log
        step = self._dialect.parse_step(exchange.method, exchange.headers)
        if step.is_cancel:
            await uploads.cancel(upload_id)
            await exchange.reply(b"{}", headers=self._dialect.step_headers(step, 0, status="cancelled"))
            return
        is_file = upload.file_id is not None  # whose answer was lost
        if step.offset is not None and not is_file:
            async with aclosing(exchange.pieces(self._limits.file_bytes_max)) as pieces:
                await uploads.append(upload_id, step.offset, pieces)
        if is_file or step.ends_at(upload.n_bytes):
            file = await self._files.finish(upload_id)
            exchange.log_fields |= {"file_id": file.id, "n_bytes": file.n_bytes}
            headers = self._dialect.step_headers(step, file.n_bytes, status="final")
            await exchange.reply(self._dialect.render_uploaded(file, _site(exchange)), headers=headers)
            return
        await self._reply_active(exchange, step, upload.n_bytes)

    async def _reply_active(self, exchange: Exchange, step: Step, n_bytes: int) -> None:
        headers: Headers = self._dialect.step_headers(step, n_bytes, status="active")
        await exchange.reply(b"", status=RESUME_INCOMPLETE if step.is_put else 200, headers=headers)


def google_key(exchange: Exchange) -> str | None:
    """The API key as Google's clients send it: a header, or a member of the query."""
    return exchange.headers.get("x-goog-api-key") or dict(query(exchange)).get("key") or None


def kimi_file_entries(calls: KimiFileCalls) -> list[Entry]:
    """Under Kimi's mounts."""
    table: list[Entry] = [
        (
            Route("POST", "/files", Access.USE, "Upload a file whose text is wanted", response=KimiFileReply),
            calls.create,
        ),
        (Route("GET", "/files", Access.READ, "List files, newest first", response=KimiFileListReply), calls.list),
        (Route("GET", "/files/{file_id}", Access.READ, "One file", response=KimiFileReply), calls.get),
        (Route("DELETE", "/files/{file_id}", Access.USE, "Delete it", response=KimiFileDeletedReply), calls.delete),
        (Route("GET", "/files/{file_id}/content", Access.READ, "Its text", response=KimiFileContent), calls.content),
    ]
    return [(route.tagged(TAG, ErrorBody), call) for route, call in table]


def gemini_file_entries(calls: GeminiFileCalls) -> list[Entry]:
    """Under /v1beta, /v1 and the same below Gemini's own mount; keys as everywhere there."""
    paging = (Param("pageSize", "10 by default, at most 100", int), Param("pageToken", "where the page before ended"))
    table: list[Entry] = [
        (
            Route("GET", "/files", Access.READ, "List files, newest first", response=FileListReply, params=paging),
            calls.list,
        ),
        (Route("GET", "/files/{file_id}", Access.READ, "One file", response=FileReply), calls.get),
        (Route("DELETE", "/files/{file_id}", Access.USE, "Delete it"), calls.delete),
    ]
    return [(route.tagged(TAG, GeminiErrorBody), call) for route, call in table]


def gemini_upload_entries(calls: GeminiFileCalls) -> list[Entry]:
    """Under /upload/v1beta, /upload/v1 and the same below Gemini's own mount. What begins an upload needs a key."""
    begin = Route(
        "POST",
        "/files",
        Access.USE,
        "Begin a resumable upload, or go on with it",
        request=NewFileRequest,
        response=UploadedReply,
        bearer_param=UPLOAD_ID,
    )
    go_on = Route("PUT", "/files", Access.USE, "Go on with an upload", response=UploadedReply, bearer_param=UPLOAD_ID)
    return [(route.tagged(TAG, GeminiErrorBody), calls.upload) for route in (begin, go_on)]


def gemini_discovery_entries(calls: GeminiFileCalls) -> list[Entry]:
    """At the root, and at the root of Gemini's own mount."""
    route = Route("GET", "/$discovery/rest", Access.PUBLIC, "What the old SDK must know to upload")
    return [(route.tagged(TAG, GeminiErrorBody), calls.discovery)]


def _site(exchange: Exchange) -> Site:
    """A proxy in front that ends TLS says so; who lies about it misleads itself."""
    scheme = "https" if exchange.headers.get("x-forwarded-proto") == "https" else exchange.scheme
    return site(scheme, exchange.headers.get("host", ""), exchange.path)
