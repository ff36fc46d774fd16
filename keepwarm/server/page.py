"""/docs: the OpenAPI document as one plain page, made once at start. No script, no external asset."""

import msgspec
from jinja2 import Environment, StrictUndefined

PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ info.title }} {{ info.version }} API</title>
<style>
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
code, pre { font: 14px/1.4 ui-monospace, monospace; }
pre { overflow-x: auto; padding: .5rem; border: 1px solid #8886; }
h3 code { font-size: 1rem; }
td, th { text-align: left; vertical-align: top; padding: .1rem 1rem .1rem 0; }
</style>
</head>
<body>
<h1>{{ info.title }} {{ info.version }}</h1>
<p>{{ info.description }}</p>
<p>The same as a document for programs: <a href="/openapi.json">/openapi.json</a>.
Calls with a key take it as <code>Authorization: Bearer KEY</code>.</p>
<h2>Calls</h2>
{% for path, operations in paths.items() %}{% for method, operation in operations.items() %}
<h3 id="{{ operation.operationId }}"><code>{{ method | upper }} {{ path }}</code></h3>
<p>{{ operation.summary }}.{% if not operation.security %} Needs no key.{% endif %}</p>
{% if operation.parameters %}<table>
{% for parameter in operation.parameters %}<tr><td><code>{{ parameter.name }}</code></td><td>{{ parameter.in }}</td>\
<td>{{ parameter.description | default("") }}</td></tr>
{% endfor %}</table>{% endif %}
<ul>
{% if operation.requestBody is defined %}<li>body: {{ types(operation.requestBody.content) }}</li>{% endif %}
{% for status, response in operation.responses.items() if response.content %}\
<li>{{ "error" if status == "default" else status }}: {{ types(response.content) }}</li>
{% endfor %}</ul>
{% endfor %}{% endfor %}
<h2>Types</h2>
{% for name, schema in components.schemas.items() %}
<h3 id="type-{{ name }}"><code>{{ name }}</code></h3>
{% if schema.description is defined %}<p>{{ schema.description }}</p>{% endif %}
<pre>{{ text(schema) }}</pre>
{% endfor %}
</body>
</html>
"""

REFERENCE = "#/components/schemas/"


def render_page(document: bytes) -> bytes:
    """The page for an OpenAPI document (JSON)."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.globals |= {"types": _types, "text": _text}
    return environment.from_string(PAGE).render(msgspec.json.decode(document)).encode()


def _types(content: dict[str, dict[str, dict[str, str]]]) -> str:
    """For example: ChatCompletion (application/json), ChatCompletionChunk (text/event-stream)."""
    return ", ".join(
        f"{body['schema'].get('$ref', 'object').removeprefix(REFERENCE)} ({media})" for media, body in content.items()
    )


def _text(schema: dict[str, object]) -> str:
    shown = {key: value for key, value in schema.items() if key not in ("description", "title")}
    return msgspec.json.format(msgspec.json.encode(shown), indent=2).decode()
