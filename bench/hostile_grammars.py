"""Grammars and schemas that are to cost as much as can be: deep, wide, recursive, with huge enums and counts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from scalellm.services.tokenizer.structure.json_schema import checked_schema


def json_grammar(schema: Any) -> str:
    """Return the grammar that the edge makes of a schema, an object or its JSON text."""
    text = schema if isinstance(schema, str) else json.dumps(schema)
    return f"start: %json {checked_schema(text, 'schema')}"


def _wide(count: int) -> dict[str, Any]:
    return {f"p{number}": {"type": ["string", "null"]} for number in range(count)}


HOSTILE: Mapping[str, str] = MappingProxyType(
    {
        "many states": r"start: /(.|\n)*a.{30}b.{30}c.{30}/",
        "complements": "start: A\n"
        "A: /(?s:.*)/ & ~/(?s:.*)abc(?s:.*)/ & ~/(?s:.*)x.{15}y(?s:.*)/ & /(?s:.*)q.{15}(?s:.*)/",
        "intersections": "start: A\nA: " + " & ".join(f"/(?s:.*)[{char}](?s:.*)/" for char in "abcdefghijklmnopqrst"),
        "many rules": f"start: {' | '.join(f'r{number}' for number in range(3000))}\n"
        + "\n".join(f'r{number}: /[a-z]+/ "x{number}"' for number in range(3000)),
        "many expressions": "start: " + " | ".join(f"/.*{chr(97 + number % 26)}{number}.*/" for number in range(400)),
        "ambiguous": 'start: start start start | /a+/ | /a*b?/ | ""',
        "nested counts": "start: /((((a{1,10}){1,10}){1,10}){1,10}){1,10}/",
        "counts in JSON": json_grammar({"type": "string", "pattern": "^(([a-z]{1,100}){1,100}){1,100}$"}),
        "recursive": 'start: "(" start | start ")" | start start | "x"',
        "64 KiB": f"start: /{'(a|b)' * 13_000}/",
        "alternatives of alternatives": json_grammar(
            {
                "allOf": [
                    {"anyOf": [{"type": "string", "minLength": outer * 8 + inner} for inner in range(4)]}
                    for outer in range(8)
                ]
            }
        ),
        "deep": json_grammar('{"items": ' * 60 + "{}" + "}" * 60),
        "large enum": json_grammar({"enum": [f"v{number:06d}" for number in range(5000)]}),
        "long": json_grammar({"type": "string", "minLength": 50_000}),
        "wide": json_grammar({"properties": _wide(1000)}),
        "many patterns": json_grammar(
            {"properties": {f"p{n}": {"type": "string", "pattern": f"^(a|b{n}|c+d)*x{n}$"} for n in range(600)}}
        ),
    }
)
"""By name."""
