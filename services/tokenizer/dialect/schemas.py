"""Analysis of the schemas of arguments that are written one by one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from scalellm.services.common.errors import StatusError


def properties_of(schema: Any, field: str = "") -> tuple[Mapping[str, Any], Sequence[str]]:
    """Return the properties of an object's schema, and which are required. Raises StatusError for another schema."""
    if not isinstance(schema, dict) or schema.get("type", "object") != "object":
        raise StatusError.invalid(field, "must be the schema of an object")
    if unknown := sorted(schema.keys() & {"anyOf", "allOf", "oneOf", "$ref", "patternProperties", "minProperties"}):
        raise StatusError.invalid(
            field, f"has the keyword {unknown[0]!r} at #, which is not supported in this model's format of calls"
        )
    properties = schema.get("properties", {})
    return (properties if isinstance(properties, dict) else {}), schema.get("required") or ()


def is_text(schema: Any) -> bool:
    """Return whether a schema is one of strings, and of nothing else."""
    if not isinstance(schema, dict):
        return False
    if "type" in schema:
        return bool(schema["type"] == "string")
    choices = [schema["const"]] if "const" in schema else schema.get("enum")
    return isinstance(choices, list) and bool(choices) and all(isinstance(choice, str) for choice in choices)


def definitions_of(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return the schemas that references in a schema may mean."""
    return {name: schema[name] for name in ("$defs", "definitions") if name in schema}
