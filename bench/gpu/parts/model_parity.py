"""Whole models: the device against the CPU, and graphs of decode steps against the same steps run eagerly."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bench.gpu.device import Device
from bench.gpu.engines import Load, engine_config, make_runner, serve
from bench.gpu.models import (
    FORMATS,
    PAGE,
    DecodeStep,
    Format,
    PromptStep,
    copy_to_cpu,
    make_model,
    random_caches,
    shortened,
    tiny,
)
from bench.gpu.part import Bench, Findings
from scalellm.kernels import Launch
from scalellm.kernels.spec.case import E4M3, Maker, bit_equal
from scalellm.services.executor.engine import Engine
from scalellm.services.executor.models import PRESETS, CausalLM, allocate_kv_caches

# Of a row's norm. Activations are rounded to bfloat16 several times a layer on one side and not on the other. Where
# they are quantised, roundings move some codes by one, 6 to 12 % of a value.
_TOLERANCE = {"bf16": 3e-2, "fp8": 2e-1, "int4": 3e-2}
_LEN = 1024


@dataclass(frozen=True, slots=True)
class _Sizes:
    prompt: int
    steps: int
    rows: int
    context: int


class ModelParity:
    """Each preset in each format, at full width and with few layers."""

    def run(self, bench: Bench, found: Findings) -> None:
        """Add a row for each model and format."""
        device = bench.device
        sizes = _Sizes(5, 1, 2, 20) if device.dry_run else _Sizes(100, 2, 8, 300)
        for name, form in _combinations(dry_run=device.dry_run):
            if form.precision == "fp8" and not device.capability.has_e4m3:
                continue
            if bench.seconds_left() < 0:
                found.note(f"{name} {form.name}: left out: the budget is spent")
                continue
            with found.attempt(f"{name} {form.name}", device):
                self._compare(name, form, device, sizes, found)

    def _compare(self, name: str, form: Format, device: Device, sizes: _Sizes, found: Findings) -> None:
        layers = 1 if PRESETS[name].num_experts or form.precision == "int4" else 2
        config = tiny(name) if device.dry_run else shortened(name, layers)
        model = make_model(config, form, device, max_model_len=_LEN)
        error, limit = self._against_cpu(model, form, sizes), _TOLERANCE[form.precision]
        found.check(f"{name} {form.name} equals the CPU's", error <= limit, f"error {error:.1e} of {limit:.0e}")
        equal, padded, late = self._graphs(model, form, device, sizes)
        found.check(f"{name} {form.name} replay equals eager bit by bit", equal)
        found.check(f"{name} {form.name} padding changes no live row", padded)
        found.check(f"{name} {form.name} no late compile", not late, ", ".join(late))
        alike = self._engines(model, form, device, sizes)
        found.check(f"{name} {form.name} the engine answers alike with graphs and without", alike)
        found.row(model=name, format=form.name, of_limit=error / limit, replay=equal, padded=padded, engine=alike)

    @staticmethod
    def _against_cpu(model: CausalLM, form: Format, sizes: _Sizes) -> float:
        """Return the largest error of a row of logits, of prompts and of decode steps on what these left behind."""
        seqs, longest = 2, sizes.prompt + sizes.steps
        blocks = -(-longest // PAGE)
        sides = []
        # Where activations are quantised, both sides round them alike before, or codes differ and hide all else.
        dtype = torch.bfloat16 if form.precision == "fp8" else torch.float32
        for side in (model, copy_to_cpu(model, dtype, max_model_len=_LEN)):
            runtime = side.runtime
            cache_dtype = E4M3 if form.cache_dtype == E4M3 else runtime.dtype
            caches = allocate_kv_caches(
                side.config, seqs * blocks, PAGE, dtype=cache_dtype, device=runtime.device, ops=runtime.ops
            )
            sides.append((side, caches, Maker.on(runtime.device)))
        ids = Maker.on(torch.device("cpu")).randint(0, model.config.vocab_size, seqs, longest)
        worst = 0.0
        for tokens in range(sizes.prompt, longest + 1):
            logits = []
            for side, caches, make in sides:
                if tokens == sizes.prompt:
                    step: PromptStep | DecodeStep = PromptStep(side, caches, seqs, tokens, make, blocks=blocks)
                    step.input_ids.copy_(ids[:, :tokens].flatten())
                else:
                    step = DecodeStep(side, caches, seqs, tokens, make, blocks=blocks)
                    step.input_ids.copy_(ids[:, tokens - 1])
                logits.append(step().double().cpu())
            worst = max(worst, float(((logits[0] - logits[1]).norm(dim=-1) / logits[1].norm(dim=-1)).max()))
        return worst

    @staticmethod
    def _graphs(model: CausalLM, form: Format, device: Device, sizes: _Sizes) -> tuple[bool, bool, list[str]]:
        """Return whether a replay equals eager, whether padding changes nothing, and what was compiled late."""
        rows, context = sizes.rows, sizes.context
        launch = model.runtime.ops.launch
        assert isinstance(launch, Launch)
        make = Maker.on(device.target)
        caches = random_caches(model.config, rows * -(-context // PAGE), form.cache_dtype, make)
        whole, padded = (
            DecodeStep(model, caches, rows, context, Maker.on(device.target, 1), live=live) for live in (rows, rows - 1)
        )
        padded.input_ids[: rows - 1].copy_(whole.input_ids[: rows - 1])
        launch.warm_up([whole])
        results = []
        for step in (whole, padded):
            eager = step().clone()
            replay = device.capture(step)
            step.logits.fill_(torch.nan)
            replay()
            device.synchronize()
            results.append((eager, step.logits.clone()))
        (eager, replayed), (eager_padded, replayed_padded) = results
        equal = bit_equal(eager, replayed) and bit_equal(eager_padded, replayed_padded)
        same = bit_equal(replayed[: rows - 1].contiguous(), replayed_padded[: rows - 1].contiguous())
        return equal, same, launch.late_variants

    @staticmethod
    def _engines(model: CausalLM, form: Format, device: Device, sizes: _Sizes) -> bool:
        """True if greedy answers, and their log-probabilities to the bit, are the same from graphs as without."""
        load = Load(2 if device.dry_run else 4, sizes.prompt, 2 if device.dry_run else 8)
        limits = engine_config(model.config, load, batched_tokens=1024)
        answers = []
        for graphs in (True, False):
            runner = make_runner(model, limits, form, device, graphs=graphs)
            if graphs:
                runner.capture_graphs()
            served = serve(Engine(limits, runner), load, model.config.vocab_size, temperature=0.0, logprobs=1)
            answers.append(served.answers)
        return answers[0] == answers[1]


def _combinations(*, dry_run: bool) -> list[tuple[str, Format]]:
    """Return every preset in every format; in a dry run each of both once."""
    if dry_run:
        return list(zip(PRESETS, FORMATS.values(), strict=True))
    return [(name, form) for name in PRESETS for form in FORMATS.values()]
