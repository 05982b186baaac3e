"""Small models whose files lie, and what becomes of them in the services.

for mutant, outcome in outcomes(mutants("gguf", seed=0, count=400), tmp_path):
    assert is_fine(outcome), f"{mutant}: {outcome}"
"""

from __future__ import annotations

import json
import multiprocessing
import random
import resource
import signal
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from lying_bases import gguf_bases, hugging_face_bases
from lying_gguf import mutate_gguf
from lying_json import mutate_json
from scalellm.services.common.lifecycle import StartError
from scalellm.services.executor.build import build_engine
from scalellm.services.executor.config import ExecutorSettings
from scalellm.services.executor.engine.request import EngineRequest
from scalellm.services.executor.engine.sampling_params import SamplingParams
from scalellm.services.tokenizer.text.detokenizer import TokenTexts
from scalellm.services.tokenizer.text.loading import load_model_tokenizer
from scalellm.services.tokenizer.text.model_tokenizer import UnsupportedTokenizerError
from scalellm.v1 import tokenizer_pb2

FORMATS = ("config", "tokenizer", "gguf", "safetensors")
CPU_SECONDS = 30
"""CPU time of one mutant beyond which loading it counts as hanging; busy neighbours do not add to CPU time."""
MEMORY_BYTES = 2 << 30
"""Memory by which a process may grow while it loads such a model, of some 100 KiB."""


@dataclass(frozen=True)
class Mutant:
    """A model's files, one of which lies."""

    format: str
    number: int
    what: str
    files: Mapping[str, bytes]

    def write(self, folder: Path) -> Path:
        """Write the files to a folder, and nothing else; return it."""
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.iterdir():
            if path.name not in self.files:
                path.unlink()
        for name, data in self.files.items():
            (folder / name).write_bytes(data)
        return folder

    def __str__(self) -> str:
        return f"{self.format} {self.number}: {self.what}"


def mutants(format: str, seed: int, count: int) -> Iterator[Mutant]:
    """Yield `count` mutants of a format; equal arguments give equal ones, and a longer run begins like a shorter."""
    mutate = _MUTATORS[format]
    for number in range(count):
        rng = random.Random(f"{format} {seed} {number}")
        files, what = mutate(rng)
        yield Mutant(format, number, what, files)


def outcome(path: Path) -> str:
    """Load a model as executor and edge do, and use it; return "loaded" or "refused: " and the reason.

    Whatever else is raised is a fault of ours.
    """
    refusals = []
    for use in (_use_executor, _use_edge):
        try:
            use(path)
        except (StartError, UnsupportedTokenizerError) as error:
            if "\n" in str(error) or len(str(error)) > 2_000:
                raise AssertionError(f"not a line that one can read: {error}") from error
            refusals.append(f"refused: {error}")
    return refusals[0] if refusals else "loaded"


def outcomes(
    mutated: Iterable[Mutant], folder: Path, of: Callable[[Path], str] = outcome
) -> Iterator[tuple[Mutant, str]]:
    """Yield each mutant and its outcome in a process with limits on memory and time.

    Beside what `outcome` returns: "failed: " and what was raised, or "died: " and the signal, which SIGPROF says of a
    mutant that takes too long.
    """
    context = multiprocessing.get_context("fork")
    waiting = list(mutated)
    while waiting:
        here, there = context.Pipe(duplex=False)
        child = context.Process(target=_work, args=(there, waiting, folder, of), daemon=True)
        child.start()
        there.close()
        try:
            while waiting:
                yield waiting[0], here.recv()
                del waiting[0]
        except EOFError:
            child.join()
            yield waiting.pop(0), f"died: {signal.Signals(-(child.exitcode or 0)).name}"
        finally:
            here.close()
            if not waiting:
                child.join()
            else:
                child.kill()
                child.join()


def is_fine(outcome: str) -> bool:
    """Return whether a mutant ended as it may."""
    return outcome == "loaded" or outcome.startswith("refused: ")


