"""Tile tables: sizes of tiles, warps and pipeline stages, by op, device and shape.

A table is a committed file, `kernels/configs/<op>/<device>.json`, where the device is `sm_90`, a default for a compute
capability and those between it and the next file's, or the name of one, `nvidia-h200`:

    {"compute_capability": 90, "rules": [{"when": {"rows": 16}, "block_n": 64, ...}, {"block_n": 128, ...}]}

The first rule is taken whose bounds all hold (`when`: the call's size is at most this); the last one has none.
`_SCHEMAS` defines the sizes that an op's rules may bound and the settings that they must have. Nothing is tuned while
serving: the gate of `kernels.aot` compiles all choices of the committed tables, which are changed by hand after
measurements.
"""

import functools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable
from types import MappingProxyType
from typing import Any

from scalellm.kernels.capability import Capability

_ROOT: Traversable = files("scalellm.kernels") / "configs"
_DEFAULT = re.compile(r"sm_(\d+)\.json")


@dataclass(frozen=True, slots=True)
class _Range:
    low: int
    high: int
    power: bool = True  # of two, as sizes of tiles have to be

    def __str__(self) -> str:
        return f"{'a power of two' if self.power else 'an integer'} from {self.low} to {self.high}"

    def __contains__(self, value: object) -> bool:
        if not isinstance(value, int) or isinstance(value, bool):
            return False
        return self.low <= value <= self.high and not (self.power and value & (value - 1))


@dataclass(frozen=True, slots=True)
class _Schema:
    """The sizes that an op's rules may bound, and the settings that each must have."""

    sizes: tuple[str, ...]
    settings: Mapping[str, _Range]


_COUNT = _Range(1, 64, power=False)
_SWITCH = _Range(0, 1, power=False)
_LAUNCH = {"num_warps": _Range(1, 32), "num_stages": _Range(1, 8, power=False)}
_BLOCK = _Range(16, 256)
_PACKED = _Schema(
    ("rows", "group_size", "columns"),
    {
        "block_n": _BLOCK,
        "words": _Range(16, 64),
        "max_rows": _BLOCK,
        "max_shares": _COUNT,
        "programs_per_sm": _COUNT,
    }
    | _LAUNCH,
)
_SCHEMAS: Mapping[str, _Schema] = MappingProxyType(
    {
        "fp8_gemm": _Schema(
            ("rows", "columns"),
            {"block_m": _BLOCK, "block_n": _BLOCK, "block_k": _Range(32, 256), "swapped": _SWITCH, "own": _SWITCH}
            | _LAUNCH,
        ),
        # `matrices`: that are multiplied side by side, two with a gate. All numbers of rows have one rule, so that sums
        # have one order.
        "fused_linear": _Schema(
            ("matrices",), {"max_rows": _Range(1, 16, power=False), "block_k": _Range(16, 512)} | _LAUNCH
        ),
        "fused_moe": _Schema(
            ("rows_per_expert", "element_size"),
            {"block_m": _Range(16, 128), "block_n": _BLOCK, "block_k": _BLOCK} | _LAUNCH,
        ),
        "fused_moe_wna16": _Schema(
            ("rows_per_expert", "bits", "group_size"),
            {"block_m": _Range(16, 128), "block_n": _BLOCK, "words": _Range(16, 64)} | _LAUNCH,
        ),
        # Splits come before the call that uses them, so they have a table of their own.
        "num_decode_splits": _Schema(
            (),
            {
                "most": _Range(1, 64),
                "programs_per_sm": _COUNT,
                "programs_per_seq": _COUNT,
                "least_keys": _Range(16, 4096),
            },
        ),
        "paged_attention_decode": _Schema(("element_size", "head_dim"), {"block_n": _BLOCK} | _LAUNCH),
        "unified_attention": _Schema(
            ("element_size", "head_dim", "rows"), {"block_m": _BLOCK, "block_n": _BLOCK} | _LAUNCH
        ),
        "w4a16_gemm": _PACKED,
        "w8a16_gemm": _PACKED,
    }
)
TILED_OPS = tuple(_SCHEMAS)

Tile = Mapping[str, int]


