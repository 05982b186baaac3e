"""Runs scheduled batches through the model on a device: inputs, forward, logits where needed, sampling."""

import functools
from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from scalellm import kernels
from scalellm.services.executor.engine.batch import SampledBatch, ScheduledBatch, ScheduledSequence
from scalellm.services.executor.engine.config import EngineConfig
from scalellm.services.executor.grammar import Masks
from scalellm.services.executor.models import CausalLM, KVCache
from scalellm.services.executor.runner.decode_graphs import DecodeGraphs, decode_buckets
from scalellm.services.executor.runner.decode_of_ranks import DecodeOfRanks
from scalellm.services.executor.runner.decode_step import DecodeStep, finite_rows
from scalellm.services.executor.runner.device import Device, Event
from scalellm.services.executor.runner.host_cache import HostCache
from scalellm.services.executor.runner.input_buffers import DecodeAttention, InputBuffers
from scalellm.services.executor.runner.prompt_scores import PromptScores, score_prompt
from scalellm.services.executor.runner.recorded_decode import RecordedDecode
from scalellm.services.executor.runner.sampler import Draw, Sampler


class ModelRunner:
    """Runs steps of one model on one device.

    Where steps overlap, those of decodes alone are padded to one of `buckets` rows (default: `decode_buckets`) and,
    once `capture_graphs` ran, replayed; on a CPU they are run by `RecordedDecode`, or `DecodeOfRanks`. All others are
    launched op by op. Nothing in `launch` waits for the device, and `wait` waits for its own step only.

    The KV caches are the model's, one per layer, with `config.num_blocks` blocks of `config.block_size` slots. `masks`
    fills what grammars allow (default: from the matchers of the sequences). Where the model is one rank's share, all
    ranks run the same steps: each draws the same tokens.
    """

    def __init__(
        self,
        model: CausalLM,
        kv_caches: list[KVCache],
        config: EngineConfig,
        device: Device,
        buckets: list[int] | None = None,
        masks: Masks | None = None,
    ) -> None:
        self._model = model
        self._kv_caches = kv_caches
        self._device = device
        self._ops = model.runtime.ops
        self._is_whole = model.runtime.shard.is_whole
        self.host_cache = HostCache(kv_caches, config.num_host_blocks, device) if config.num_host_blocks else None
        """The host memory that blocks are swapped to."""
        buckets = buckets or decode_buckets(config.max_num_seqs)
        self._graphs = DecodeGraphs(buckets, self._decode, device)
        self._inputs = InputBuffers(config, device, self._decode_attention(max(buckets)), self._ops.library)
        self._decodes = (
            RecordedDecode(model, kv_caches, self._ops.library) if self._is_whole else DecodeOfRanks(model, kv_caches)
        )
        self._sampler = Sampler(config, device, self._ops, masks or Masks(config.max_num_seqs, config.vocab_size))
        self._max_rows = config.max_num_seqs
        self._row_numbers = np.arange(self._max_rows + 1)
        # Results of padded decode steps; a CPU runs none.
        num_rows = config.max_num_seqs if device.overlaps else 0
        self._logits = torch.empty((num_rows, model.num_logits), dtype=torch.float32, device=device.torch_device)
        self._finite = torch.empty(num_rows, dtype=torch.bool, device=device.torch_device)

    @property
    def overlaps(self) -> bool:
        """True if a step may be launched while the one before still runs."""
        return self._device.overlaps

    @property
    def has_equal_rows(self) -> bool:
        """True once a decode step was found to be computed by the C++ forms alone, whose sums for a row do not depend
        on the other rows.
        """
        return self._decodes.has_equal_rows

    @property
    def late_compiles(self) -> list[str]:
        """Kernels of which a variant was compiled after `seal`, while requests waited. Should be empty."""
        return [] if self._ops.launch is None else self._ops.launch.late_variants

    @torch.inference_mode()
    def capture_graphs(self, on_progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Run the decode step of every size, and capture it where the device has graphs."""
        self._graphs.capture(on_progress)

    @torch.inference_mode()
    def record_steps(self, limit: float) -> int:
        """Record decode steps on a CPU before serving, those of few rows first, for about `limit` seconds at most.

        Returns the largest number of rows that was recorded. Steps of more are recorded when they first occur, those of
        several ranks never.
        """
        if not isinstance(self._decodes, RecordedDecode):
            return 0
        return self._decodes.prepare(self._max_rows, self._inputs.decode, self._sampler.plain_draw, limit)

    def seal(self) -> None:
        """From now on, count a kernel variant that was not seen before as a late compile."""
        if self._ops.launch is not None:
            self._ops.launch.seal()

    def check_device(self) -> None:
        """Wait for the device. Raises CUDA's error if the device is lost. Running out of memory is not such an
        error.
        """
        self._device.synchronize()

    @torch.inference_mode()
    def swap(self, outs: list[tuple[int, int]], ins: list[tuple[int, int]]) -> None:
        """Copy whole cache blocks, (device block, host block), to host memory and then back from it."""
        if self.host_cache is None:
            raise ValueError("num_host_blocks is 0: there is nothing to swap to")
        self.host_cache.store(outs)
        self.host_cache.load(ins)

    @torch.inference_mode()
    def copy_blocks(self, pairs: list[tuple[int, int]]) -> None:
        """Copy whole cache blocks, (source, target), in every layer."""
        indices = self._device.to_device(torch.tensor(pairs, dtype=torch.int64))
        for cache in self._kv_caches:
            self._ops.copy_blocks_(cache.k, cache.v, indices)

    @torch.inference_mode()
    def launch(self, batch: ScheduledBatch) -> "InFlightStep":
        """Queue the model over the batch and sampling; logits are computed for the rows that need them only."""
        for scheduled in batch.sequences:
            if scheduled.first_new_block == 0:
                self._sampler.set_row(scheduled.seq)
        if batch.has_only_decodes:
            first_row, drawn = self._row_numbers[: len(batch.sequences) + 1], batch.sequences
            self._sampler.fill(drawn, first_row[:-1])
        else:
            first_row = np.cumsum([0] + [s.num_tokens for s in batch.sequences])
            sampling = [place for place, scheduled in enumerate(batch.sequences) if scheduled.samples]
            drawn = [batch.sequences[place] for place in sampling]
            if drawn:
                self._sampler.fill(drawn, first_row[1:][sampling] - 1)
        misfits = {} if batch.draws_late else self._sampler.mask(drawn)
        scores: dict[int, PromptScores] = {}
        logits: Tensor | None = None
        output: kernels.SampleOutput | None = None
        if self._is_padded(batch):
            logits, finite = self.decode(batch)
        else:
            is_narrow = self._needs_few_rows(batch)
            rows = self._sampler.places(len(drawn))[0]
            hidden, finite, logits, output = self._forward(batch, rows if is_narrow else None)
            for place, scheduled in enumerate(batch.sequences):
                if scheduled.prompt_logprobs:
                    first = int(first_row[place]) - scheduled.start
                    scores[place] = score_prompt(self._model, hidden, first, scheduled, self._device)
            if drawn and logits is None:
                logits = self._model.compute_logits(hidden if is_narrow else hidden[rows])
        step = InFlightStep(scores, self._device.to_host(finite), first_row, self._device.record())
        if logits is not None:
            draw = functools.partial(self._draw, step, logits, drawn, output)
            if batch.draws_late:
                step.draw_late = draw
            else:
                draw(misfits)
        return step

    def _draw(
        self,
        step: "InFlightStep",
        logits: Tensor,
        drawn: list[ScheduledSequence],
        output: kernels.SampleOutput | None,
        misfits: Mapping[int, str] | None = None,
    ) -> None:
        """Queue the drawing of a step's tokens. `misfits` is the result of `Sampler.mask`; None: it was not
        called yet.
        """
        step.misfits = self._sampler.mask(drawn) if misfits is None else misfits
        if not self._is_whole:
            logits, output = self._of_all_ranks(logits)
        token_ids, step.drawn = self._sampler.sample(logits, drawn, output)
        if self._device.overlaps:
            self._inputs.remember(self._sampler.places(len(drawn))[1], token_ids)
        step.done = self._device.record()

    def _of_all_ranks(self, logits: Tensor) -> tuple[Tensor, kernels.SampleOutput | None]:
        """Return the logits of all ranks, given this rank's, or only the tokens if all rows are greedy."""
        if not self._sampler.is_greedy:
            return self._model.joined(logits), None
        token_ids = self._model.most_likely(logits)
        nothing = logits.new_empty(0)
        return logits, kernels.SampleOutput(token_ids, nothing, nothing, nothing)

    def decode(self, batch: ScheduledBatch) -> tuple[Tensor, Tensor]:
        """Queue a padded step of decodes alone, without sampling.

        Returns logits `[D, V]` f32, those of this rank's tokens, and, `[D]`, whether each row's hidden state is finite;
        valid until the next step.
        """
        D = batch.num_decodes
        bucket = self._graphs.bucket(D)
        self._inputs.fill(batch, bucket)
        self._graphs.run(bucket)
        return self._logits[:D], self._finite[:D]

    def _is_padded(self, batch: ScheduledBatch) -> bool:
        return self._device.overlaps and batch.has_only_decodes and not batch.scores_prompts

    def _needs_few_rows(self, batch: ScheduledBatch) -> bool:
        """True if hidden states are needed only of rows from which tokens are drawn, so that the end of the last layer
        is computed for these alone.

        False on a GPU, where kernels for any number of rows would be compiled while requests wait.
        """
        return not (self._device.overlaps or batch.has_only_decodes or batch.scores_prompts)

    def _forward(self, batch: ScheduledBatch, rows: Tensor | None) -> DecodeStep:
        """Run the model; with `rows [R]` the results are those of these rows, but for `finite`, which has all."""
        self._inputs.fill(batch, batch.num_decodes)
        if batch.has_only_decodes:
            step = self._decodes.run(batch.num_decodes, self._inputs.decode, self._sampler.plain_draw)
            if step is not None:
                return step
            inputs = self._inputs.decode(batch.num_decodes)
        else:
            inputs = self._inputs.mixed(batch)
        if rows is None:
            hidden = self._model.forward(*inputs, self._kv_caches)
            return DecodeStep(hidden, finite_rows(hidden), logits=None, drawn=None)
        hidden, attended, residual = self._model.forward_rows(*inputs, self._kv_caches, rows)
        finite = finite_rows(attended) & finite_rows(residual)
        finite[rows] &= finite_rows(hidden)
        return DecodeStep(hidden, finite, logits=None, drawn=None)

    def _decode(self, num_rows: int) -> None:
        """Queue a padded decode step from and to fixed places."""
        input_ids, context = self._inputs.decode(num_rows)
        hidden = self._model.forward(input_ids, context, self._kv_caches)
        self._finite[:num_rows].copy_(finite_rows(hidden))
        self._model.compute_logits(hidden, out=self._logits[:num_rows])

    def _decode_attention(self, most_rows: int) -> DecodeAttention:
        model, device = self._model.rank_config, self._device
        splits = kernels.num_decode_splits(device.capability, model.num_kv_heads)
        shape = most_rows, model.num_heads, model.head_dim, splits
        return DecodeAttention(splits, kernels.decode_workspace(*shape, device.torch_device))


class InFlightStep:
    """A launched step, whose results are available once its event has passed.

    Attributes:
        drawn: Its tokens, once their drawing was queued.
        misfits: See SampledBatch.
        draw_late: Queues the drawing, in a step that draws late.
        done: Event after all of its work.
    """

    def __init__(
        self,
        scores: dict[int, PromptScores],
        finite: Tensor,
        first_row: npt.NDArray[np.int64],
        done: Event,
    ) -> None:
        self.drawn: Draw | None = None
        self.misfits: Mapping[int, str] = {}
        self.draw_late: Callable[[], None] | None = None
        self.done = done
        self._scores = scores
        self._finite = finite
        self._first_row = first_row

    @torch.inference_mode()
    def draw(self) -> None:
        """Queue the drawing of the tokens, if the launch did not."""
        if self.draw_late is not None:
            draw_late, self.draw_late = self.draw_late, None
            draw_late()

    def wait(self) -> SampledBatch:
        """Wait for the step, and return its results."""
        self.done.synchronize()
        sampled = SampledBatch([], failed=self._failed_places(), misfits=self.misfits)
        sampled.prompt_logprobs = {place: scores.entries() for place, scores in self._scores.items()}
        if self.drawn is not None:
            sampled.token_ids = self.drawn.token_ids.tolist()
            sampled.logprobs = self.drawn.logprobs()
        return sampled

    def _failed_places(self) -> set[int]:
        finite = self._finite.tolist()
        if all(finite):
            return set()
        bad_rows = [row for row, is_finite in enumerate(finite) if not is_finite]
        return set((np.searchsorted(self._first_row, bad_rows, side="right") - 1).tolist())
