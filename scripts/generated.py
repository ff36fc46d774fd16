"""The generated parts of the docs: `python scripts/generated.py` (or `make docs`) rewrites them.

A part stands between `<!-- generated: NAME -->` and `<!-- /generated -->`. Its text comes from the code that decides, so
the docs cannot say anything else; tests/test_docs.py fails when a file is stale. Renderers are pure: values in, text out.
"""

import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import msgspec

from keepwarm.config import Limits
from keepwarm.core.cache_object import TRANSITIONS, Cause, ObjectStatus
from keepwarm.core.errors import ErrorKind
from keepwarm.dialects.anthropic_error import ANTHROPIC_ERRORS
from keepwarm.dialects.error_table import ErrorRow
from keepwarm.dialects.gemini_error import GEMINI_ERRORS
from keepwarm.dialects.kimi import KIMI_ERRORS
from keepwarm.dialects.openai_error import OPENAI_ERRORS

ROOT = Path(__file__).parent.parent
PART = re.compile(r"(<!-- generated: (?P<name>[a-z-]+) -->\n)(?P<body>.*?)(<!-- /generated -->)", re.DOTALL)
FIELD_COMMENT = re.compile(r"^    (?P<name>\w+):[^#\n]*(?:#\s*(?P<comment>.+))?$", re.MULTILINE)
CONSTANT = re.compile(
    r"^(?P<name>[A-Z_]*_(?:MAX|S))\b[^=\n]*= (?P<value>[\d_.* <]+)(?:#\s*(?P<comment>.+))?$", re.MULTILINE
)
KIB = 1024
FIXED_BOUNDS = (  # not in the configuration: nobody has had a reason to change them
    "keepwarm/app.py",
    "keepwarm/storage.py",
    "keepwarm/server/endpoints.py",
    "keepwarm/gateway/warming.py",
    "keepwarm/gateway/settling.py",
    "keepwarm/gateway/files.py",
    "keepwarm/gateway/uploads.py",
    "keepwarm/gateway/billing.py",
    "keepwarm/gateway/object_billing.py",
    "keepwarm/gateway/rate_store.py",
    "keepwarm/billing/ledger.py",
    "keepwarm/billing/meter.py",
    "keepwarm/documents/confine.py",
    "keepwarm/documents/extraction.py",
    "keepwarm/documents/office.py",
    "keepwarm/cache/encode.py",
    "keepwarm/cache/schema.py",
    "keepwarm/cache/template.py",
    "keepwarm/cache/tools.py",
    "keepwarm/engine/scheduler.py",
    "keepwarm/engine/wire.py",
    "keepwarm/engine/local.py",
    "keepwarm/engine/worker.py",
)
UNITS = {"bytes": "bytes", "s": "s", "ms": "ms", "chars": "characters"}  # a part of the name → unit; else a count

CAUSES = {
    Cause.COMPUTED: "prefix is durable and leased",
    Cause.FAILED: "cannot be computed or kept",
    Cause.EXPIRED: "expires_at is past",
    Cause.UPDATED: "PUT, or reset_ttl on use",
    Cause.RENEWED: "reset_ttl while live",
    Cause.ENGINE_LOST: "engine restarted",
}

WHEN = {
    ErrorKind.INVALID_REQUEST: "a member, header or parameter is wrong; `param` is its path",
    ErrorKind.PROMPT_TOO_LONG: "prompt and `max_tokens` do not fit the window; the message has the numbers",
    ErrorKind.UNKNOWN_MODEL: "no model of that name; the message lists the names",
    ErrorKind.UNKNOWN_CACHE: "no such object or tag; another tenant's looks the same",
    ErrorKind.EXPIRED_CACHE: "the object's lifetime is over and `reset_ttl` was not given",
    ErrorKind.UNKNOWN_FILE: "no such file, or it has expired; another tenant's looks the same",
    ErrorKind.UNKNOWN_ROUTE: "no such path",
    ErrorKind.METHOD_NOT_ALLOWED: "the path exists, not for this method",
    ErrorKind.BODY_TOO_LARGE: "more than `limits.body_bytes_max`",
    ErrorKind.HEADERS_TOO_LARGE: "more than `limits.header_bytes_max`",
    ErrorKind.UNAUTHENTICATED: "no key, or an unknown, revoked or expired one",
    ErrorKind.PERMISSION_DENIED: "the key may not do this",
    ErrorKind.QUOTA_EXCEEDED: "no balance or budget left, too many live objects, or too many tokens in them",
    ErrorKind.RATE_LIMITED: "a limit of the organisation is reached: turns at once, requests or tokens a minute, tokens a day",
    ErrorKind.OVERLOADED: "too many turns are running and waiting; refused before any work",
    ErrorKind.ENGINE_DOWN: "the engine is starting or has just died; retry",
    ErrorKind.TIMEOUT: "the turn, or reading its body, took too long",
    ErrorKind.CLIENT_CLOSED: "the client went away; only the log sees it",
    ErrorKind.INTERNAL: "our bug; the log has more than the message",
}


