"""ScaleLLM as users run it: Redis and the three services, started by the launcher."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path

from bench.load.grpc_target import GrpcTarget
from bench.peers.environments import PeerError
from bench.peers.systems import Form, Need, Served, Setup
from bench.peers.weights import Weights
from scalellm.launcher import Instance, LauncherError, UpOptions, bring_down, bring_up

_BFLOAT16 = "bfloat16"
_FORMS = {
    "keep": ("keep", "auto", 4),
    "int8": ("int8", "auto", 8),
    _BFLOAT16: ("auto", "auto", 16),
    # OpenVINO's cache has 8 bits with all weights.
    f"{_BFLOAT16}-kv8": ("auto", "int8", 16),
    "float32": ("none", "auto", 32),
}
"""Values of `--quantization` and `--kv-cache-dtype`, and bits of a weight."""


class _Silent:
    """A launcher's progress that prints nothing."""

    def begin(self, stage: str, detail: str) -> None:
        pass

    def waiting(self, detail: str) -> None:
        pass

    def done(self, detail: str) -> None:
        pass


class Ours:
    """See System.

    Args:
        model: Name to serve under.
        path: Path of the model.
        weights: Its weights in other forms.
        home: The model store.
        speculation: Value of `--speculation`.
    """

    name = "scalellm"
    is_ours = True
    forms = tuple(Form(name, bits) for name, (*_, bits) in _FORMS.items())

    def __init__(self, model: str, path: Path, weights: Weights, home: Path, speculation: str) -> None:
        self._model = model
        self._path = path
        self._weights = weights
        self._home = home
        self._speculation = speculation

    def prepare(self) -> Mapping[str, str]:
        """See System."""
        return {name: version(name) for name in ("scalellm-server", "torch", "grpcio", "protobuf")}

    def setup(self, form: Form, need: Need) -> Setup:
        """See System. The settings are the defaults but for the forms of weights and cache, and speculation."""
        quantization, kv_cache_dtype, bits = _FORMS[form.name]
        path = self._weights.hf_folder(_BFLOAT16) if bits == 16 else self._path
        command = ("scalellm", "up", "--port", "0", "--model", f"{self._model}={path}")
        settings = {
            "QUANTIZATION": quantization,
            "KV_CACHE_DTYPE": kv_cache_dtype,
            "SPECULATION": self._speculation,
        }
        return Setup(command, {f"SCALELLM_EXECUTOR_{name}": value for name, value in settings.items()})

    @contextmanager
    def serve(self, setup: Setup, folder: Path) -> Iterator[Served]:
        """See System."""
        with tempfile.TemporaryDirectory(prefix="scalellm-bench-", dir=folder) as home:
            instance = Instance(Path(home), "peers")
            environment = {**os.environ, **setup.environment}
            name, _, path = setup.command[-1].partition("=")
            options = UpOptions({name: Path(path)}, self._home, environment, port=0)
            try:
                state = bring_up(instance, options, _Silent())
            except LauncherError as error:
                raise PeerError(str(error)) from None
            try:
                # As text, like everybody else's prompts: encoding is part of serving.
                target = partial(GrpcTarget, state.public_address, as_text=True)
                yield Served(target, tuple(service.pid for service in state.services))
            finally:
                bring_down(instance, lambda name: None)
