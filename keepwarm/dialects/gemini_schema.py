"""Gemini's schemas, which are OpenAPI 3.0's, as JSON Schema; and the functions that are described by them.

    {"type": "OBJECT", "properties": {"n": {"type": 3, "nullable": true, "minimum": "0"}}, "propertyOrdering": ["n"]}
    {"type": "object", "properties": {"n": {"type": ["integer", "null"], "minimum": 0}}}

Types come by name in any case or as the API's numbers, members in either spelling, counts as numbers or strings. Properties
are put into `propertyOrdering`, since an answer made by grammar has them in the schema's order. What JSON Schema knows under
the same name stays, unknown members and all: schemas that already are JSON Schema pass through unchanged.
"""

import re
from collections.abc import Sequence
from typing import Any

import msgspec
from msgspec import Struct

from keepwarm.core.request import Tool, ToolChoice, ToolMode
from keepwarm.dialects import WireBounds
from keepwarm.dialects.body import invalid, json_text, quoted, require_at_most, require_new_name
from keepwarm.dialects.gemini_json import ProtoEnum, camel
from keepwarm.dialects.openai_request import NO_PARAMETERS

TYPES = ("TYPE_UNSPECIFIED", "STRING", "NUMBER", "INTEGER", "BOOLEAN", "ARRAY", "OBJECT", "NULL")  # by number
FUNCTION_NAME = re.compile(r"[a-zA-Z_][a-zA-Z0-9_.:-]{0,63}", re.ASCII)
COUNTS = ("minItems", "maxItems", "minLength", "maxLength", "minProperties", "maxProperties")
OPEN_API = {*COUNTS, "anyOf", "propertyOrdering", "additionalProperties", "nullable", "example"}
REFERENCES = {"ref": "$ref", "defs": "$defs"}

_COUNT = re.compile(r"[0-9]{1,18}", re.ASCII)


class CallingMode(ProtoEnum):
    """Whether functions may (AUTO), must (ANY) or must not (NONE) be called; VALIDATED is AUTO with checked arguments."""

    MODE_UNSPECIFIED = "MODE_UNSPECIFIED"
    AUTO = "AUTO"
    ANY = "ANY"
    NONE = "NONE"
    VALIDATED = "VALIDATED"


class GeminiFunction(Struct, rename="camel"):
    """A function the model may call: its parameters as a Gemini schema, or in `parameters_json_schema` as JSON Schema."""

    name: str | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = None
    parameters_json_schema: dict[str, Any] | None = None


class GeminiTool(Struct, rename="camel"):
    """Functions of the client's. The other members are tools of Google's, which are refused by name."""

    function_declarations: tuple[GeminiFunction, ...] | None = None
    code_execution: Any = None
    computer_use: Any = None
    enterprise_web_search: Any = None
    file_search: Any = None
    google_maps: Any = None
    google_search: Any = None
    google_search_retrieval: Any = None
    mcp_servers: Any = None
    retrieval: Any = None
    url_context: Any = None


class FunctionCallingConfig(Struct, rename="camel"):
    """`allowed_function_names`, with ANY and VALIDATED: no other function may be called."""

    mode: CallingMode | None = None
    allowed_function_names: tuple[str, ...] | None = None


class GeminiToolConfig(Struct, rename="camel"):
    """How functions are to be called."""

    function_calling_config: FunctionCallingConfig | None = None


def json_schema(schema: dict[str, Any], path: str, bounds: WireBounds) -> str:
    """A Gemini schema as JSON Schema text. Raises ApiError(INVALID_REQUEST)."""
    json_text(schema, path, bounds)  # within the bounds, so that what follows may recurse
    return msgspec.json.encode(_converted(schema, path)).decode()


def neutral_tools(
    tools: Sequence[GeminiTool], config: GeminiToolConfig | None, bounds: WireBounds
) -> tuple[tuple[Tool, ...], ToolChoice]:
    """The functions and how they are to be called. Raises ApiError(INVALID_REQUEST).

    Where more than one but not all functions are allowed, the others are left out of the prompt: nothing else keeps the
    model from calling them.
    """
    found: dict[str, Tool] = {}
    for i, tool in enumerate(tools):
        _refuse_googles(tool, f"tools[{i}]")
        for j, function in enumerate(tool.function_declarations or ()):
            path = f"tools[{i}].functionDeclarations[{j}]"
            if function.name is None:
                raise invalid(f"{path}.name", "is required")
            require_new_name(function.name, found, f"{path}.name", FUNCTION_NAME)
            found[function.name] = Tool(function.name, function.description or "", _parameters(function, path, bounds))
    require_at_most(found, bounds.tools_max, "tools", "functions")
    return _chosen(tuple(found.values()), config.function_calling_config if config is not None else None)


