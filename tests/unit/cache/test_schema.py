import json

import pytest

from keepwarm.cache.schema import REPEATS_MAX, SCHEMA_DEPTH_MAX, depth, schema_grammar
from keepwarm.core.errors import ApiError, ErrorKind


def convert(schema: str, bytes_max: int = 10_000) -> str:
    return schema_grammar(schema, lambda text: f"root ::= {text}", param="response_format", bytes_max=bytes_max)


def test_a_schema_within_bounds_is_converted_as_it_is() -> None:
    schema = '{"type": "object", "properties": {"a": {"$ref": "#/$defs/a"}}, "$defs": {"a": {"type": "string", "maxLength": 9}}}'
    assert convert(schema) == f"root ::= {schema}"


def nested(n: int) -> str:
    return '{"items":' * n + "{}" + "}" * n


@pytest.mark.parametrize(
    "schema, reason",
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "must be a JSON object"),
        ("true", "must be a JSON object"),
        (nested(SCHEMA_DEPTH_MAX), f"deeper than {SCHEMA_DEPTH_MAX}"),
        ('{"items": {"$ref": "https://example.org/s.json"}}', "only references inside"),
        ('{"anyOf": [{"$ref": "file:///etc/passwd"}]}', "only references inside"),
        ('{"properties": {"$ref": {"type": "string"}}}', "only references inside"),
        ('{"type": "array", "maxItems": 1000000000}', f"maxItems is 1,000,000,000, limit {REPEATS_MAX:,}"),
        ('{"properties": {"a": {"minLength": 1001}}}', "minLength is 1,001, limit 1,000"),
        ('{"pattern": "^a{3}b{1,99999999999999999999}$"}', "pattern repeats {1,99999999999999999999}"),
        ('{"pattern": "^a{1001,}$"}', "pattern repeats {1001,}"),
    ],
)
def test_what_would_cost_too_much_is_refused(schema: str, reason: str) -> None:
    with pytest.raises(ApiError) as caught:
        convert(schema, bytes_max=200_000)
    assert (caught.value.kind, caught.value.param) == (ErrorKind.INVALID_REQUEST, "response_format")
    assert reason in caught.value.message


def test_a_large_schema_is_refused_with_both_numbers() -> None:
    with pytest.raises(ApiError, match="9 bytes, limit 8"):
        convert('{"é": 1}', bytes_max=8)


def test_bounds_are_the_largest_allowed() -> None:
    convert(nested(SCHEMA_DEPTH_MAX - 1))
    convert(json.dumps({"maxItems": REPEATS_MAX, "pattern": f"^a{{{REPEATS_MAX}}}$"}))


def test_what_the_converter_refuses_is_the_clients_error() -> None:
    def refuse(_schema: str) -> str:
        raise ValueError("unknown type 'x'")

    with pytest.raises(ApiError, match="unknown type 'x'") as caught:
        schema_grammar("{}", refuse, param="tools[0]", bytes_max=100)
    assert caught.value.param == "tools[0]"


def test_depth() -> None:
    assert [depth(value, 9) for value in ("x", {}, [], {"a": 1}, [[]], {"a": [{}]})] == [0, 1, 1, 1, 2, 3]
    assert depth([[[[[]]]]], 2) == 3
