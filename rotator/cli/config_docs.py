"""The fleet file's reference, from its types: JSON Schema for editors, Markdown for people."""

import json
from collections.abc import Iterator
from typing import Any

from rotator.config import FleetConfig

_ID = "fleet.schema.json"


def json_schema() -> str:
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": _ID, **FleetConfig.model_json_schema()}
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


def markdown() -> str:
    """One table a section. Sections follow the order in which the file's top names them."""
    schema = FleetConfig.model_json_schema()
    lines = [
        "# Configuration",
        "",
        "One YAML file, `fleet.yaml`. Made from the types by `rotator schema --markdown`; do not edit it by hand.",
        "`rotator check -c fleet.yaml` explains each mistake in one line; `rotator schema` prints the JSON Schema",
        "(`docs/fleet.schema.json`) for editors: begin the file with",
        "`# yaml-language-server: $schema=<path to fleet.schema.json>`. Unknown keys are errors.",
        "",
        "Relative paths are relative to the file. SIGHUP or `POST /config/reload` applies a change; engines that it",
        "does not concern are not touched.",
        "",
        *_section("The file", schema, schema),
    ]
    for name, title in _reachable(schema):
        lines += ["", *_section(title, schema["$defs"][name], schema)]
    return "\n".join(lines) + "\n"


def _reachable(schema: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Sections in the order of first mention, each with the place that uses it."""
    seen: dict[str, str] = {}

    def visit(node: dict[str, Any], place: str) -> None:
        for field, value in node.get("properties", {}).items():
            for name, many in _references(value):
                inner = f"{place}{field}{'[]' if many else ''}"
                if name not in seen:
                    seen[name] = inner
                    visit(schema["$defs"][name], f"{inner}.")

    visit(schema, "")
    yield from seen.items()


def _references(value: dict[str, Any], many: bool = False) -> Iterator[tuple[str, bool]]:
    if "$ref" in value:
        yield value["$ref"].rpartition("/")[2], many
    for part in value.get("anyOf", ()):
        yield from _references(part, many)
    if isinstance(value.get("items"), dict):
        yield from _references(value["items"], True)


def _section(title: str, node: dict[str, Any], schema: dict[str, Any]) -> list[str]:
    lines = [f"## {title if title == 'The file' else f'`{title}`'}", ""]
    if node.get("description"):
        lines += [" ".join(node["description"].split()), ""]
    lines += ["| key | type | default | meaning |", "|---|---|---|---|"]
    required = node.get("required", ())
    for field, value in node["properties"].items():
        default = "**required**" if field in required else _default(value)
        meaning = value.get("description", "").replace("|", "\\|")
        lines.append(f"| `{field}` | {_type(value)} | {default} | {meaning} |")
    return lines


def _default(value: dict[str, Any]) -> str:
    if "default" not in value or value["default"] is None:
        return ""
    if any(True for _ in _references(value)):
        return "see below"
    return f"`{json.dumps(value['default'], ensure_ascii=False)}`"


def _type(value: dict[str, Any]) -> str:
    if "$ref" in value:
        return "section"
    if "anyOf" in value:
        return " or ".join(dict.fromkeys(_type(v) for v in value["anyOf"] if v.get("type") != "null"))
    if "const" in value:
        return f"`{value['const']}`"
    if "enum" in value:
        return ", ".join(f"`{v}`" for v in value["enum"])
    if value.get("type") == "array":
        return f"list of {_type(value.get('items', {}))}"
    bounds = [f"{sign} {value[key]}" for key, sign in _BOUNDS if key in value]
    kind = {"object": "mapping", "string": "text", "integer": "whole number", "boolean": "true or false"}
    name = kind.get(value.get("type", ""), value.get("type", "any"))
    return f"{name} ({', '.join(bounds)})" if bounds else str(name)


_BOUNDS = (("minimum", "≥"), ("exclusiveMinimum", ">"), ("maximum", "≤"), ("exclusiveMaximum", "<"))
