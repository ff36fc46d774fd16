"""Proto-JSON: what is accepted for one and the same body, and times to the nanosecond."""

import json
from datetime import UTC, datetime
from typing import Annotated, Any

import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.json_format import MessageToDict, Parse
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Meta, Struct

from keepwarm.core.errors import ApiError, ErrorKind
from keepwarm.dialects.gemini_json import (
    DURATION_S_MAX,
    NS_PER_S,
    TIMESTAMP_NS_MAX,
    ProtoBody,
    ProtoEnum,
    camel,
    duration_text,
    parse_duration,
    parse_timestamp,
    timestamp_text,
)

YEAR_1_NS = int((datetime(1, 1, 1, tzinfo=UTC) - datetime(1970, 1, 1, tzinfo=UTC)).total_seconds()) * NS_PER_S


class Colour(ProtoEnum):
    NO_COLOUR = "NO_COLOUR"
    RED = "RED"
    DEEP_BLUE = "DEEP_BLUE"


class Inner(Struct, rename="camel"):
    a_name: str | None = None
    free_form: dict[str, Any] | None = None


class Outer(Struct, rename="camel"):
    list_of_some: tuple[Inner, ...] = ()
    the_colour: Colour | None = None
    n_of_them: Annotated[int, Meta(ge=0)] | None = None
    a_share: float | None = None
    more: "Outer | None" = None


BODY = ProtoBody(Outer)


def decoded(**members: Any) -> Outer:
    return BODY.decode(json.dumps(members).encode())


@pytest.mark.parametrize(
    "members",
    [
        {"listOfSome": [{"aName": "x"}], "theColour": "DEEP_BLUE", "nOfThem": 3, "aShare": 0.5},
        {"list_of_some": [{"a_name": "x"}], "the_colour": 2, "n_of_them": "3", "a_share": "0.5"},
        {"list_of_some": {"aName": "x", "unknown": 1}, "theColour": "deep_blue", "n_of_them": 3.0, "aShare": 5e-1},
    ],
)
def test_one_body_in_many_forms(members: dict[str, Any]) -> None:
    expected = Outer((Inner("x"),), Colour.DEEP_BLUE, 3, 0.5)
    assert decoded(**members) == expected
    assert decoded(more=members) == Outer(more=expected)


def test_free_json_stays_as_it_was_sent() -> None:
    free = {"snake_case": {"any_of": "3", "RED": 1}, "b": [1.0, None]}
    assert decoded(listOfSome=[{"free_form": free}]).list_of_some[0].free_form == free


@pytest.mark.parametrize(
    "members,param",
    [
        ({"theColour": "GREEN"}, "theColour"),
        ({"the_colour": 3}, "theColour"),
        ({"theColour": True}, "theColour"),
        ({"n_of_them": "many"}, "nOfThem"),
        ({"n_of_them": "-1"}, "nOfThem"),
        ({"n_of_them": 1.5}, "nOfThem"),
        ({"aShare": "NaN"}, "aShare"),
        ({"listOfSome": "x"}, "listOfSome"),
        ({"listOfSome": [{"aName": 1}]}, "listOfSome"),
        ({"more": []}, "more"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_path(members: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as caught:
        decoded(**members)
    assert caught.value.kind is ErrorKind.INVALID_REQUEST
    assert (caught.value.param or "").startswith(param)


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b'"x"', b'{"aShare":NaN}', b"[" * 100_000, b"\xff"])
def test_no_object_no_body(body: bytes) -> None:
    with pytest.raises(ApiError) as caught:
        BODY.decode(body)
    assert caught.value.kind is ErrorKind.INVALID_REQUEST


def test_names() -> None:
    assert [camel(name) for name in ("display_name", "displayName", "top_k", "x", "sha256_hash")] == [
        "displayName", "displayName", "topK", "x", "sha256Hash",
    ]  # fmt: skip


@given(st.integers(-DURATION_S_MAX * NS_PER_S, DURATION_S_MAX * NS_PER_S))
def test_durations_are_protobufs(n_ns: int) -> None:
    text = duration_text(n_ns)
    theirs = Parse(json.dumps(text), Duration())
    assert theirs.ToNanoseconds() == n_ns == parse_duration(text, "ttl")
    assert MessageToDict(theirs) == text


def test_durations_with_any_number_of_digits() -> None:
    assert [parse_duration(text, "ttl") for text in ("300s", "3.5s", "0s", "0.000000001s", "-1.5s")] == [
        300 * NS_PER_S, 3_500_000_000, 0, 1, -1_500_000_000,
    ]  # fmt: skip


@pytest.mark.parametrize(
    "text", ["", "s", "300", "5m", "1.s", ".5s", "1.0000000001s", "1e3s", " 1s", "1s ", "٣s", "999999999999s", "+1s"]
)
def test_no_duration(text: str) -> None:
    with pytest.raises(ApiError, match=r"^ttl: .* is not a duration"):
        parse_duration(text, "ttl")


@given(st.integers(YEAR_1_NS, TIMESTAMP_NS_MAX))
def test_times_are_protobufs(n_ns: int) -> None:
    text = timestamp_text(n_ns)
    theirs = Parse(json.dumps(text), Timestamp())
    assert theirs.ToNanoseconds() == n_ns == parse_timestamp(text, "expireTime")
    assert MessageToDict(theirs) == text


@pytest.mark.parametrize(
    "text",
    [
        "2026-09-07T01:18:17.438678Z",
        "2026-09-07t01:18:17.438678z",
        "2026-09-07T03:18:17.438678+02:00",
        "2026-09-06T15:48:17.4386780-09:30",
        "2026-09-07 01:18:17.438678000Z",
    ],
)
def test_one_time_in_many_zones(text: str) -> None:
    assert parse_timestamp(text, "expireTime") == 1_788_743_897_438_678_000


@pytest.mark.parametrize(
    "text",
    [
        "", "2026-09-07", "2026-09-07T01:18:17", "2026-02-30T00:00:00Z", "2026-13-01T00:00:00Z", "2026-09-07T24:18:17Z",
        "2026-09-07T01:18:60Z", "2026-09-07T01:18:17+25:00", "2026-09-07T01:18:17.Z", "0000-01-01T00:00:00Z",
        "2026-09-07T01:18:17.1234567890Z", "1788743897", "2026-09-07T01:18:17Z\n",
    ],
)  # fmt: skip
def test_no_time(text: str) -> None:
    with pytest.raises(ApiError, match=r"^expireTime: .* is not a time"):
        parse_timestamp(text, "expireTime")