@dataclass(frozen=True, slots=True)
class TileTable:
    """The rules of one file, each with its bounds and its settings."""

    compute_capability: int
    rules: tuple[tuple[tuple[tuple[str, int], ...], Tile], ...]

    def choose(self, **sizes: int) -> Tile:
        """Return the settings for a call of these sizes."""
        for bounds, tile in self.rules:
            for name, bound in bounds:
                if sizes[name] > bound:
                    break
            else:
                return tile
        raise AssertionError("the last rule has no bounds")


@functools.cache
def tile_table(op: str, capability: Capability) -> TileTable:
    """Return the table of an op for a device: its own, or that of the highest compute capability not above its own.

    Raises:
        ValueError: there is no table, or it is invalid; the message names file and key.
    """
    return read_table(_ROOT, op, capability)


def read_table(root: Traversable, op: str, capability: Capability) -> TileTable:
    """As `tile_table`, from the tables under `root`."""
    own = root / op / f"{device_slug(capability.name)}.json"
    if own.is_file():
        return _parse(own, op, capability.sm)
    defaults = default_tables(op, root)
    if not defaults:
        raise ValueError(f"kernels/configs/{op}: there is no table for {capability.name!r} and no default, sm_*.json")
    sm = max((sm for sm in defaults if sm <= capability.sm), default=defaults[0])
    return _parse(root / op / f"sm_{sm}.json", op, sm)


def default_tables(op: str, root: Traversable = _ROOT) -> list[int]:
    """Return the compute capabilities, times ten, that an op has default tables for; none for an op without tiles."""
    if op not in TILED_OPS:
        return []
    names = (entry.name for entry in (root / op).iterdir())
    return sorted(int(found[1]) for name in names if (found := _DEFAULT.fullmatch(name)))


def tuned_devices(sm: int, root: Traversable = _ROOT) -> list[str]:
    """Return the file names of the devices of a compute capability that have a table of their own for some op."""
    found = set()
    for op in TILED_OPS:
        for entry in (root / op).iterdir():
            if _DEFAULT.fullmatch(entry.name) is None and json.loads(entry.read_text())["compute_capability"] == sm:
                found.add(entry.name.removesuffix(".json"))
    return sorted(found)


def device_slug(name: str) -> str:
    """Return the file name of a device: "nvidia-h200" for "NVIDIA H200"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _parse(file: Traversable, op: str, sm: int) -> TileTable:
    where = f"kernels/configs/{op}/{file.name}"
    schema = _SCHEMAS[op]
    try:
        content = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{where}: is not JSON: {error}") from None
    _check_keys(where, content, {"compute_capability", "rules"})
    if content["compute_capability"] != sm:
        raise ValueError(f"{where}: compute_capability: {content['compute_capability']!r}, the device has {sm}")
    rules = content["rules"]
    if not isinstance(rules, list) or not rules:
        raise ValueError(f"{where}: rules: not a list of rules")
    parsed = []
    for i, rule in enumerate(rules):
        at = f"{where}: rules[{i}]"
        last = i == len(rules) - 1
        _check_keys(at, rule, set(schema.settings) | (set() if last else {"when"}))
        bounds = {} if last else rule["when"]
        if not isinstance(bounds, dict) or not (last or bounds):
            raise ValueError(f"{at}.when: not an object with a bound")
        for name, bound in bounds.items():
            if name not in schema.sizes:
                raise ValueError(f"{at}.when.{name}: rules of {op} may bound {', '.join(schema.sizes) or 'nothing'}")
            if not isinstance(bound, int):
                raise ValueError(f"{at}.when.{name}: {bound!r} is not an integer")
        for name, allowed in schema.settings.items():
            if rule[name] not in allowed:
                raise ValueError(f"{at}.{name}: {rule[name]!r} is not {allowed}")
        parsed.append((tuple(bounds.items()), MappingProxyType({name: rule[name] for name in schema.settings})))
    return TileTable(sm, tuple(parsed))


def _check_keys(where: str, content: Any, expected: set[str]) -> None:
    if not isinstance(content, dict):
        raise ValueError(f"{where}: not an object")
    for name in sorted(content.keys() - expected):
        raise ValueError(f"{where}.{name}: there is no such key; keys are {', '.join(sorted(expected))}")
    for name in sorted(expected - content.keys()):
        raise ValueError(f"{where}.{name}: is missing")
