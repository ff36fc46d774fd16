"""The docs are complete and true where a machine can tell: everything a user can meet is in them, nothing in them is stale."""

import asyncio
import re
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import structlog

from keepwarm.config import BillingConfig, CacheConfig, Config, Limits, ModelConfig, RatesConfig
from keepwarm.core.clock import RandomIds, SystemClock
from keepwarm.core.errors import ErrorKind
from keepwarm.gateway.runtime import Runtime
from keepwarm.server.endpoints import Services
from keepwarm.server.routes import application
from scripts.generated import PART, PARTS, ROOT, amount, documents, rewrite, unit

DOCUMENTS = documents()
API = sorted((ROOT / "docs" / "api").glob("*.md"))
CODE_BLOCK = re.compile(r"^```(?P<language>\w*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<!!)\[[^\]]+\]\((?P<target>[^)\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
SECTIONS = {"": Config, "model": ModelConfig, "cache": CacheConfig, "rates": RatesConfig, "billing": BillingConfig}


def shown(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


document = pytest.mark.parametrize("path", DOCUMENTS, ids=shown)


@document
def test_generated_parts_are_current(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert rewrite(text) == text, f"{shown(path)} is stale: run `make docs`"


def test_every_generated_part_is_shown_somewhere() -> None:
    used = {found["name"] for path in DOCUMENTS for found in PART.finditer(path.read_text(encoding="utf-8"))}
    assert used == set(PARTS)


def without_code(text: str) -> str:
    return CODE_BLOCK.sub("", text)


def anchors(path: Path) -> set[str]:
    """The anchors GitHub gives a file's headings."""
    headings = HEADING.findall(without_code(path.read_text(encoding="utf-8")))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@document
def test_internal_links_resolve(path: Path) -> None:
    for found in LINK.finditer(without_code(path.read_text(encoding="utf-8"))):
        file, _, anchor = found["target"].partition("#")
        if "://" in file:
            continue
        target = path if not file else (path.parent / file).resolve()
        assert target.exists(), f"{shown(path)} links to {found['target']}, which is not there"
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), f"{shown(path)} links to {found['target']}: no such heading"


@document
def test_python_in_the_docs_compiles(path: Path) -> None:
    for block in CODE_BLOCK.finditer(path.read_text(encoding="utf-8")):
        if block["language"] in {"python", "py"}:
            compile(block["code"], f"{shown(path)}: {block['code'][:40]!r}", "exec")


def documented_keys() -> list[tuple[str, msgspec.structs.FieldInfo]]:
    return [
        (f"{section}.{field.name}" if section else field.name, field)
        for section, struct in SECTIONS.items()
        for field in msgspec.structs.fields(struct)
        if not (isinstance(field.default, msgspec.Struct))
    ]


@pytest.mark.parametrize("key, field", documented_keys(), ids=lambda value: value if isinstance(value, str) else "")
def test_config_keys_are_documented_with_their_defaults(key: str, field: msgspec.structs.FieldInfo) -> None:
    rows = [line for line in text_of("docs/configuration.md").splitlines() if line.startswith(f"| `{key}` |")]
    assert len(rows) == 1, f"docs/configuration.md needs one table row for {key}"
    is_plain = isinstance(field.default, str | int | float)  # else none, or a list or table that is empty
    default = str(field.default).lower() if is_plain else ""
    assert default in rows[0].split("|")[2].replace(",", "").lower(), f"{key} defaults to {field.default!r}: {rows[0]}"


def test_the_config_has_no_section_the_docs_test_does_not_know() -> None:
    structs = {
        type(field.default) for field in msgspec.structs.fields(Config) if isinstance(field.default, msgspec.Struct)
    }
    assert structs | {Config} == {*SECTIONS.values(), Limits}


@pytest.mark.parametrize("field", msgspec.structs.fields(Limits), ids=lambda field: field.name)
def test_bounds_are_documented(field: msgspec.structs.FieldInfo) -> None:
    row = next(line for line in text_of("docs/ARCHITECTURE.md").splitlines() if line.startswith(f"| `{field.name}` |"))
    assert amount(field.default, unit(field.name)) in row


@pytest.mark.parametrize("path", API, ids=shown)
@pytest.mark.parametrize("kind", ErrorKind, ids=lambda kind: kind.value)
def test_every_error_is_in_every_dialects_table(kind: ErrorKind, path: Path) -> None:
    assert f"| `{kind.value}` |" in path.read_text(encoding="utf-8"), f"{shown(path)} says nothing of {kind.value}"


async def openapi_document() -> dict[str, Any]:
    """The document as the server gives it. No call behind it is made, so no service is there."""
    absent: Any = None
    runtime = Runtime(SystemClock(), RandomIds(), structlog.get_logger(), absent)
    services = Services(Config(dev=True), *[absent] * 10, runtime, created_at=0)
    transport = httpx.ASGITransport(app=application(services))
    async with httpx.AsyncClient(transport=transport, base_url="http://keepwarm") as client:
        reply = await client.get("/openapi.json")
    return dict(reply.json())


def test_every_route_is_documented() -> None:
    lines = [line for path in DOCUMENTS for line in path.read_text(encoding="utf-8").splitlines()]
    document = asyncio.run(openapi_document())
    calls = [(method.upper(), path) for path, operations in document["paths"].items() for method in operations]
    missing = [
        f"{method} {path}"
        for method, path in [*calls, ("GET", "/openapi.json"), ("GET", "/docs")]
        if not any(re.search(rf"{re.escape(path)}(?![\w/{{])", line) and method in line for line in lines)
    ]
    assert len(calls) > 10
    assert not missing, f"routes that the docs do not name: {missing}"


def test_the_commands_of_the_readme_are_targets_and_what_ci_runs() -> None:
    readme, makefile, ci = text_of("README.md"), text_of("Makefile"), text_of(".ci/run")
    for target in {
        found for pair in re.findall(r"`make ([a-z]+)`|^make ([a-z]+)", readme, re.MULTILINE) for found in pair if found
    }:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"README names `make {target}`"
    assert "make test" in readme
    assert "\nmake test\n" in ci
