"""Decode steps and prompts of the presets in each format, beside the least time that they can take."""

from __future__ import annotations

from dataclasses import dataclass

from bench.gpu.models import (
    FORMATS,
    PAGE,
    DecodeStep,
    Format,
    PromptStep,
    make_model,
    random_caches,
    tiny,
    weight_bytes,
)
from bench.gpu.part import Bench, Findings
from bench.gpu.roofline import H200_TARGETS, Ceilings, ModelShape, Precision, step_floor_us
from bench.gpu.timeline import kernels_of
from scalellm.kernels.spec.case import Maker
from scalellm.services.executor.models import PRESETS, CausalLM, KVCache, ModelConfig
from scalellm.services.executor.models.context import kv_bytes_per_token

_TARGET = 0.75  # of the roofline, for decode steps
_TARGET_ROWS = (1, 64)
# The ones with targets first: what comes last is left out when time is short.
_ORDER: tuple[tuple[str, Precision], ...] = (
    ("llama-3.1-8b", "bf16"),
    ("llama-3.1-8b", "fp8"),
    ("mixtral-8x7b", "fp8"),
    ("llama-3.1-8b", "int4"),
    ("qwen3-8b", "bf16"),
    ("qwen3-8b", "fp8"),
    ("qwen3-8b", "int4"),
    ("mixtral-8x7b", "int4"),
    ("mixtral-8x7b", "bf16"),
)
_PROMPT_SHARE = 0.03  # of the time that is left, for one measurement of many prompts
_ROOM = 4 << 30  # for activations and the workspace of products


@dataclass(frozen=True, slots=True)
class _Sizes:
    batches: tuple[int, ...]
    chunk: int
    """Prompts of one step: more are computed in several, as in serving."""
    context: int


