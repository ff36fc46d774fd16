"""Where a request's cache breakpoints are, by Anthropic's rules for `cache_control`. Pure.

Blocks count in the order tools, system, messages. Of explicit breakpoints there are at most four, a longer lifetime never
stands behind a shorter one, and blocks that cannot carry one (thinking, empty text) are refused by name. The top-level
`cache_control` puts one more after the last block that can carry it, or none where no block can.
Source: wire format of the Messages API, "prompt caching" and "automatic caching".
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

from msgspec import Struct

from keepwarm.core.errors import ApiError, ErrorKind
from keepwarm.core.request import Mark
from keepwarm.dialects.anthropic_block import CacheControl, Content, ContentBlock, MessageParam, ToolParam, placed
from keepwarm.dialects.body import invalid, quoted

MARKS_MAX = 4
LIFETIMES_S = {"5m": 300, "1h": 3600}
DEFAULT_LIFETIME = "5m"

Marks = Mapping[str, Mark]  # by the path of what carries the mark


class Site(Struct, frozen=True):
    """A place in the body. `refusal` says why it can carry no breakpoint; `is_inner` is inside a tool's result."""

    path: str
    control: CacheControl | None
    refusal: str | None = None
    is_inner: bool = False


def marks_of(
    tools: Sequence[ToolParam],
    system: Content | None,
    messages: Sequence[MessageParam],
    automatic: CacheControl | None,
) -> Marks:
    """Every breakpoint of a request; `automatic` is the top-level one. Raises ApiError(INVALID_REQUEST)."""
    sites = list(_sites(tools, system, messages))
    marks = {site.path: _explicit(site, site.control) for site in sites if site.control is not None}
    if len(marks) > MARKS_MAX:
        raise _too_many(len(marks))
    if automatic is not None:
        _add_automatic(marks, sites, _mark(automatic, "cache_control"))
    _require_order([(site.path, marks[site.path]) for site in sites if site.path in marks])
    return marks


def _sites(tools: Sequence[ToolParam], system: Content | None, messages: Sequence[MessageParam]) -> Iterator[Site]:
    for i, tool in enumerate(tools):
        yield Site(f"tools[{i}]", tool.cache_control)
    for path, block in placed(system, "system"):
        yield Site(path, block.cache_control, _refusal(block))
    for i, message in enumerate(messages):
        for path, block in placed(message.content, f"messages[{i}].content"):
            if block.type == "tool_result" and isinstance(block.content, tuple):
                for inner_path, inner in placed(block.content, f"{path}.content"):
                    yield Site(inner_path, inner.cache_control, _refusal(inner), is_inner=True)
            yield Site(path, block.cache_control, _refusal(block))


def _refusal(block: ContentBlock) -> str | None:
    if block.type in ("thinking", "redacted_thinking"):
        return f"cannot be set on {block.type} blocks"
    if block.type == "text" and not block.text:
        return "cannot be set on empty text blocks"
    return None


def _explicit(site: Site, control: CacheControl) -> Mark:
    path = f"{site.path}.cache_control"
    if site.refusal is not None:
        raise invalid(path, site.refusal)
    return _mark(control, path)


def _mark(control: CacheControl, path: str) -> Mark:
    if control.type != "ephemeral":
        raise invalid(f"{path}.type", f"{quoted(control.type)} is not 'ephemeral'")
    ttl = DEFAULT_LIFETIME if control.ttl is None else control.ttl
    if ttl not in LIFETIMES_S:
        raise invalid(f"{path}.ttl", f"{quoted(ttl)} is not one of {', '.join(LIFETIMES_S)}")
    return Mark(LIFETIMES_S[ttl])


def _add_automatic(marks: dict[str, Mark], sites: Sequence[Site], mark: Mark) -> None:
    last = next((site for site in reversed(sites) if site.refusal is None and not site.is_inner), None)
    if last is None:
        return
    there = marks.get(last.path)
    if there is None and len(marks) == MARKS_MAX:
        raise _too_many(MARKS_MAX + 1)
    if there is not None and there != mark:
        problem = (
            f"is '{_ttl(mark)}', but the last block, {last.path}, has a cache_control with the ttl '{_ttl(there)}'"
        )
        raise invalid("cache_control.ttl", problem)
    marks[last.path] = mark


def _require_order(marks: Sequence[tuple[str, Mark]]) -> None:
    for (_, before), (path, mark) in pairwise(marks):
        if before.ttl_s is not None and mark.ttl_s is not None and before.ttl_s < mark.ttl_s:
            raise invalid(
                f"{path}.cache_control.ttl",
                f"a ttl='{_ttl(mark)}' cache_control block must not come after a ttl='{_ttl(before)}' cache_control block. "
                "Note that blocks are processed in the following order: tools, system, messages.",
            )


def _too_many(n: int) -> ApiError:
    """Anthropic's own sentence, as far as it is known; clients may look for it."""
    message = f"A maximum of {MARKS_MAX} blocks with cache_control may be provided. Found {n}."
    return ApiError(ErrorKind.INVALID_REQUEST, message)


def _ttl(mark: Mark) -> str:
    return next(name for name, seconds in LIFETIMES_S.items() if seconds == mark.ttl_s)