def _chosen(tools: tuple[Tool, ...], config: FunctionCallingConfig | None) -> tuple[tuple[Tool, ...], ToolChoice]:
    path = "toolConfig.functionCallingConfig"
    config = config or FunctionCallingConfig()
    mode, names = config.mode or CallingMode.AUTO, config.allowed_function_names or ()
    if names and mode not in (CallingMode.ANY, CallingMode.VALIDATED):
        raise invalid(f"{path}.allowedFunctionNames", "should be set only when the mode is ANY or VALIDATED")
    for i, name in enumerate(names):
        if all(tool.name != name for tool in tools):
            raise invalid(f"{path}.allowedFunctionNames[{i}]", f"{quoted(name)} is not a function in tools")
    allowed = tuple(tool for tool in tools if not names or tool.name in names)
    if mode is CallingMode.NONE:
        return tools, ToolChoice(ToolMode.NONE)
    if mode is not CallingMode.ANY:
        return allowed, ToolChoice()
    if not allowed:
        raise invalid(f"{path}.mode", "'ANY' needs at least one function in tools")
    if names and len(allowed) == 1:
        return tools, ToolChoice(ToolMode.NAMED, allowed[0].name)
    return allowed, ToolChoice(ToolMode.REQUIRED)


def _refuse_googles(tool: GeminiTool, path: str) -> None:
    for name in tool.__struct_fields__:
        if name != "function_declarations" and getattr(tool, name) is not None:
            raise invalid(f"{path}.{camel(name)}", "is a tool of Google's, this server has none; declare functions")


def _parameters(function: GeminiFunction, path: str, bounds: WireBounds) -> str:
    if function.parameters_json_schema is not None:
        if function.parameters is not None:
            raise invalid(f"{path}.parametersJsonSchema", "and parameters exclude each other")
        return json_text(function.parameters_json_schema, f"{path}.parametersJsonSchema", bounds)
    if not function.parameters:
        return NO_PARAMETERS
    return json_schema(function.parameters, f"{path}.parameters", bounds)


def _converted(schema: dict[str, Any], path: str) -> dict[str, Any]:
    members = {_member(key): value for key, value in schema.items()}
    nullable, order = members.pop("nullable", None), members.pop("propertyOrdering", None)
    converted: dict[str, Any] = {}
    for key, value in members.items():
        if key == "type":
            converted |= _type(value, f"{path}.type")
        elif key == "example":
            converted["examples"] = [value]
        elif key in (*COUNTS, "minimum", "maximum"):
            converted[key] = _number(value)
        elif key in ("properties", "$defs") and isinstance(value, dict):
            converted[key] = {name: _inner(one, f"{path}.{key}.{name}") for name, one in _ordered(value, order).items()}
        elif key in ("anyOf", "oneOf", "allOf") and isinstance(value, list):
            converted[key] = [_inner(one, f"{path}.{key}[{i}]") for i, one in enumerate(value)]
        elif key in ("items", "additionalProperties"):
            converted[key] = _inner(value, f"{path}.{key}")
        else:
            converted[key] = value
    return _nullable(converted) if nullable is True else converted


def _member(key: str) -> str:
    name = camel(key)
    return name if name in OPEN_API else REFERENCES.get(key, key)


def _inner(value: object, path: str) -> object:
    return _converted(value, path) if isinstance(value, dict) else value


def _type(value: object, path: str) -> dict[str, object]:
    """The member "type", or none where it is left open."""
    if isinstance(value, list):
        return {"type": [name for one in value for name in _type(one, path).values()]}
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(TYPES):
        name = TYPES[value]
    elif isinstance(value, str) and value.upper() in TYPES:
        name = value.upper()
    else:
        shown = quoted(value) if isinstance(value, str) else f"a {type(value).__name__}"
        raise invalid(path, f"{shown} is not one of {', '.join(TYPES)}")
    return {} if name == TYPES[0] else {"type": name.lower()}


def _number(value: object) -> object:
    return int(value) if isinstance(value, str) and _COUNT.fullmatch(value) else value


def _ordered(properties: dict[str, Any], order: object) -> dict[str, Any]:
    if not isinstance(order, list):
        return properties
    first = {name: properties[name] for name in order if isinstance(name, str) and name in properties}
    return first | properties


def _nullable(schema: dict[str, Any]) -> dict[str, Any]:
    kind = schema.get("type")
    if isinstance(kind, str):
        if isinstance(schema.get("enum"), list):
            schema["enum"] = [*schema["enum"], None]
        return schema | {"type": [kind, "null"]}
    if isinstance(schema.get("anyOf"), list):
        return schema | {"anyOf": [*schema["anyOf"], {"type": "null"}]}
    return schema