def status_diagram() -> str:
    """The statuses of a cache object as a Mermaid diagram, from the one transition table."""
    lines = ["```mermaid", "stateDiagram-v2", f"    [*] --> {ObjectStatus.PENDING.value}: create"]
    lines += [f"    {status.value} --> {to.value}: {CAUSES[cause]}" for (status, cause), to in TRANSITIONS.items()]
    return "\n".join([*lines, "```", ""])


def unit(field: str) -> str:
    """The unit a field's name carries: `body_bytes_max` is in bytes, `turns_max` a count."""
    return next((UNITS[word] for word in field.split("_") if word in UNITS), "count")


def amount(value: object, in_unit: str) -> str:
    """A default as people read it: 16 MiB, 128,000, 0.5."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if in_unit == "bytes" and value and value % KIB**2 == 0:
        return f"{value // KIB**2} MiB"
    if in_unit == "bytes" and value and value % KIB == 0:
        return f"{value // KIB} KiB"
    return f"{value:,.10g}"


def comments(struct: type[msgspec.Struct]) -> dict[str, str]:
    """The comment on each field's own line in the source."""
    return {found["name"]: found["comment"] or "" for found in FIELD_COMMENT.finditer(inspect.getsource(struct))}


def bounds_table() -> str:
    """Every bound of `Limits` with its default, its unit and the reason given beside it."""
    why = comments(Limits)
    rows = [
        (f"`{field.name}`", amount(field.default, unit(field.name)), unit(field.name), why[field.name])
        for field in msgspec.structs.fields(Limits)
    ]
    return table(("`limits.`", "default", "unit", "why"), rows)


def fixed_bounds_table() -> str:
    """Bounds that are constants of one module, with their value and the reason given beside them."""
    rows = [
        (f"`{found['name']}`", f"`{module}`", found["value"].strip(), found["comment"] or "")
        for module in FIXED_BOUNDS
        for found in CONSTANT.finditer((ROOT / module).read_text(encoding="utf-8"))
    ]
    return table(("constant", "in", "value", "why"), rows)


def errors_table(errors: Mapping[ErrorKind, ErrorRow]) -> str:
    """A dialect's words for every kind of error, in the order of `ErrorKind`."""
    rows = [
        (f"`{kind.value}`", str(errors[kind].status), f"`{errors[kind].type}`", f"`{errors[kind].code}`", WHEN[kind])
        for kind in ErrorKind
    ]
    return table(
        ("kind", "status", "`type`", "`code`", "when"),
        [tuple(c.replace("`None`", "null") for c in row) for row in rows],
    )


def table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """A Markdown table."""
    lines = [header, tuple("---" for _ in header), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


PARTS: dict[str, Callable[[], str]] = {
    "status-diagram": status_diagram,
    "bounds": bounds_table,
    "fixed-bounds": fixed_bounds_table,
    "errors-kimi": lambda: errors_table(KIMI_ERRORS),
    "errors-openai": lambda: errors_table(OPENAI_ERRORS),
    "errors-anthropic": lambda: errors_table(ANTHROPIC_ERRORS),
    "errors-gemini": lambda: errors_table(GEMINI_ERRORS),
}


def rewrite(text: str) -> str:
    """`text` with each generated part as it should be. Raises KeyError for a part nobody renders."""

    def renewed(found: re.Match[str]) -> str:
        return f"{found[1]}{PARTS[found['name']]()}{found[4]}"

    return PART.sub(renewed, text)


def documents() -> list[Path]:
    """The project's Markdown files."""
    return sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


if __name__ == "__main__":
    for path in documents():
        old = path.read_text(encoding="utf-8")
        if (new := rewrite(old)) != old:
            path.write_text(new, encoding="utf-8")
            print(f"rewrote {path.relative_to(ROOT)}")
