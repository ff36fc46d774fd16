"""Proto-JSON, as Google's APIs read and write it: bodies, durations and timestamps.

Out it is plain JSON in camelCase. In it is looser, and both SDKs use that: members in camelCase or snake_case, enums by name
(in any case) or number, numbers as strings, one message in the place of a list of them. `ProtoBody` puts a body into the one
strict form that its shape has, led by the shape: what is free JSON there (a call's arguments, a JSON Schema) stays as it was
sent, names included. Unknown members are ignored. Times are whole nanoseconds, so nothing is lost to rounding.
"""

import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from enum import Enum
from typing import Any, Generic, TypeVar

import msgspec
from msgspec import inspect

from keepwarm.dialects.body import JsonBody, invalid, quoted

T = TypeVar("T")
Reader = Callable[[object], object]

NS_PER_S = 1_000_000_000
DURATION_S_MAX = 315_576_000_000  # 10,000 years: the format's own bound
TIMESTAMP_NS_MAX = 253_402_300_800 * NS_PER_S - 1  # the end of the year 9999

_SNAKE = re.compile(r"_([a-z0-9])", re.ASCII)
_WHOLE = re.compile(r"-?[0-9]{1,19}", re.ASCII)
_NUMBER = re.compile(r"-?[0-9]{1,19}(\.[0-9]{1,30})?([eE][+-]?[0-9]{1,3})?", re.ASCII)
_DURATION = re.compile(r"(?P<sign>-?)(?P<s>[0-9]{1,12})(\.(?P<fraction>[0-9]{1,9}))?s", re.ASCII)
_TIMESTAMP = re.compile(
    r"(?P<date>\d{4}-\d\d-\d\d)[Tt ](?P<time>\d\d:\d\d:\d\d)(\.(?P<fraction>\d{1,9}))?"
    r"([Zz]|(?P<sign>[+-])(?P<h>\d\d):(?P<m>\d\d))",
    re.ASCII,
)


class ProtoEnum(Enum):
    """An enum of the API: values are its names, in the order of their numbers."""


class ProtoBody(Generic[T]):
    """Decodes bodies into `shape`, a struct whose members are renamed to camelCase; make one per shape and keep it."""

    def __init__(self, shape: type[T]) -> None:
        self._shape = shape
        self._any = JsonBody[Any](Any)
        self._strict = JsonBody(shape)
        self._read = _reader(inspect.type_info(shape), {})

    def decode(self, body: bytes) -> T:
        """Raises ApiError(INVALID_REQUEST)."""
        value = self._read(self._any.decode(body))
        try:
            return msgspec.convert(value, self._shape)
        except msgspec.ValidationError:
            return self._strict.decode(msgspec.json.encode(value))  # fails alike, and says it as every body does


def camel(name: str) -> str:
    """The member "display_name" is "displayName"; a name in camelCase stays what it is."""
    return _SNAKE.sub(lambda found: found[1].upper(), name)


def parse_duration(text: str, path: str) -> int:
    """Nanoseconds of "300s" or "3.5s". Raises ApiError(INVALID_REQUEST)."""
    found = _DURATION.fullmatch(text)
    if found is None or int(found["s"]) > DURATION_S_MAX:
        raise invalid(path, f"{quoted(text)} is not a duration in seconds such as '300s' or '3.5s'")
    n_ns = int(found["s"]) * NS_PER_S + _fraction_ns(found["fraction"])
    return -n_ns if found["sign"] else n_ns


def duration_text(n_ns: int) -> str:
    """A duration of so many nanoseconds, "300s"."""
    sign = "-" if n_ns < 0 else ""
    seconds, rest = divmod(abs(n_ns), NS_PER_S)
    return f"{sign}{seconds}{_fraction(rest)}s"


def parse_timestamp(text: str, path: str) -> int:
    """Nanoseconds since 1970 of an RFC 3339 time, in any zone. Raises ApiError(INVALID_REQUEST)."""
    found = _TIMESTAMP.fullmatch(text)
    problem = f"{quoted(text)} is not a time such as '2026-09-07T01:18:17.438678Z'"
    if found is None:
        raise invalid(path, problem)
    try:
        zone = UTC
        if found["sign"] is not None:
            offset = timedelta(hours=int(found["h"]), minutes=int(found["m"]))
            zone = timezone(-offset if found["sign"] == "-" else offset)
        at = datetime.fromisoformat(f"{found['date']}T{found['time']}").replace(tzinfo=zone)
    except ValueError as exc:  # there is no such day, hour or zone
        raise invalid(path, problem) from exc
    since = at - datetime(1970, 1, 1, tzinfo=UTC)
    return (since.days * 86_400 + since.seconds) * NS_PER_S + _fraction_ns(found["fraction"])


def timestamp_text(n_ns: int) -> str:
    """A time of so many nanoseconds since 1970, in UTC, with as many digits as it needs: none, 3, 6 or 9.

    At most `TIMESTAMP_NS_MAX`, the last there is a text for.
    """
    seconds, rest = divmod(n_ns, NS_PER_S)
    at = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(seconds=seconds)
    return f"{at.isoformat(timespec='seconds').removesuffix('+00:00')}{_fraction(rest)}Z"


def _fraction_ns(digits: str | None) -> int:
    return 0 if digits is None else int(digits.ljust(9, "0"))


def _fraction(n_ns: int) -> str:
    if n_ns == 0:
        return ""
    digits = f"{n_ns:09}"
    while digits.endswith("000"):
        digits = digits[:-3]
    return f".{digits}"


def _reader(info: inspect.Type, known: dict[type, Reader]) -> Reader:
    """What puts a decoded value into the strict form of `info`; what does not fit is left for msgspec to refuse."""
    match info:
        case inspect.Metadata():
            return _reader(info.type, known)
        case inspect.UnionType():
            (some,) = (one for one in info.types if not isinstance(one, inspect.NoneType))
            return _reader(some, known)
        case inspect.StructType():
            return known[info.cls] if info.cls in known else _struct_reader(info, known)
        case inspect.VarTupleType():
            return _list_reader(info.item_type, known)
        case inspect.EnumType():
            return _enum_reader(info.cls)
        case inspect.IntType():
            return _int
        case inspect.FloatType():
            return _float
        case _:
            return _as_it_is


def _struct_reader(info: inspect.StructType, known: dict[type, Reader]) -> Reader:
    readers: dict[str, Reader] = {}

    def read(value: object) -> object:
        if not isinstance(value, dict):
            return value
        found = {}
        for key, member in value.items():
            name = key if key in readers else camel(key)
            if name in readers:
                found[name] = readers[name](member)
        return found

    known[info.cls] = read
    for field in info.fields:
        readers[field.encode_name] = _reader(field.type, known)
    return read


def _list_reader(item: inspect.Type, known: dict[type, Reader]) -> Reader:
    read_item = _reader(item, known)

    def read(value: object) -> object:
        if isinstance(value, dict):
            return [read_item(value)]
        return [read_item(one) for one in value] if isinstance(value, list) else value

    return read


def _enum_reader(shape: type[Enum]) -> Reader:
    names: list[str] = [one.value for one in shape]

    def read(value: object) -> object:
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(names):
            return names[value]
        return value.upper() if isinstance(value, str) else value

    return read


def _int(value: object) -> object:
    if isinstance(value, str) and _WHOLE.fullmatch(value):
        return int(value)
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _float(value: object) -> object:
    return float(value) if isinstance(value, str) and _NUMBER.fullmatch(value) else value


def _as_it_is(value: object) -> object:
    return value
