"""A model through `transformers` with its continuous batching, in the same run and on the same device as ours."""

from __future__ import annotations

import importlib.util
import time
from typing import Any

import torch

from bench.gpu.part import Bench, Findings, UnavailableError
from bench.gpu.roofline import LLAMA_8B, Ceilings, ModelShape, step_floor_us

_SEQS, _PROMPT, _OUTPUT = 64, 1024, 64


class ContinuousBatching:
    """Generates for 64 sequences of 1024 tokens at once with random weights of Llama-3.1-8B's shape, in bfloat16."""

    def run(self, bench: Bench, found: Findings) -> None:
        """Add a row with output tokens per second, from the difference of a long and a short run.

        Prompts, the capture of graphs and the allocation of its cache are in both, and so in neither.

        Raises:
            UnavailableError: there is no transformers with `generate_batch`, or it does not run here.
        """
        if importlib.util.find_spec("transformers") is None:
            raise UnavailableError("transformers is not installed")
        import transformers

        dry = bench.device.dry_run
        if not dry and bench.device.free_bytes() < 40 << 30:
            raise UnavailableError("needs 40 GiB of memory: 16 for weights, the rest for the cache")
        # Weights are drawn on the device: on the host that alone would take minutes.
        with torch.inference_mode(False), torch.no_grad(), torch.device(bench.device.target):
            config = _config(transformers, LLAMA_8B, tiny=dry)
            model = transformers.LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval()
        if not hasattr(model, "generate_batch"):
            raise UnavailableError(f"transformers {transformers.__version__} has no generate_batch")
        seqs, prompt, output = (2, 8, 4) if dry else (_SEQS, _PROMPT, _OUTPUT)
        prompts = torch.randint(0, config.vocab_size, (seqs, prompt)).tolist()
        self._generate(transformers, model, prompts, 2, dry=dry)  # captures, allocates, compiles
        short, made_short = self._generate(transformers, model, prompts, output // 4, dry=dry)
        long, made_long = self._generate(transformers, model, prompts, output, dry=dry)
        found.check(
            "transformers: every sequence got all its tokens", made_long == seqs * output, f"{made_long} tokens"
        )
        decode = (made_long - made_short) / (long - short) if long > short else 0.0
        floor = step_floor_us(LLAMA_8B, Ceilings.of(bench.shared), seqs=seqs, context=prompt + output // 2)
        found.row(
            shape=f"{LLAMA_8B.name} bf16, {seqs} x {prompt} + {output}",
            decode_tokens_per_s=decode,
            ceiling=decode * floor / 1e6 / seqs,
            version=transformers.__version__,
        )
        found.share(transformers_decode_tokens_per_s=decode)

    @staticmethod
    def _generate(
        transformers: Any, model: Any, prompts: list[list[int]], output: int, *, dry: bool
    ) -> tuple[float, int]:
        """Return seconds and the number of tokens made."""
        generation = transformers.GenerationConfig(
            max_new_tokens=output, min_new_tokens=output, do_sample=False, eos_token_id=-1, pad_token_id=0
        )
        options: dict[str, Any] = {}
        if dry and hasattr(transformers, "ContinuousBatchingConfig"):  # else it takes a share of the host's memory
            options["continuous_batching_config"] = transformers.ContinuousBatchingConfig(
                num_blocks=16, max_batch_tokens=64, page_size=16
            )
        with torch.inference_mode(False), torch.no_grad():
            start = time.perf_counter()
            results = model.generate_batch(prompts, generation_config=generation, progress_bar=False, **options)
            seconds = time.perf_counter() - start
        return seconds, sum(len(result.generated_tokens) for result in results.values())


def _config(transformers: Any, shape: ModelShape, *, tiny: bool) -> Any:
    sizes = {
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.q_heads,
        "num_key_value_heads": shape.kv_heads,
        "intermediate_size": shape.intermediate,
        "vocab_size": shape.vocab,
        "head_dim": shape.head_dim,
    }
    if tiny:
        sizes |= {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
        sizes |= {"intermediate_size": 64, "vocab_size": 100, "head_dim": 16}
    return transformers.LlamaConfig(**sizes, max_position_embeddings=8192, tie_word_embeddings=False)
