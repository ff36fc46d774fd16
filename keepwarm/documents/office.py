"""HTML, PDF, DOCX, PPTX and XLSX to Markdown, by markitdown's converters. Imported in the confined process only: it is slow.

The converters are called one by one and not through markitdown's own dispatch, which guesses types with a neural model,
looks into archives, and knows formats that fetch something from the network or start a program.

A PDF of at most `TABLES_PAGES_MAX` pages is read twice, once for its tables; a longer one is read once, for its text alone,
as markitdown reads pages without tables.
"""

import io
import zipfile
from collections.abc import Callable

from markitdown import DocumentConverter, StreamInfo
from markitdown.converters import DocxConverter, HtmlConverter, PdfConverter, PptxConverter, XlsxConverter
from pdfminer.high_level import extract_text
from pdfminer.pdfdocument import PDFDocument, PDFPasswordIncorrect
from pdfminer.pdfpage import PDFPage
from pdfminer.pdfparser import PDFParser

from keepwarm.documents import DocumentFault, Kind, Order
from keepwarm.documents.plain import decode

TABLES_PAGES_MAX = 30  # looking for tables takes 0.4 s a page, reading the text alone 0.1 s
HEADER_BYTES = 1024  # readers look for %PDF- in so many
UNPACKED_SHARE = (
    4  # what an archive holds may take a quarter of the memory: its parsed form takes several times as much
)
COMPOUND_FILE = b"\xd0\xcf\x11\xe0"  # the old binary formats, and today's when encrypted
MAIN_FOLDER = {Kind.DOCX: "word/", Kind.PPTX: "ppt/", Kind.XLSX: "xl/"}


def extract(order: Order, data: bytes) -> str:
    """The text of a document that is no plain text. Raises DocumentFault, or whatever the libraries raise."""
    return READERS[order.kind](order, data)


def _html(order: Order, data: bytes) -> str:
    info = StreamInfo(mimetype="text/html", charset=order.charset)
    if order.charset is not None:
        decode(data, order.charset)  # a charset that is wrong or unknown is said here
    return _markdown(HtmlConverter(), data, info)


def _pdf(_order: Order, data: bytes) -> str:
    if b"%PDF-" not in data[:HEADER_BYTES]:
        raise DocumentFault("is no PDF: it does not begin like one")
    try:
        n_pages = sum(1 for _ in PDFPage.create_pages(PDFDocument(PDFParser(io.BytesIO(data)))))
    except PDFPasswordIncorrect:
        raise DocumentFault("is encrypted; send it without a password") from None
    if not n_pages:
        raise DocumentFault("is broken: no page is found in it")
    if n_pages <= TABLES_PAGES_MAX:
        text = _markdown(PdfConverter(), data, StreamInfo(mimetype="application/pdf"))
    else:
        text = extract_text(io.BytesIO(data))
    text = text.strip()
    if not text:
        raise DocumentFault("holds no text: its pages are pictures, scanned perhaps, and the model reads text only")
    return text


def _office(order: Order, data: bytes) -> str:
    if data.startswith(COMPOUND_FILE):
        raise DocumentFault(
            f"is encrypted, or in a format older than {order.kind.value}; save it as {order.kind.value}"
        )
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            parts = archive.infolist()
    except zipfile.BadZipFile:
        raise DocumentFault(f"is broken or no {order.kind.value}: it is no archive") from None
    # A part is never unpacked beyond the size that the archive's directory gives it, so the sum holds for hostile ones.
    n_bytes, bytes_max = sum(part.file_size for part in parts), order.memory_bytes_max // UNPACKED_SHARE
    if n_bytes > bytes_max:
        raise DocumentFault(
            f"unpacks to {n_bytes:,} bytes, limit {bytes_max:,} (a quarter of document_memory_bytes_max)"
        )
    if not any(part.filename.startswith(MAIN_FOLDER[order.kind]) for part in parts):
        raise DocumentFault(f"is no {order.kind.value}: the archive has no folder {MAIN_FOLDER[order.kind]}")
    return _markdown(CONVERTERS[order.kind](), data, StreamInfo())


def _markdown(converter: DocumentConverter, data: bytes, info: StreamInfo) -> str:
    return str(converter.convert(io.BytesIO(data), info).markdown)


CONVERTERS: dict[Kind, Callable[[], DocumentConverter]] = {
    Kind.DOCX: DocxConverter,
    Kind.PPTX: PptxConverter,
    Kind.XLSX: XlsxConverter,
}
READERS: dict[Kind, Callable[[Order, bytes], str]] = {
    Kind.HTML: _html,
    Kind.PDF: _pdf,
    Kind.DOCX: _office,
    Kind.PPTX: _office,
    Kind.XLSX: _office,
}
