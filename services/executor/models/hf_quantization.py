"""The quantization_config of a config.json, as it concerns the linear layers' tensors."""

import fnmatch
import logging
import re
from collections.abc import Iterable, Mapping
from typing import Any, cast, get_args

from scalellm.services.common.model_files import shown
from scalellm.services.executor.model_config.errors import UnsupportedModelError
from scalellm.services.executor.models.linear.checkpoint import CheckpointFormat
from scalellm.services.executor.models.linear.ignored import IgnoredLayers
from scalellm.services.executor.models.linear.stored_fp8 import StoredFp8
from scalellm.services.executor.models.linear.stored_ints import StoredAwq, StoredGptq, StoredInt8, StoredPacked
from scalellm.services.executor.models.linear.wna16 import Bits

_log = logging.getLogger(__name__)

_MODULE = re.compile(r"[\w.]+")
_FP8_SCHEMES = ("static", "dynamic")
_COMPRESSED_FORMATS = ("float-quantized", "naive-quantized", "pack-quantized", "int-quantized")
_GPTQ_VERSIONS = {"gptq": 1, "gptq_v2": 0}
_GROUPS_BY_ACTIVATION = (True, "group", "dynamic")
"""Values of compressed-tensors' actorder with which groups are not of consecutive inputs."""


def stored_linears(config: Mapping[str, Any]) -> CheckpointFormat:
    """Return how a checkpoint with this quantization_config stores its linear layers.

    Raises UnsupportedModelError, naming the key, for a setting that would not be implemented exactly.
    """
    method = _choice(config, "quant_method", tuple(_READERS))
    return _READERS[method](config)


def _fp8(config: Mapping[str, Any]) -> CheckpointFormat:
    _choice(config, "fmt", ("e4m3",), "e4m3")
    static = _choice(config, "activation_scheme", _FP8_SCHEMES, "dynamic") == "static"
    ignored = _ignored(config, "modules_to_not_convert", "ignored_layers")
    block = config.get("weight_block_size")
    if block is None:
        return StoredFp8(ignored, static_input=static)
    if static:
        raise UnsupportedModelError(
            "config.json: quantization_config.activation_scheme 'static' is not supported with weight_block_size; "
            "supported: dynamic"
        )
    return StoredFp8(ignored, block=_block(config, "weight_block_size"))


def _awq(config: Mapping[str, Any]) -> CheckpointFormat:
    _choice(config, "version", ("gemm",), "gemm", lower=True)
    _choice(config, "bits", (4,))
    _choice(config, "zero_point", (True,), True)
    return StoredAwq(_ignored(config, "modules_to_not_convert"), 4, _group_size(config), symmetric=False)


def _gptq(config: Mapping[str, Any]) -> CheckpointFormat:
    _choice(config, "lm_head", (False,), False)
    version = _choice(config, "checkpoint_format", tuple(_GPTQ_VERSIONS), "gptq")
    # With static groups the inputs were quantised in another order than they lie in, but their groups are consecutive.
    reorders = _choice(config, "desc_act", (True, False), False) and not config.get("static_groups")
    return StoredGptq(
        IgnoredLayers((*_names(config, "modules_to_not_convert"), *_excluded_by_gptqmodel(config))),
        _bits(config, "bits"),
        _group_size(config),
        symmetric=_choice(config, "sym", (True, False), True),
        ordered=reorders,
        zero_offset=_GPTQ_VERSIONS[version],
    )


def _excluded_by_gptqmodel(config: Mapping[str, Any]) -> list[str]:
    """Return the patterns of the layers that GPTQModel left alone; it can also give layers settings of their own."""
    rules = config.get("dynamic") or {}
    if not isinstance(rules, Mapping) or not all(rule.startswith("-:") for rule in rules):
        raise UnsupportedModelError("config.json: quantization_config.dynamic is supported for rules '-:<regex>' only")
    return [f"re:{rule.removeprefix('-:')}" for rule in rules]


def _auto_round(config: Mapping[str, Any]) -> CheckpointFormat:
    packing = _choice(config, "packing_format", ("auto_round:auto_gptq", "auto_round:auto_awq"))
    _choice(config, "data_type", ("int",), "int")
    _choice(config, "act_bits", (16,), 16)
    layers = _object(config, "extra_config")
    if any(not isinstance(layer, Mapping) or layer.get("bits") not in (16, 32) for layer in layers.values()):
        raise UnsupportedModelError(
            "config.json: quantization_config.extra_config is supported for layers of 16 bits only"
        )
    ignored = IgnoredLayers(tuple(name if _MODULE.fullmatch(name) else f"re:{name}" for name in layers))
    group_size, symmetric = _group_size(config), _choice(config, "sym", (True, False), True)
    if packing == "auto_round:auto_awq":
        return StoredAwq(ignored, _choice(config, "bits", (4,)), group_size, symmetric=False)
    return StoredGptq(ignored, _bits(config, "bits"), group_size, symmetric)


def _modelopt(config: Mapping[str, Any]) -> CheckpointFormat:
    _choice(config, "quant_algo", ("FP8",))
    excluded = _names(config, "ignore", "exclude_modules")
    ignored = (name if _MODULE.fullmatch(name) else f"re:{fnmatch.translate(name)}" for name in excluded)
    return StoredFp8(IgnoredLayers(tuple(ignored)), static_input=True)


