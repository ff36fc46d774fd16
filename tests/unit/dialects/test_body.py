"""Everything that can be wrong with a body is an INVALID_REQUEST that says where."""

import msgspec
import pytest

from keepwarm.config import Limits
from keepwarm.core.errors import ApiError, ErrorKind
from keepwarm.dialects import WireBounds
from keepwarm.dialects.body import JsonBody, json_text, quoted
from tests.golden.transcripts import BOUNDS


class Inner(msgspec.Struct):
    name: str
    weights: dict[str, float] | None = None


class Outer(msgspec.Struct):
    items: tuple[Inner, ...]
    title: str = ""


BODY = JsonBody(Outer)


def error_of(body: bytes) -> ApiError:
    with pytest.raises(ApiError) as caught:
        BODY.decode(body)
    assert caught.value.kind is ErrorKind.INVALID_REQUEST
    return caught.value


@pytest.mark.parametrize(
    "body,param,message",
    [
        (b"{}", "items", "items: is required"),
        (b'{"items":[{}]}', "items[0].name", "items[0].name: is required"),
        (b'{"items":[{"name":"a"},{"name":3}]}', "items[1].name", "items[1].name: expected str, got int"),
        (b'{"items":{}}', "items", "items: expected array, got object"),
        (b'{"items":[{"name":"a","weights":{"x":"y"}}]}', "items[0].weights", "expected float, got str"),
        (b'{"items":[{"name":"a","weights":{"x":1e999}}]}', "items[0].weights", "out of range"),
        (b"[]", None, "the body: expected object, got array"),
    ],
)
def test_wrong_shape_names_the_path(body: bytes, param: str | None, message: str) -> None:
    error = error_of(body)
    assert error.param == param
    assert message in error.message


@pytest.mark.parametrize(
    "body,message",
    [
        (b"", "ends too early"),
        (b'{"items":[', "(byte 10)"),
        (b'{"items":[]', "ends too early"),
        (b"nope", "not valid JSON"),
        (b'{"items":[]} x', "trailing characters"),
        (b'{"items":[{"name":"a","weights":{"x":NaN}}]}', "(byte 37)"),
        (b'{"items":[{"name":"a","weights":{"x":Infinity}}]}', "(byte 37)"),
        (b'{"items":[{"name":"\xff"}]}', "not valid UTF-8 (byte 19)"),
        (b'{"items":[{"name":"\\ud800 and more"}]}', "surrogate"),
        (b'{"items":[{"name":"\\udc00 and more"}]}', "surrogate"),
        (b'{"items":[{"name":"a\nb"}]}', "(byte 20)"),
        (b"\xef\xbb\xbf{}", "(byte 0)"),
    ],
)
def test_broken_text_names_the_byte(body: bytes, message: str) -> None:
    error = error_of(body)
    assert error.param is None
    assert message in error.message


@pytest.mark.parametrize("opening", [b'{"unknown":' + b"[" * 200_000, b'{"a":' * 200_000, b"[" * 200_000])
def test_deep_nesting_is_refused(opening: bytes) -> None:
    error_of(opening)
    error_of(opening + b"]" * 200_000 + b"}")


def test_deep_nesting_says_so() -> None:
    assert "nested too deeply" in error_of(b'{"u":' + b"[" * 50_000 + b"]" * 50_000 + b"}").message


def test_of_a_key_given_twice_the_last_counts() -> None:
    assert BODY.decode(b'{"title":"a","items":[],"title":"b"}').title == "b"


def test_schema_text_is_compact_and_in_order() -> None:
    assert json_text({"b": 1, "a": [1.5, "é"]}, "p", BOUNDS) == '{"b":1,"a":[1.5,"é"]}'


def test_schema_bounds_are_told_with_numbers() -> None:
    long = {"description": "x" * BOUNDS.schema_bytes_max}
    with pytest.raises(ApiError, match=r"p: has 65,554 bytes, at most 65,536 are allowed"):
        json_text(long, "p", BOUNDS)


@pytest.mark.parametrize("n_levels,fits", [(64, True), (65, False)])
def test_schema_depth(n_levels: int, fits: bool) -> None:
    value: dict[str, object] = {}
    for _ in range(n_levels - 1):
        value = {"a": value}
    if fits:
        assert json_text(value, "p", BOUNDS)
    else:
        with pytest.raises(ApiError, match="more than 64 levels"):
            json_text(value, "p", BOUNDS)


def test_quoted_is_short() -> None:
    assert len(quoted("x" * 1_000_000)) < 80


def test_bounds_come_from_the_configured_limits() -> None:
    bounds = msgspec.convert(Limits(tools_max=3), WireBounds, from_attributes=True)
    assert bounds.tools_max == 3
    assert set(WireBounds.__struct_fields__) - set(Limits.__struct_fields__) <= {"schema_depth_max"}
