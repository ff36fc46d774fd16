"""Small documents made by hand, sound and hostile, so that tests need no library that writes them."""

import io
import zipfile
import zlib
from collections.abc import Sequence

OOXML = "application/vnd.openxmlformats-officedocument"
DOCX = f"{OOXML}.wordprocessingml.document"
PPTX = f"{OOXML}.presentationml.presentation"
XLSX = f"{OOXML}.spreadsheetml.sheet"
XML = '<?xml version="1.0" encoding="UTF-8" standalone="yes"?>'
RELATIONS = "http://schemas.openxmlformats.org/package/2006/relationships"
OFFICE_RELATIONS = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
TYPES = "http://schemas.openxmlformats.org/package/2006/content-types"
WORD = "http://schemas.openxmlformats.org/wordprocessingml/2006/main"
SHEET = "http://schemas.openxmlformats.org/spreadsheetml/2006/main"


def pdf(pages: Sequence[Sequence[str]]) -> bytes:
    """A PDF with these lines on its pages."""
    return pdf_of([_shown(lines).encode() for lines in pages])


def pdf_of(contents: Sequence[bytes], *, filtered: bool = False, trailer: str = "") -> bytes:
    """A PDF whose pages have these content streams; `filtered`: they are deflated already."""
    kids = " ".join(f"{4 + 2 * i} 0 R" for i in range(len(contents)))
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        f"<< /Type /Pages /Kids [{kids}] /Count {len(contents)} >>".encode(),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    filters = "/Filter /FlateDecode " if filtered else ""
    for i, content in enumerate(contents):
        resources = "/Resources << /Font << /F1 3 0 R >> >>"
        page = f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents {5 + 2 * i} 0 R {resources} >>"
        head = f"<< {filters}/Length {len(content)} >>\nstream\n".encode()
        objects += [page.encode(), head + content + b"\nendstream"]
    made, places = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, 1):
        places.append(len(made))
        made += f"{number} 0 obj\n".encode() + body + b"\nendobj\n"
    table = "".join(f"{place:010d} 00000 n \n" for place in places)
    end = f"trailer\n<< /Size {len(objects) + 1} /Root 1 0 R {trailer}>>\nstartxref\n{len(made)}\n%%EOF\n"
    return made + f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n{table}{end}".encode()


def encrypted_pdf() -> bytes:
    """A PDF that asks for a password: the one it is checked against is no password's."""
    key = f"<{'41' * 32}>"
    encrypt = f"/Encrypt << /Filter /Standard /V 1 /R 2 /P -4 /O {key} /U {key} >> /ID [<{'42' * 16}> <{'42' * 16}>] "
    return pdf_of([_shown(["secret"]).encode()], trailer=encrypt)


def bomb_pdf(n_bytes: int) -> bytes:
    """A PDF of one page whose content is `n_bytes` long once inflated."""
    return pdf_of([_deflated(b" ", n_bytes)], filtered=True)


def docx(paragraphs: Sequence[str]) -> bytes:
    """A Word document; the first paragraph is a heading."""
    heading = '<w:pPr><w:pStyle w:val="Heading1"/></w:pPr>'
    shown = "".join(
        f"<w:p>{heading if i == 0 else ''}<w:r><w:t>{text}</w:t></w:r></w:p>" for i, text in enumerate(paragraphs)
    )
    style = '<w:style w:type="paragraph" w:styleId="Heading1"><w:name w:val="heading 1"/></w:style>'
    return _package(
        "word/document.xml",
        f"{OOXML}.wordprocessingml.document.main+xml",
        {
            "word/document.xml": f'{XML}<w:document xmlns:w="{WORD}"><w:body>{shown}</w:body></w:document>',
            "word/styles.xml": f'{XML}<w:styles xmlns:w="{WORD}">{style}</w:styles>',
            "word/_rels/document.xml.rels": _relations({"rId1": ("styles", "styles.xml")}),
        },
    )


def xlsx(rows: Sequence[Sequence[str]]) -> bytes:
    """A workbook with one sheet, "Prices"."""
    cells = "".join(
        f'<row r="{r}">'
        + "".join(f'<c r="{chr(65 + c)}{r}" t="inlineStr"><is><t>{text}</t></is></c>' for c, text in enumerate(row))
        + "</row>"
        for r, row in enumerate(rows, 1)
    )
    sheets = '<sheets><sheet name="Prices" sheetId="1" r:id="rId1"/></sheets>'
    return _package(
        "xl/workbook.xml",
        f"{OOXML}.spreadsheetml.sheet.main+xml",
        {
            "xl/workbook.xml": f'{XML}<workbook xmlns="{SHEET}" xmlns:r="{OFFICE_RELATIONS}">{sheets}</workbook>',
            "xl/_rels/workbook.xml.rels": _relations({"rId1": ("worksheet", "worksheets/sheet1.xml")}),
            "xl/worksheets/sheet1.xml": (f'{XML}<worksheet xmlns="{SHEET}"><sheetData>{cells}</sheetData></worksheet>'),
        },
        {"/xl/worksheets/sheet1.xml": f"{OOXML}.spreadsheetml.worksheet+xml"},
    )


def zip_bomb(folder: str, n_bytes: int) -> bytes:
    """An archive with one part in `folder` that is `n_bytes` long once unpacked."""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive, archive.open(f"{folder}bomb.xml", "w") as part:
        for _ in range(n_bytes >> 20):
            part.write(bytes(1 << 20))
    return made.getvalue()


def _shown(lines: Sequence[str]) -> str:
    escaped = (line.replace("\\", r"\\").replace("(", r"\(").replace(")", r"\)") for line in lines)
    return "BT /F1 10 Tf 12 TL 50 750 Td " + " ".join(f"({line}) Tj T*" for line in escaped) + " ET"


def _deflated(byte: bytes, n_bytes: int) -> bytes:
    deflate = zlib.compressobj(9)
    return b"".join(deflate.compress(byte * (1 << 20)) for _ in range(n_bytes >> 20)) + deflate.flush()


def _relations(targets: dict[str, tuple[str, str]]) -> str:
    shown = "".join(
        f'<Relationship Id="{name}" Type="{OFFICE_RELATIONS}/{kind}" Target="{target}"/>'
        for name, (kind, target) in targets.items()
    )
    return f'{XML}<Relationships xmlns="{RELATIONS}">{shown}</Relationships>'


def _package(main: str, main_type: str, parts: dict[str, str], types: dict[str, str] | None = None) -> bytes:
    overrides = "".join(
        f'<Override PartName="{name}" ContentType="{kind}"/>'
        for name, kind in {f"/{main}": main_type, **(types or {})}.items()
    )
    defaults = (
        '<Default Extension="xml" ContentType="application/xml"/>'
        '<Default Extension="rels" ContentType="application/vnd.openxmlformats-package.relationships+xml"/>'
    )
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("[Content_Types].xml", f'{XML}<Types xmlns="{TYPES}">{defaults}{overrides}</Types>')
        archive.writestr("_rels/.rels", _relations({"rId1": ("officeDocument", main)}))
        for name, text in parts.items():
            archive.writestr(name, text)
    return made.getvalue()
