"""JSON documents that lie: values of a wrong type or size, keys missing, too many or twice, files cut off or nested."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

_EXTREMES: tuple[Any, ...] = (
    *(0, 1, -1, 2, 3, 7, 255, 999, 2**15, 2**31 - 1, 2**31, 2**32, 2**40, 2**63 - 1, 2**64, -(2**63), 10**30),
    *(0.0, -0.0, 0.5, -1.5, 1e-45, 1e308, -1e308, float("nan"), float("inf"), float("-inf")),
    *(None, True, False, "", "x", "7", "null", "\x00", "\ud83d\ude00", "\ud800", "../../etc/passwd", "a" * 70_000),
    *([], [None], [[]], [-1], [2**64], {}, {"": {}}, {"rope_type": "linear"}, {"type": 1}, ["full_attention"] * 9),
)


def mutate_json(document: Any, rng: random.Random) -> tuple[bytes, str]:
    """Return a document with one to three lies in it as bytes, and what was done, in words."""
    document = copy.deepcopy(document)
    done: list[str] = []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places = list(_places(document))
        if not places:
            break
        holder, key, path = rng.choice(places)
        # Keys near the top say most: half of the lies are there.
        if rng.random() < 0.5:
            holder, key, path = rng.choice([place for place in places if place[2].count("/") == 1])
        done.append(_lie(holder, key, path, rng))
    data = json.dumps(document).encode()
    if rng.random() < 0.1:
        data, how = _damage(data, rng)
        done.append(how)
    return data, "; ".join(done)


def _places(value: Any, path: str = "") -> Iterator[tuple[Any, Any, str]]:
    """Yield every (container, key, path); of a long list or object, such as a vocabulary, a few."""
    keys = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    if len(keys) > 40:
        keys = [*keys[:5], *keys[len(keys) // 2 : len(keys) // 2 + 3], *keys[-5:]]
    for key in keys:
        yield value, key, f"{path}/{key}"
        yield from _places(value[key], f"{path}/{key}")


def _lie(holder: Any, key: Any, path: str, rng: random.Random) -> str:
    match rng.randrange(8):
        case 0:
            del holder[key]
            return f"{path} is missing"
        case 1 if isinstance(holder, dict):
            name = rng.choice(("", "unknown_key", "scale", "x" * 300, "rope_theta", "eos_token_id", "layer_types"))
            holder[name] = copy.deepcopy(rng.choice(_EXTREMES))
            return f"{path} has a neighbour {name[:20]!r}: {_shown(holder[name])}"
        case 1 | 2 if isinstance(holder, list):
            holder[:] = holder * rng.choice((0, 2, 100))
            return f"the list around {path} has {len(holder)} entries"
        case 3 if isinstance(holder[key], int | float) and not isinstance(holder[key], bool):
            factor = rng.choice((-1, 0.5, 2, 3, 1000, 2**20))
            holder[key] = type(holder[key])(holder[key] * factor)
        case 4:
            holder[key] = [holder[key]] if rng.random() < 0.5 else {"content": holder[key]}
        case 5 if isinstance(holder, dict):
            holder[key] = copy.deepcopy(holder[rng.choice(list(holder))])
        case _:
            holder[key] = copy.deepcopy(rng.choice(_EXTREMES))
    return f"{path} is {_shown(holder[key])}"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else f"{text[:60]}..."


def _damage(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    match rng.randrange(5):
        case 0:
            length = rng.randrange(len(data))
            return data[:length], f"cut off after {length} bytes"
        case 1:
            depth = rng.choice((100, 2_000, 100_000))
            return data[:-1] + b', "deep": ' + b"[" * depth + b"]" * depth + b"}", f"{depth} lists in each other"
        case 2:
            return b'{"a":' * 50_000 + b"1" + b"}" * 50_000, "50,000 objects in each other"
        case 3:
            place = rng.randrange(len(data))
            return data[:place] + bytes([rng.randrange(256)]) + data[place + 1 :], f"byte {place} changed"
        case _:
            return data[:-1] + b', "n": ' + b"9" * 10_000 + b"}", "a number of 10,000 digits"
