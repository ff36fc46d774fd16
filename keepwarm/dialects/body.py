"""From body bytes to a wire struct, or an `ApiError` that says where the body is wrong.

Everything a JSON parser can trip over ends here as INVALID_REQUEST: broken syntax (with the byte), broken UTF-8, lone
surrogates, numbers out of range, NaN, nesting too deep for the stack, wrong types (with the path). A key given twice
counts as its last occurrence, as in most parsers; unknown members are ignored.
"""

import re
from collections.abc import Collection
from typing import Any, Generic, TypeVar

import msgspec

from keepwarm.core.errors import ApiError, ErrorKind
from keepwarm.dialects import WireBounds

T = TypeVar("T")

QUOTED_CHARS_MAX = 64  # of a client's own text repeated in an error message

_AT_PATH = re.compile(r" - at `(?P<path>[^`]*)`$")
_MISSING_FIELD = re.compile(r"missing required field `(?P<field>[^`]*)`")


def invalid(path: str, problem: str) -> ApiError:
    """The error for a wrong field: "messages[1].content: may not be null"."""
    return ApiError(ErrorKind.INVALID_REQUEST, f"{path}: {problem}", param=path)


def quoted(text: str) -> str:
    """A client's text, short enough to repeat in a message."""
    return repr(text if len(text) <= QUOTED_CHARS_MAX else text[:QUOTED_CHARS_MAX] + "…")


class JsonBody(Generic[T]):
    """Decodes bodies into `shape`; make one per struct and keep it, the decoder is compiled when it is made."""

    def __init__(self, shape: type[T]) -> None:
        self._decoder = msgspec.json.Decoder(shape)

    def decode(self, body: bytes) -> T:
        """Raises ApiError(INVALID_REQUEST)."""
        try:
            return self._decoder.decode(body)
        except msgspec.ValidationError as exc:
            raise _wrong_shape(str(exc)) from exc
        except (msgspec.DecodeError, UnicodeDecodeError) as exc:
            raise ApiError(ErrorKind.INVALID_REQUEST, _syntax_problem(body, str(exc))) from exc
        except RecursionError as exc:
            raise ApiError(ErrorKind.INVALID_REQUEST, "the body is nested too deeply") from exc


def passed_on(value: dict[str, Any], path: str, bounds: WireBounds) -> str:
    """JSON that only passes through, as compact text in the order its members were sent.

    Raises ApiError(INVALID_REQUEST) when it is deeper than `bounds` allow.
    """
    if _is_deeper(value, bounds.schema_depth_max):
        raise invalid(path, f"is nested more than {bounds.schema_depth_max} levels deep")
    return msgspec.json.encode(value).decode()


def json_text(value: dict[str, Any], path: str, bounds: WireBounds) -> str:
    """A schema that only passes through, as compact JSON text.

    Raises ApiError(INVALID_REQUEST) when it is deeper or longer than `bounds` allow.
    """
    text = passed_on(value, path, bounds)
    n_bytes = len(text.encode())
    if n_bytes > bounds.schema_bytes_max:
        raise invalid(path, f"has {n_bytes:,} bytes, at most {bounds.schema_bytes_max:,} are allowed")
    return text


def require_stop_string(string: str, path: str, bounds: WireBounds) -> None:
    """Raises ApiError(INVALID_REQUEST) for an empty or too long one."""
    n_bytes = len(string.encode())
    if n_bytes == 0:
        raise invalid(path, "must not be empty")
    if n_bytes > bounds.stop_bytes_max:
        raise invalid(path, f"has {n_bytes:,} bytes, at most {bounds.stop_bytes_max:,} are allowed")


def require_new_name(name: str, seen: Collection[str], path: str, pattern: re.Pattern[str]) -> None:
    """Raises ApiError(INVALID_REQUEST) for a tool's name that does not match or that an earlier one has."""
    if not pattern.fullmatch(name):
        raise invalid(path, f"{quoted(name)} does not match {pattern.pattern}")
    if name in seen:
        raise invalid(path, f"{quoted(name)} is defined twice")


def require_at_most(items: Collection[object], limit: int, path: str, what: str) -> None:
    """Raises ApiError(INVALID_REQUEST) with both numbers."""
    if len(items) > limit:
        raise invalid(path, f"has {len(items):,} {what}, at most {limit:,} are allowed")


def _wrong_shape(problem: str) -> ApiError:
    """From msgspec's "Expected `str`, got `int` - at `$.messages[0].role`"; the path goes to the front."""
    at = _AT_PATH.search(problem)
    path = at["path"].removeprefix("$").removeprefix(".") if at else ""
    text = problem[: at.start()] if at else problem
    missing = _MISSING_FIELD.search(text)
    if missing:
        return invalid(f"{path}.{missing['field']}".removeprefix("."), "is required")
    text = text[0].lower() + text[1:].replace("`", "")
    if not path:
        return ApiError(ErrorKind.INVALID_REQUEST, f"the body: {text}")
    return ApiError(ErrorKind.INVALID_REQUEST, f"{path}: {text}", param=path.replace("[...]", ""))


def _syntax_problem(body: bytes, problem: str) -> str:
    """What is wrong with the text itself. UTF-8 comes first: msgspec counts its bytes from the start of the string."""
    try:
        body.decode()
    except UnicodeDecodeError as exc:
        return f"the body is not valid UTF-8 (byte {exc.start})"
    if "truncated" in problem:
        return f"the body is not valid JSON: it ends too early, or in the middle of an escape (byte {len(body)})"
    return f"the body is not valid JSON: {problem.removeprefix('JSON is malformed: ')}"


def _is_deeper(value: object, n_levels: int) -> bool:
    """Whether containers are nested more than `n_levels` deep; iterative, since the depth is the client's choice."""
    level: list[object] = [value]
    for _ in range(n_levels):
        below: list[object] = []
        for item in level:
            if isinstance(item, dict):
                below.extend(item.values())
            elif isinstance(item, list):
                below.extend(item)
        if not below:
            return False
        level = below
    return any(isinstance(item, dict | list) for item in level)
