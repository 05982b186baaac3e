"""Sampling defaults of a model: the settings of its generation_config.json, for requests that do not set them."""

from __future__ import annotations

from pathlib import Path

from scalellm.services.common.errors import StatusError
from scalellm.services.common.field_rules import SAMPLING
from scalellm.services.common.lifecycle import StartError
from scalellm.services.common.model_files import ModelFileError, read_json_object, shown
from scalellm.services.tokenizer.validation import validate_sampling
from scalellm.v1 import common_pb2

_FILE = "generation_config.json"


def read_sampling_defaults(model: Path) -> common_pb2.SamplingParams:
    """Return the sampling parameters in a model directory's generation_config.json; empty if there is no file.

    The keys are those that vLLM reads. A GGUF file has none. Raises StartError for a value that is out of range.
    """
    path = model / _FILE
    defaults = common_pb2.SamplingParams()
    try:
        config = read_json_object(path, missing={}) if model.is_dir() else {}
        for name, rule in SAMPLING.items():
            if not rule.is_model_default or (value := config.get(name)) is None:
                continue
            kinds = (int,) if rule.kind is int else (int, float)
            if not isinstance(value, kinds) or isinstance(value, bool) or not -1 <= value < 2**31:
                raise ModelFileError(f"{path}: {name} is {shown(value)}; it must be a number")
            # Other servers write -1 if top_k is off.
            setattr(defaults, name, 0 if rule.kind is int and value < 0 else value)
        validate_sampling(defaults, vocab_size=0)
    except ModelFileError as error:
        raise StartError(f"{error}; correct it, or start with --generation-config none") from None
    except StatusError as error:
        told = error.message.removeprefix("sampling.")
        raise StartError(f"{path}: {told}; correct it, or start with --generation-config none") from None
    return defaults


def with_defaults(
    sampling: common_pb2.SamplingParams, defaults: common_pb2.SamplingParams
) -> common_pb2.SamplingParams:
    """Return a copy of `sampling` in which parameters that are not set have their defaults."""
    filled = common_pb2.SamplingParams()
    filled.CopyFrom(defaults)
    filled.MergeFrom(sampling)  # values of the request replace the defaults
    return filled