def _compressed_tensors(config: Mapping[str, Any]) -> CheckpointFormat:
    if _object(config, "sparsity_config").get("format", "dense") != "dense":
        raise UnsupportedModelError("config.json: quantization_config.sparsity_config is not supported unless dense")
    if config.get("transform_config"):
        raise UnsupportedModelError("config.json: quantization_config.transform_config is not supported")
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping) or len(groups) != 1:
        raise UnsupportedModelError("config.json: quantization_config.config_groups must have exactly one group")
    group = _object(groups, next(iter(groups)))
    if group.get("targets") != ["Linear"]:
        raise UnsupportedModelError(
            f"config.json: quantization_config: targets {group.get('targets')!r} is not supported; supported: Linear"
        )
    weights, inputs = _object(group, "weights"), _object(group, "input_activations")
    ignored = _ignored(config, "ignore")
    match _choice(config, "format", _COMPRESSED_FORMATS):
        case "pack-quantized":
            return _packed(ignored, weights, inputs)
        case "int-quantized":
            return _int8(ignored, weights, inputs)
        case _:
            return _float8(ignored, weights, inputs)


def _float8(ignored: IgnoredLayers, weights: Mapping[str, Any], inputs: Mapping[str, Any]) -> CheckpointFormat:
    _choice(weights, "type", ("float",))
    _choice(weights, "num_bits", (8,))
    _choice(weights, "symmetric", (True,), True)
    _choice(inputs, "type", ("float",))
    _choice(inputs, "num_bits", (8,))
    strategy = _choice(weights, "strategy", ("tensor", "channel", "block"))
    dynamic = _choice(inputs, "dynamic", (True, False), False)
    _choice(inputs, "strategy", ("token", "tensor", "group") if dynamic else ("tensor",))
    if strategy == "block":
        _choice(inputs, "dynamic", (True,), False)
        return StoredFp8(ignored, block=_block(weights, "block_structure"))
    return StoredFp8(ignored, per_row=strategy == "channel", static_input=not dynamic)


def _int8(ignored: IgnoredLayers, weights: Mapping[str, Any], inputs: Mapping[str, Any]) -> CheckpointFormat:
    _choice(weights, "type", ("int",))
    _choice(weights, "num_bits", (8,))
    _choice(weights, "symmetric", (True,), True)
    _choice(weights, "strategy", ("channel",))
    _choice(inputs, "dynamic", (True,), False)
    _log.info("inputs of 8-bit layers keep their precision; the checkpoint was made for inputs of 8 bits as well")
    return StoredInt8(ignored, 8, None, symmetric=True)


def _packed(ignored: IgnoredLayers, weights: Mapping[str, Any], inputs: object) -> CheckpointFormat:
    if inputs:
        raise UnsupportedModelError("config.json: quantization_config: input_activations of packed integers")
    _choice(weights, "type", ("int",))
    strategy = _choice(weights, "strategy", ("group", "channel"))
    group_size = _group_size(weights) if strategy == "group" else None
    symmetric = _choice(weights, "symmetric", (True, False), True)
    ordered = weights.get("actorder") in _GROUPS_BY_ACTIVATION
    return StoredPacked(ignored, _bits(weights, "num_bits"), group_size, symmetric, ordered)


_READERS = {
    "fp8": _fp8,
    "awq": _awq,
    "gptq": _gptq,
    "compressed-tensors": _compressed_tensors,
    "modelopt": _modelopt,
    "auto-round": _auto_round,
}


def _choice(
    config: Mapping[str, Any], key: str, supported: tuple[Any, ...], default: object = None, *, lower: bool = False
) -> Any:
    value = config.get(key, default)
    value = value.lower() if lower and isinstance(value, str) else value
    if value not in supported or isinstance(value, bool) != isinstance(supported[0], bool):
        raise UnsupportedModelError(
            f"config.json: quantization_config.{key} {shown(value)} is not supported; "
            f"supported: {', '.join(map(str, supported))}"
        )
    return value


def _bits(config: Mapping[str, Any], key: str) -> Bits:
    return cast(Bits, _choice(config, key, get_args(Bits)))


def _group_size(config: Mapping[str, Any]) -> int | None:
    value = config.get("group_size", 128)
    if value == -1:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UnsupportedModelError(
            f"config.json: quantization_config.group_size is {shown(value)}; it must be a positive integer, or -1"
        )
    return value


def _block(config: Mapping[str, Any], key: str) -> tuple[int, int]:
    value = config.get(key)
    if not isinstance(value, list) or len(value) != 2 or not all(isinstance(size, int) and size > 0 for size in value):
        raise UnsupportedModelError(
            f"config.json: quantization_config.{key} is {shown(value)}; it must be two positive integers"
        )
    return value[0], value[1]


def _ignored(config: Mapping[str, Any], *keys: str) -> IgnoredLayers:
    return IgnoredLayers(tuple(_names(config, *keys)))


def _names(config: Mapping[str, Any], *keys: str) -> Iterable[str]:
    for key in keys:
        names = config.get(key) or []
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise UnsupportedModelError(
                f"config.json: quantization_config.{key} is {shown(names)}; it must be a list of names"
            )
        yield from names


def _object(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = config.get(key) or {}
    if not isinstance(value, Mapping):
        raise UnsupportedModelError(f"config.json: quantization_config.{key} is {shown(value)}; it must be an object")
    return value
