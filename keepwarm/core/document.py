"""How the text of a document stands in a prompt. One rendering for every dialect, so one document is one prefix.

    <document title="Report 2024" context="the board's copy">
    … text …
    </document>

Injective: equal renderings mean equal title, context and text. So no text can end its own document or begin another:
wherever the text has `<document` or `</document`, however spaced and in any case, a backslash is put behind the `<`, and
one more where there was one already. Everything else of the text stays as it is, since models read code and tables
better unescaped.
"""

import re

TAG = re.compile(r"<(?=[\\/\s]*document)", re.IGNORECASE)  # one class of characters: linear in the text
ATTRIBUTE_ESCAPES = str.maketrans({"&": "&amp;", '"': "&quot;", "<": "&lt;", "\n": "&#10;", "\r": "&#13;"})


def document_text(title: str | None, context: str | None, text: str) -> str:
    """A document as the model reads it. The line ends with the last tag, so what follows begins a line of its own."""
    attributes = (("title", title), ("context", context))
    shown = "".join(
        f' {name}="{value.translate(ATTRIBUTE_ESCAPES)}"' for name, value in attributes if value is not None
    )
    return f"<document{shown}>\n{TAG.sub('<' + chr(92) * 2, text)}\n</document>\n"
