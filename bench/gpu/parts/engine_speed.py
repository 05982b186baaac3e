"""The engine with the model runner at 64 sequences: what of the device's speed is left when the host takes part."""

from __future__ import annotations

import time

from bench.gpu.engines import Load, engine_config, make_runner, serve
from bench.gpu.models import FORMATS, PAGE, Format, make_model, tiny, weight_bytes
from bench.gpu.part import Bench, Findings, UnavailableError
from bench.gpu.roofline import Ceilings, ModelShape, step_floor_us
from scalellm.services.executor.engine import Engine
from scalellm.services.executor.models import PRESETS
from scalellm.services.executor.models.context import kv_bytes_per_token
from scalellm.services.executor.runner.warm_up import warm_up

_MODEL = "llama-3.1-8b"
_HIDDEN = 0.9  # share of a step's time that the device works, from which on the host's is hidden


class EngineSpeed:
    """Llama-3.1-8B, in bfloat16 and in fp8 with an fp8 cache: prompts, then decode steps of all of them."""

    def run(self, bench: Bench, found: Findings) -> None:
        """Add a row for each format that fits in memory."""
        dry = bench.device.dry_run
        load = Load(2, 5, 4) if dry else Load(64, 1024, 128)
        for form in (FORMATS["bf16"],) if dry else (FORMATS["bf16"], FORMATS["fp8"]):
            if form.precision == "bf16" or bench.device.capability.has_e4m3:
                with found.attempt(f"engine {form.name}", bench.device):
                    self._measure(form, load, bench, found)

    def _measure(self, form: Format, load: Load, bench: Bench, found: Findings) -> None:
        device = bench.device
        config = tiny(_MODEL) if device.dry_run else PRESETS[_MODEL]
        cache_bytes = load.num_blocks * PAGE * kv_bytes_per_token(config, form.cache_dtype)
        if 1.1 * (weight_bytes(config, form) + cache_bytes) > device.free_bytes():
            raise UnavailableError(f"{_MODEL} {form.name} and its cache do not fit in memory")
        limits = engine_config(config, load, batched_tokens=16 if device.dry_run else 8192)
        model = make_model(config, form, device, max_model_len=load.length)
        runner = make_runner(model, limits, form, device)
        started = time.perf_counter()
        warm_up(runner, limits, lambda message: None)
        warm = time.perf_counter() - started
        served = serve(Engine(limits, runner), load, config.vocab_size, temperature=1.0)
        late = list(runner.late_compiles)
        found.check(f"engine {form.name}: nothing compiled after warm-up", not late, ", ".join(late))
        short = [n for n, answer in served.answers.items() if len(answer) != load.output]
        found.check(f"engine {form.name}: every request got all its tokens", not short)

        tokens, seconds = served.decode(load.seqs)
        us_per_step = 1e6 * seconds * load.seqs / tokens
        context = load.prompt + load.output // 2
        floor, floor_alone = (
            step_floor_us(
                ModelShape.of(_MODEL, config),
                Ceilings.of(bench.shared),
                seqs=load.seqs,
                context=tokens_cached,
                precision=form.precision,
                kv_bytes=form.cache_dtype.itemsize,
            )
            for tokens_cached in (context, load.prompt)
        )
        # The same step without the host, of sequences that are a little shorter.
        alone = bench.shared.get(f"decode_us {_MODEL} {form.precision} {load.seqs}")
        share = None if alone is None else alone * floor / floor_alone / us_per_step
        found.row(
            model=_MODEL,
            format=form.name,
            load=f"{load.seqs} x {load.prompt} + {load.output}",
            decode_tokens_per_s=1e6 * load.seqs / us_per_step,
            ms_per_step=us_per_step / 1e3,
            ceiling=floor / us_per_step,
            of_device=share,
            warm_up_s=warm,
        )
        if share is not None:
            passed = None if device.dry_run else share >= _HIDDEN
            found.check(
                f"engine {form.name}: host time is hidden",
                passed,
                "" if device.dry_run else f"{share:.1%}",
                target=True,
            )
