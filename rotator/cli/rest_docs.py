"""The REST reference, from the OpenAPI description that the service itself gives."""

from collections.abc import Iterator, Mapping
from typing import Any

_HEAD = """# REST

Made from the service's OpenAPI description by `rotator schema --rest`; do not edit it by hand (`make docs` writes it).
A running service has the same with examples at `/docs`, and as JSON at `/openapi.json`.

These are the operators' routes. Clients' routes (`/v1/…`) are those of OpenAI and Anthropic, as vLLM has them. Keys go
into `Authorization: Bearer`; a 403 says which scope is lacking: infer, operate or admin. Every error is a problem
(RFC 9457, `application/problem+json`): `title`, `status`, and `detail`, which says what to do. Times are Unix seconds
(`…_wall_s`) or seconds (`…_s`), sizes bytes."""


def description() -> dict[str, Any]:
    """The OpenAPI description of every route, without a service behind it."""
    from rotator.service.api import create_api

    nothing: Any = object()  # routes are described, none is called
    app = create_api(nothing, nothing, authorize=nothing, logs=nothing, engine_metrics=nothing)
    return app.openapi()


def markdown() -> str:
    """One section a tag, one entry a route, one table for each thing that routes take and give."""
    spec = description()
    schemas = spec["components"]["schemas"]
    lines = [_HEAD, "", "## Routes"]
    for tag in spec["tags"]:
        routes = [r for r in _routes(spec) if tag["name"] in r[2].get("tags", ())]
        if routes:
            lines += ["", f"### {tag['name'].capitalize()}", "", tag["description"]]
        for method, path, route in routes:
            lines += ["", *_route(method, path, route)]
    lines += ["", "## Shapes"]
    for name in sorted(schemas):
        lines += ["", *_shape(name, schemas[name])]
    return "\n".join(lines) + "\n"


def _routes(spec: Mapping[str, Any]) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    for path, methods in spec["paths"].items():
        for method, route in methods.items():
            yield method.upper(), path, route


def _route(method: str, path: str, route: Mapping[str, Any]) -> list[str]:
    lines = [f"#### `{method} {path}`", "", _line(route.get("summary", "")) + "."]
    if route.get("description"):
        lines += ["", _line(route["description"])]
    if parameters := route.get("parameters"):
        lines += ["", "| parameter | in | type | default | meaning |", "|---|---|---|---|---|"]
        lines += [_parameter(p) for p in parameters]
    if body := _content(route.get("requestBody") or {}):
        lines += ["", f"Takes {body}."]
    good = next(((code, _content(a)) for code, a in route["responses"].items() if code.startswith("2")), ("", ""))
    errors = ", ".join(code for code in sorted(route["responses"]) if not code.startswith("2"))
    said = f"Gives {good[1] or good[0]}" + (f"; errors {errors}" if errors else "")
    return [*lines, "", said + "."]


def _parameter(p: Mapping[str, Any]) -> str:
    default = "**required**" if p.get("required") else _value(p["schema"].get("default"))
    meaning = _cell(p.get("description") or p["schema"].get("description", ""))
    return f"| `{p['name']}` | {p['in']} | {_type(p['schema'])} | {default} | {meaning} |"


def _content(part: Mapping[str, Any]) -> str:
    for media, content in (part.get("content") or {}).items():
        shape = _type(content.get("schema") or {})
        return f"{shape}" if media == "application/json" else f"`{media}`"
    return ""


def _shape(name: str, schema: Mapping[str, Any]) -> list[str]:
    lines = [f"### {name}", ""]
    if schema.get("description"):
        lines += [_line(schema["description"]), ""]
    if "enum" in schema:
        return [*lines, ", ".join(f"`{v}`" for v in schema["enum"])]
    required = schema.get("required", ())
    lines += ["| field | type | default | meaning |", "|---|---|---|---|"]
    for field, value in schema.get("properties", {}).items():
        default = "" if field in required else _value(value.get("default"))
        lines.append(f"| `{field}` | {_type(value)} | {default} | {_cell(value.get('description', ''))} |")
    return lines


def _type(schema: Mapping[str, Any]) -> str:
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(_type(part) for part in schema["anyOf"]))
    if "enum" in schema:
        return ", ".join(f"`{v}`" for v in schema["enum"])
    if "const" in schema:
        return f"`{schema['const']}`"
    if schema.get("type") == "array":
        return f"list of {_type(schema.get('items', {}))}"
    values = schema.get("additionalProperties")
    if schema.get("type") == "object" and isinstance(values, Mapping) and values:
        return f"mapping to {_type(values)}"
    return str(schema.get("type", "any"))


def _value(value: Any) -> str:
    return "" if value is None or value in ([], {}, "") else f"`{value}`"


def _cell(text: str) -> str:
    return _line(text).replace("|", "\\|")


def _line(text: str) -> str:
    return " ".join(text.split())
