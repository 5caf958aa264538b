"""JSON Schema of recipes and site files, and the same as a reference for people. Made from the types."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel

from rotator.jobs.recipe import Recipe
from rotator.jobs.site import Site

_MODELS: Mapping[str, type[BaseModel]] = {"recipe": Recipe, "site": Site}


def json_schema(what: str) -> str:
    """The schema of ``recipe`` or ``site`` as JSON text."""
    schema = _MODELS[what].model_json_schema()
    return json.dumps({"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}, indent=2) + "\n"


def markdown() -> str:
    """Tables of every key of both files, one a section."""
    parts = ["# Keys of site files and recipes", "", "Made by `rotator jobs schema --markdown` from the types.", ""]
    for what in ("site", "recipe"):
        schema = _MODELS[what].model_json_schema()
        defs: Mapping[str, Any] = schema.get("$defs", {})
        parts += _section(schema, f"The {what} file", "##")
        for name, inner in defs.items():
            if "properties" in inner:
                parts += _section(inner, name, "###")
    return "\n".join(parts).rstrip() + "\n"


def _section(schema: Mapping[str, Any], title: str, mark: str) -> Iterator[str]:
    yield f"{mark} {title}\n"
    if about := schema.get("description"):
        yield f"{' '.join(about.split())}\n"
    yield "| key | type | default | what it is |\n|---|---|---|---|"
    required = schema.get("required", ())
    for key, field in schema.get("properties", {}).items():
        default = "required" if key in required else f"`{json.dumps(field.get('default'), ensure_ascii=False)}`"
        about = " ".join(str(field.get("description", "")).split()).replace("|", "\\|")
        yield f"| `{key}` | {_type(field).replace('|', chr(92) + '|')} | {default} | {about} |"
    yield ""


def _type(field: Mapping[str, Any]) -> str:
    if "$ref" in field:
        return str(field["$ref"]).rsplit("/", 1)[-1]
    if "enum" in field:
        return " | ".join(f"`{v}`" for v in field["enum"])
    if "const" in field:
        return f"`{field['const']}`"
    if "anyOf" in field:
        return " | ".join(dict.fromkeys(_type(one) for one in field["anyOf"] if one.get("type") != "null"))
    match field.get("type"):
        case "array":
            return f"list of {_type(field.get('items', {}))}"
        case "object":
            inner = field.get("additionalProperties")
            patterns = field.get("patternProperties")
            if patterns:
                inner = next(iter(patterns.values()))
            return f"mapping to {_type(inner)}" if isinstance(inner, Mapping) else "mapping"
        case str() as plain:
            return plain
    return "any"