class ModelSpeed:
    """A step is timed as the replay of its graph, sampling included: what the device takes, the host left out."""

    def run(self, bench: Bench, found: Findings) -> None:
        """Add rows for each preset and format that fits in memory and in the time left."""
        device = bench.device
        batches = bench.options.get("batches", (1, 8, 64, 256))
        if device.dry_run:
            batches = (1,) if bench.options.get("profile") else (1, 2)
        sizes = _Sizes(tuple(batches), chunk=1 if device.dry_run else 8, context=20 if device.dry_run else 1024)
        order = [(name, FORMATS[precision]) for name, precision in bench.options.get("models", _ORDER)]
        for name, form in order[:3:2] if device.dry_run and len(order) > 2 else order:
            config = tiny(name) if device.dry_run else PRESETS[name]
            if form.precision == "fp8" and not device.capability.has_e4m3:
                continue
            if bench.seconds_left() < 0:
                found.note(f"{name} {form.name}: left out: the time is spent")
                continue
            if weight_bytes(config, form) + _ROOM > device.free_bytes():
                found.note(f"{name} {form.name}: left out: its weights do not fit")
                continue
            with found.attempt(f"{name} {form.name}", device):
                self._measure(name, config, form, sizes, bench, found)

    def _measure(
        self, name: str, config: ModelConfig, form: Format, sizes: _Sizes, bench: Bench, found: Findings
    ) -> None:
        device = bench.device
        model = make_model(config, form, device, max_model_len=max(sizes.context, 64))
        per_row = kv_bytes_per_token(config, form.cache_dtype) * -(-sizes.context // PAGE) * PAGE
        most = min(max(sizes.batches), (device.free_bytes() - _ROOM) // per_row)
        if most < 1:
            found.note(f"{name} {form.name}: left out: no room for a cache")
            return
        blocks = most * -(-sizes.context // PAGE)
        caches = random_caches(config, blocks, form.cache_dtype, Maker.on(device.target))
        for rows in sizes.batches:
            if rows > most:
                found.note(f"{name} {form.name} {rows} x {sizes.context}: left out: its cache does not fit")
                continue
            with found.attempt(f"{name} {form.name} decode {rows} x {sizes.context}", device):
                self._decode(name, config, form, model, caches, rows, sizes.context, bench, found)
        for seqs in sizes.batches if bench.options.get("prompts", True) else ():
            if (chunk := min(seqs, sizes.chunk)) <= most:
                with found.attempt(f"{name} {form.name} prompt {seqs} x {sizes.context}", device):
                    prompt = PromptStep(model, caches, chunk, sizes.context, Maker.on(device.target))
                    us = self._prompt_us(prompt, seqs // chunk, bench)
                    if us is None:
                        found.note(
                            f"{name} {form.name} prompt {seqs} x {sizes.context}: left out: too long for its time"
                        )
                    else:
                        self._row(name, config, form, bench, found, us, seqs, sizes.context, 0)

    def _decode(
        self,
        name: str,
        config: ModelConfig,
        form: Format,
        model: CausalLM,
        caches: list[KVCache],
        rows: int,
        context: int,
        bench: Bench,
        found: Findings,
    ) -> None:
        device = bench.device
        step = DecodeStep(model, caches, rows, context, Maker.on(device.target))
        step()  # compiles
        device.synchronize()
        replay = device.capture(step)
        us = device.time(replay, flush=False, repeats=7)
        share = self._row(name, config, form, bench, found, us, rows, 1, context)
        found.share(**{f"decode_us {name} {form.precision} {rows}": us})
        finite = bool(step.logits.isfinite().all())
        found.check(f"{name} {form.name} {rows} x {context}: logits are finite", finite)
        if rows in _TARGET_ROWS:
            self._judge(name, form, rows, us, share, bench, found)
        if bench.options.get("profile"):
            for line in kernels_of(device.profile(replay)):
                found.note(f"{name} {form.name} {rows} x {context}: {line}")

    @staticmethod
    def _prompt_us(prompt: PromptStep, steps: int, bench: Bench) -> float | None:
        """Time as many steps in a row; None when they would take too much of the time that is left."""
        one = bench.device.time(prompt, flush=False, repeats=3)
        if steps == 1:
            return one
        if 2e-6 * one * steps > _PROMPT_SHARE * bench.seconds_left():  # once for nothing, and once timed
            return None
        return bench.device.time(lambda: [prompt() for _ in range(steps)], flush=False, repeats=1)

    @staticmethod
    def _row(
        name: str,
        config: ModelConfig,
        form: Format,
        bench: Bench,
        found: Findings,
        us: float,
        seqs: int,
        tokens: int,
        context: int,
    ) -> float:
        """Add a row; returns the share of the roofline."""
        floor = step_floor_us(
            ModelShape.of(name, config),
            Ceilings.of(bench.shared),
            seqs=seqs,
            tokens=tokens,
            context=context,
            precision=form.precision,
            kv_bytes=form.cache_dtype.itemsize,
        )
        step = f"decode {seqs} x {context}" if tokens == 1 else f"prompt {seqs} x {tokens}"
        rate = seqs * tokens / us * 1e6
        found.row(model=name, format=form.name, step=step, ms=us / 1e3, tokens_per_s=rate, ceiling=floor / us)
        return floor / us

    @staticmethod
    def _judge(name: str, form: Format, rows: int, us: float, share: float, bench: Bench, found: Findings) -> None:
        dry = bench.device.dry_run
        what = f"{name} {form.name} decode at {rows}"
        found.check(
            f"{what}: at least {_TARGET:.0%} of the roofline",
            None if dry else share >= _TARGET,
            "" if dry else f"{share:.1%}",
            target=True,
        )
        least = H200_TARGETS.get((name, form.precision, rows))
        if least is not None and (dry or "H200" in bench.device.capability.name):
            rate = rows / us * 1e6
            found.check(
                f"{what}: at least {least} tok/s",
                None if dry else rate >= least,
                "" if dry else f"{rate:,.0f} tok/s",
                target=True,
            )