def _work(results: Connection, waiting: list[Mutant], folder: Path, of: Callable[[Path], str]) -> None:
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for mutant in waiting:
        # From what the process has now: threads of former mutants leave address space behind.
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + MEMORY_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        try:
            results.send(of(mutant.write(folder)))
        except BaseException as error:  # panics of Rust included
            results.send(f"failed: {type(error).__name__}: {error}"[:500])
    results.close()


def _use_executor(path: Path) -> None:
    settings = ExecutorSettings(
        model=str(path), device="cpu", kernels={"all": "torch"}, num_threads=1, kv_cache_memory=1 << 20, max_num_seqs=4
    )
    engine = build_engine(settings, lambda line: None).engine
    # Not drawing what ends an answer uses all ids that the files name, beside a neighbour.
    for handle, min_tokens in ((1, 2), (2, 0)):
        sampling = SamplingParams(max_tokens=3, min_tokens=min_tokens, temperature=0.0)
        engine.add(EngineRequest(key=(0, handle), request_id="", prompt_token_ids=(0,), sampling=sampling))
    while engine.has_unfinished():
        result = engine.step()
        if result.error is not None:
            raise result.error


def _use_edge(path: Path) -> None:
    model = load_model_tokenizer(path)
    texts = TokenTexts(model.tokenizer)
    ids = model.tokenizer.encode_batch_fast(["Hello, 12 x<|im_end|>\n ü" * 4])[0].ids
    texts.detokenizer(skip_special_tokens=False).push(ids)
    tokenizer_pb2.GetInfoResponse(
        vocab_size=model.vocab_size,
        eos_token_ids=model.eos_token_ids,
        has_chat_template=model.chat_template is not None,
    )
    json.dumps([model.chat_templates, model.special_tokens])  # as the process that renders chats gets them


@cache
def _hugging_face() -> list[dict[str, bytes]]:
    return hugging_face_bases()


def _config(rng: random.Random) -> tuple[dict[str, bytes], str]:
    names = ("config.json",) * 4 + ("generation_config.json", "tokenizer_config.json")
    return _with_lies(rng.choice(_hugging_face()), rng.choice(names), rng)


def _tokenizer(rng: random.Random) -> tuple[dict[str, bytes], str]:
    return _with_lies(rng.choice(_hugging_face()), "tokenizer.json", rng)


def _with_lies(files: Mapping[str, bytes], name: str, rng: random.Random) -> tuple[dict[str, bytes], str]:
    data, what = mutate_json(json.loads(files[name]), rng)
    return {**files, name: data}, f"{name}: {what}"


def _gguf(rng: random.Random) -> tuple[dict[str, bytes], str]:
    data, what = mutate_gguf(rng.choice(gguf_bases()), rng)
    return {"model.gguf": data}, what


def _safetensors(rng: random.Random) -> tuple[dict[str, bytes], str]:
    files = rng.choice(_hugging_face())
    if rng.random() < 0.2:
        index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(_header(files), "model.safetensors")}
        data, what = mutate_json(index, rng)
        return {**files, "model.safetensors.index.json": data}, f"index: {what}"
    whole = files["model.safetensors"]
    (length,) = struct.unpack_from("<Q", whole)
    header, body = whole[8 : 8 + length], whole[8 + length :]
    what = ""
    if rng.random() < 0.8:
        header, what = mutate_json(json.loads(header), rng)
        length = len(header)
    if rng.random() < 0.3:
        length = rng.choice((0, 1, length - 1, length + 1, 2**31, 2**40, 2**63, 2**64 - 1))
        what += f"; says that its header has {length} bytes"
    data = struct.pack("<Q", length) + header + body
    if rng.random() < 0.2:
        data = data[: rng.randrange(len(data))]
        what += f"; cut off after {len(data)} bytes"
    return {**files, "model.safetensors": data}, what


def _header(files: Mapping[str, bytes]) -> Mapping[str, Any]:
    whole = files["model.safetensors"]
    header: dict[str, Any] = json.loads(whole[8 : 8 + struct.unpack_from("<Q", whole)[0]])
    header.pop("__metadata__", None)
    return header


_MUTATORS = {"config": _config, "tokenizer": _tokenizer, "gguf": _gguf, "safetensors": _safetensors}
