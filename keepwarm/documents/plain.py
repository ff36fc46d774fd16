"""Bytes to text, in any common encoding. Pure.

What says most goes first: a byte order mark, the charset the sender named, UTF-8 if the bytes are valid UTF-8, and only
then a guess from the letters' frequencies. Bytes that are no text in any of them are refused, never read with losses.
"""

import codecs

from charset_normalizer import from_bytes

from keepwarm.documents import DocumentFault

BOMS = (  # UTF-32 before UTF-16, whose mark it begins with
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def decode(data: bytes, charset: str | None) -> str:
    """The text of `data`. Raises DocumentFault."""
    named = next((encoding for bom, encoding in BOMS if data.startswith(bom)), None) or charset
    if named is not None:
        return _decode_as(data, named)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        text = ""
    if (data and not text) or "\0" in text:  # UTF-16 of English text is valid UTF-8, with a NUL beside each letter
        text = _guess(data)
    return text


def clean(text: str) -> str:
    """`text` with one kind of line end and nothing that has no place in a prompt: NUL, half a surrogate pair."""
    text = text.encode("utf-8", "replace").decode("utf-8")
    return text.replace("\r\n", "\n").replace("\r", "\n").replace("\f", "\n").replace("\0", "")


def _decode_as(data: bytes, encoding: str) -> str:
    try:
        text = data.decode(encoding)
    except LookupError:  # also for what is no encoding of text: zlib, say, which would unpack
        raise DocumentFault(f"is in the charset {encoding!r}, which is not known here") from None
    except UnicodeError:
        raise DocumentFault(f"is not in the charset {encoding!r} that it names") from None
    return text


def _guess(data: bytes) -> str:
    best = from_bytes(data).best()
    text = "" if best is None else str(best)
    if best is None or "\0" in text:
        raise DocumentFault("is no text in any common encoding; name its charset, or its media type if it is no text")
    return text
