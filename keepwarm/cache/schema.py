"""Which JSON Schemas may be turned into a grammar: bounded in size, depth and repetition, with references inside only.

The converter expands what it is given (a string of at most n characters becomes n nested optional ones) and llama.cpp's
grammar then lives in the engine's process, so the bounds are checked before either sees the schema.
"""

import re
from collections.abc import Callable, Iterator

import msgspec

from keepwarm.cache.template import Json
from keepwarm.core.errors import ApiError, ErrorKind

SCHEMA_DEPTH_MAX = 64  # nested objects and arrays of the schema's own text
REPEATS_MAX = 1000  # the converter writes n nested options, and llama.cpp parses no more than this
_COUNTS = ("minLength", "maxLength", "minItems", "maxItems")
_QUANTIFIER = re.compile(r"\{\s*(\d*)\s*,?\s*(\d*)\s*\}")


def schema_grammar(schema: str, to_gbnf: Callable[[str], str], *, param: str, bytes_max: int) -> str:
    """GBNF for `schema` (JSON text). Raises ApiError(INVALID_REQUEST) that names `param` and what is too much."""
    check_schema(schema, param=param, bytes_max=bytes_max)
    try:
        return to_gbnf(schema)
    except ValueError as exc:
        raise _refused(param, str(exc)) from exc


def check_schema(schema: str, *, param: str, bytes_max: int) -> None:
    """Raises ApiError(INVALID_REQUEST) when `schema` is not JSON, out of bounds, or refers to other documents."""
    n_bytes = len(schema.encode())
    if n_bytes > bytes_max:
        raise _refused(param, f"the schema has {n_bytes:,} bytes, limit {bytes_max:,}")
    try:
        value: Json = msgspec.json.decode(schema)
    except (msgspec.DecodeError, RecursionError) as exc:
        raise _refused(param, f"the schema is not JSON: {exc}") from exc
    if not isinstance(value, dict):
        raise _refused(param, "the schema must be a JSON object")
    if depth(value, SCHEMA_DEPTH_MAX) > SCHEMA_DEPTH_MAX:
        raise _refused(param, f"the schema is nested deeper than {SCHEMA_DEPTH_MAX}")
    for part in _objects(value):
        _check_part(part, param)


def depth(value: Json, stop: int) -> int:
    """How deep objects and arrays are nested in `value`, counted no further than `stop` + 1."""
    level: list[Json] = [value]
    n = 0
    while n <= stop:
        level = [
            item
            for outer in level
            if isinstance(outer, dict | list)
            for item in ((*outer.values(), None) if isinstance(outer, dict) else (*outer, None))
        ]
        if not level:
            return n
        n += 1
    return n


def _objects(value: Json) -> Iterator[dict[str, Json]]:
    waiting = [value]
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict):
            yield part
            waiting += part.values()
        elif isinstance(part, list):
            waiting += part


def _check_part(part: dict[str, Json], param: str) -> None:
    reference = part.get("$ref", "#")
    if not isinstance(reference, str) or not reference.startswith("#"):
        raise _refused(param, f'$ref {reference!r} is refused: only references inside the schema ("#/…") are followed')
    for key in _COUNTS:
        count = part.get(key)
        if isinstance(count, int | float) and count > REPEATS_MAX:
            raise _refused(param, f"{key} is {count:,}, limit {REPEATS_MAX:,}")
    pattern = part.get("pattern")
    if isinstance(pattern, str):
        for found in _QUANTIFIER.finditer(pattern):
            if any(number and int(number[:9]) > REPEATS_MAX for number in found.groups()):
                raise _refused(param, f"pattern repeats {found.group()}, limit {REPEATS_MAX:,}")


def _refused(param: str, reason: str) -> ApiError:
    return ApiError(ErrorKind.INVALID_REQUEST, f"{param}: {reason}", param=param)
