"""The OpenAPI 3.1 document, made from the very types that bodies are parsed into and answers rendered from.

A `Route` is what the server serves and what the document shows: one list of routes feeds both, so they cannot differ.
"""

import re
from collections.abc import Sequence
from typing import Any, Literal

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from keepwarm.core.principal import Access

OPENAPI_VERSION = "3.1.0"
JSON = "application/json"
EVENT_STREAM = "text/event-stream"
BEARER = "bearer"

_PATH_PARAM = re.compile(r"\{(?P<name>[a-z_]+)\}")


class Param(Struct, frozen=True):
    """A query parameter or a header. `shape` is its type; `deep` writes an object as name[key]=value."""

    name: str
    description: str
    shape: Any = str
    where: Literal["query", "header"] = "query"
    deep: bool = False


class Route(Struct, frozen=True):
    """One method on one path, "/v1/caching/{cache_id}". `request` and `response` are wire types, None for no body.

    `access` says which keys may, and has no default: who adds a route decides it. A request with the query parameter
    `bearer_param` needs no key, since its value is a secret that only who had one was given. `events` is the type of one
    server-sent event, where the route can stream. `errors` is the type of error bodies.
    """

    method: Literal["GET", "POST", "PUT", "PATCH", "DELETE"]
    path: str
    access: Access
    summary: str
    request: Any = None
    response: Any = None
    events: Any = None
    errors: Any = None
    params: tuple[Param, ...] = ()
    tags: tuple[str, ...] = ()
    bearer_param: str | None = None

    def tagged(self, tag: str, errors: type[Struct]) -> "Route":
        """The same in the document's section `tag`, with error bodies of the type `errors`."""
        return replace(self, tags=(tag,), errors=errors)

    @property
    def path_params(self) -> tuple[str, ...]:
        """Names in braces, in the order of the path."""
        return tuple(_PATH_PARAM.findall(self.path))


def openapi(routes: Sequence[Route], *, title: str, version: str, description: str = "") -> bytes:
    """The document as JSON. Deterministic: the same routes give the same bytes."""
    shapes = list(dict.fromkeys(_shapes(routes)))
    schemas, components = msgspec.json.schema_components(shapes, ref_template="#/components/schemas/{name}")
    by_shape = dict(zip(shapes, schemas, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route, by_shape)
    document = {
        "openapi": OPENAPI_VERSION,
        "info": {"title": title, "version": version, "description": description},
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {BEARER: {"type": "http", "scheme": "bearer"}},
        },
    }
    return msgspec.json.encode(document)


def _shapes(routes: Sequence[Route]) -> list[Any]:
    shapes: list[Any] = []
    for route in routes:
        bodies = (route.request, route.response, route.events, route.errors)
        shapes.extend(shape for shape in bodies if shape is not None)
        shapes.extend(param.shape for param in route.params)
    return shapes


def _operation(route: Route, by_shape: dict[Any, dict[str, Any]]) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "operationId": _operation_id(route),
        "summary": route.summary,
        "tags": list(route.tags),
        "parameters": _parameters(route, by_shape),
        "responses": _responses(route, by_shape),
        "security": [] if route.access is Access.PUBLIC else [{BEARER: []}],
        "x-access": route.access.value,
    }
    if route.request is not None:
        operation["requestBody"] = {"required": True, "content": {JSON: {"schema": by_shape[route.request]}}}
    return operation


def _operation_id(route: Route) -> str:
    return "_".join([route.method.lower(), *re.findall(r"[A-Za-z0-9]+", route.path)])


def _parameters(route: Route, by_shape: dict[Any, dict[str, Any]]) -> list[dict[str, Any]]:
    parameters: list[dict[str, Any]] = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in route.path_params
    ]
    for param in route.params:
        parameter: dict[str, Any] = {
            "name": param.name,
            "in": param.where,
            "description": param.description,
            "schema": by_shape[param.shape],
        }
        if param.deep:
            parameter |= {"style": "deepObject", "explode": True}
        parameters.append(parameter)
    return parameters


def _responses(route: Route, by_shape: dict[Any, dict[str, Any]]) -> dict[str, Any]:
    content = {}
    if route.response is not None:
        content[JSON] = {"schema": by_shape[route.response]}
    if route.events is not None:
        content[EVENT_STREAM] = {"schema": by_shape[route.events]}
    responses: dict[str, Any] = {"200": {"description": "OK", "content": content}}
    if route.errors is not None:
        responses["default"] = {"description": "Error", "content": {JSON: {"schema": by_shape[route.errors]}}}
    return responses
