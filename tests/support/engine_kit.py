"""A simulated clock, and a runner whose tokens depend on every cell of the paged cache it is told to read."""

import enum
import time
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass

from scalellm.services.executor.engine import (
    Engine,
    EngineConfig,
    EngineRequest,
    Logprobs,
    RequestFinish,
    SampledBatch,
    SampleFinish,
    SamplingParams,
    ScheduledBatch,
    ScheduledSequence,
    StepResult,
)

VOCAB = 40
EOS = 7


def digest(*parts: int) -> int:
    """A hash of integers; Python's own, which is not randomised for them."""
    return hash(parts) % 2**61


def choose(context: list[int], position: int, seed: int, index: int, banned: frozenset[int]) -> int:
    """The next token: depends on the whole context, the position, the seed and the sample."""
    attempt, state = 0, digest(*context)
    while (token := digest(state, position, seed, index, attempt) % VOCAB) in banned:
        attempt += 1
    return token


def score(context: list[int], token_id: int) -> float:
    return -(digest(*context, token_id) % 1000) / 100


def cells_of(tokens: list[int]) -> list[int]:
    """Return the cache's content for these tokens: each cell depends on all tokens up to it, as keys and values do."""
    cells: list[int] = []
    for token in tokens:
        cells.append(digest(cells[-1] if cells else 0, token))
    return cells


def undisturbed(request: EngineRequest, index: int, max_model_len: int) -> tuple[list[int], str]:
    """Oracle: the output of one sample and its finish reason, computed alone and without any paging."""
    params = request.sampling
    stops = params.stop_token_ids | (frozenset() if params.ignore_eos else {EOS})
    tokens = list(request.prompt_token_ids)
    cells = cells_of(tokens)
    room = max_model_len - len(tokens)
    limit = room if params.max_tokens is None else min(room, params.max_tokens)
    output: list[int] = []
    while True:
        banned = stops if len(output) < params.min_tokens else frozenset()
        token = choose(cells, len(tokens), params.seed or 0, index, banned)
        output.append(token)
        tokens.append(token)
        cells.append(digest(cells[-1], token))
        if token in stops:
            return output, "stop"
        if len(output) >= limit:
            return output, "length"


class Overlap(enum.Enum):
    """Moment at which a runner executes a launch: at once; with overlap, when the host waits or a step later."""

    NONE = "none"
    AT_WAIT = "at_wait"
    AT_NEXT_LAUNCH = "at_next_launch"


@dataclass
class Row:
    """One sequence as a launch described it to the device, which looks at nothing else. A token None is pending."""

    row: int
    start: int
    tokens: list[int | None]
    table: list[int]
    scored: list[tuple[int, int]]
    samples: bool
    banned: frozenset[int]
    seed: int
    index: int
    logprobs: int | None


class FakeStep:
    """A launched step of FakePagedRunner."""

    def __init__(self, runner: "FakePagedRunner") -> None:
        self.runner = runner
        self.sampled: SampledBatch | None = None

    def draw(self) -> None:
        """Do nothing: no sample has a grammar."""

    def wait(self) -> SampledBatch:
        assert self.runner.unwaited.pop(0) is self
        while self.sampled is None:
            self.runner.run_one()
        return self.sampled


class FakePagedRunner:
    """Writes one cell per token into a paged cache and reads every context through its own copy of the block tables,
    which it updates from `first_new_block` alone: a wrong table, copy, slot or hit changes the tokens.

    Work is queued, in order, as on a stream. on_launch hears of a batch when it is launched, on_execute when it runs.
    Once `lost` is set, that is what the device says when it is asked.
    """

    def __init__(
        self,
        config: EngineConfig,
        overlap: Overlap = Overlap.NONE,
        *,
        on_launch: Callable[[ScheduledBatch], None] = lambda batch: None,
        on_execute: Callable[[ScheduledBatch], None] = lambda batch: None,
    ) -> None:
        self._size = config.block_size
        self._cache = [-1] * (config.num_blocks * config.block_size)
        self._host_cache = [-1] * (config.num_host_blocks * config.block_size)
        self._tables: dict[int, list[int]] = {}
        self._sampled: dict[int, int] = {}
        self._stream: deque[Callable[[], None]] = deque()
        self._config = config
        self._overlap = overlap
        self._on_launch = on_launch
        self._on_execute = on_execute
        self.unwaited: list[FakeStep] = []
        self.batches: list[tuple[int, int]] = []
        self.table_writes = 0
        self.num_swapped = [0, 0]
        self.lost: Exception | None = None

    @property
    def overlaps(self) -> bool:
        return self._overlap is not Overlap.NONE

    @property
    def has_equal_rows(self) -> bool:
        return True

    def swap(self, outs: list[tuple[int, int]], ins: list[tuple[int, int]]) -> None:
        targets = [block for _, block in outs]
        assert len({*targets, *(block for _, block in ins)}) == len(outs) + len(ins)
        assert len({block for block, _ in ins}) == len(ins)
        self.num_swapped[0] += len(outs)
        self.num_swapped[1] += len(ins)
        self._stream.append(lambda: self._copy(outs, self._cache, self._host_cache))
        backwards = [(source, target) for target, source in ins]
        self._stream.append(lambda: self._copy(backwards, self._host_cache, self._cache))

    def copy_blocks(self, pairs: list[tuple[int, int]]) -> None:
        assert not {source for source, _ in pairs} & {target for _, target in pairs}
        assert len({target for _, target in pairs}) == len(pairs)
        self._stream.append(lambda: self._copy(pairs, self._cache, self._cache))

    def check_device(self) -> None:
        if self.lost is not None:
            raise self.lost

    def launch(self, batch: ScheduledBatch) -> FakeStep:
        config = self._config
        assert 0 < batch.num_tokens <= config.max_num_batched_tokens
        assert len(batch.sequences) <= config.max_num_seqs
        assert batch.num_tokens == sum(s.num_tokens for s in batch.sequences)
        assert all(s.num_tokens == 1 and s.samples for s in batch.sequences[: batch.num_decodes])
        drafts = [s for s in batch.sequences if s.draft is not None]
        assert len(drafts) == batch.num_drafts
        assert not (drafts and batch.num_prefill_tokens)
        assert len({s.seq.row for s in batch.sequences}) == len(batch.sequences) - batch.num_drafts
        assert len(self.unwaited) <= self.overlaps
        if self._overlap is Overlap.AT_NEXT_LAUNCH:
            while self._stream:
                self.run_one()
        self.batches.append((batch.num_decodes, batch.num_prefill_tokens))
        self._on_launch(batch)
        step = FakeStep(self)
        self.unwaited.append(step)
        rows = [self._read(scheduled) for scheduled in batch.sequences]
        self._stream.append(lambda: self._execute(batch, rows, step))
        return step

    def run_one(self) -> None:
        """Do what was queued first."""
        self._stream.popleft()()

    def _read(self, scheduled: ScheduledSequence) -> Row:
        seq, start = scheduled.seq, scheduled.start
        group, params = seq.group, seq.group.request.sampling
        new = seq.block_table[scheduled.first_new_block :]
        self.table_writes += len(new)
        table = self._tables.get(seq.row, []) if scheduled.first_new_block else []
        self._tables[seq.row] = table = [*table[: scheduled.first_new_block], *new]
        tokens: list[int | None] = list(seq.token_ids[start : scheduled.position])
        if scheduled.draft is not None:
            assert not params.has_penalties
            tokens = [scheduled.draft]
        if scheduled.token_pending:
            assert self.overlaps
            assert not tokens, "nobody knows a pending token"
            assert (scheduled.num_tokens, scheduled.samples) == (1, True)
            tokens = [None]
        assert len(tokens) == scheduled.num_tokens
        assert not (scheduled.token_pending and params.has_penalties)
        return Row(
            seq.row,
            start,
            tokens,
            table,
            [(p, seq.token_ids[p + 1]) for p in scheduled.prompt_logprobs],
            scheduled.samples,
            group.stop_ids if scheduled.num_output_tokens < params.min_tokens else frozenset(),
            group.seed,
            seq.index,
            params.logprobs,
        )

    def _execute(self, batch: ScheduledBatch, rows: list[Row], step: FakeStep) -> None:
        self._on_execute(batch)
        sampled = SampledBatch([])
        for place, row in enumerate(rows):
            for position, known in enumerate(row.tokens, start=row.start):
                token = self._sampled[row.row] if known is None else known
                before = self._cache[self._slot(row.table, position - 1)] if position else 0
                self._cache[self._slot(row.table, position)] = digest(before, token)
            end = row.start + len(row.tokens)
            context = [self._cache[self._slot(row.table, position)] for position in range(end)]
            if row.scored:
                sampled.prompt_logprobs[place] = [
                    Logprobs(score(context[: p + 1], token), []) for p, token in row.scored
                ]
            if row.samples:
                token = self._sampled[row.row] = choose(context, end, row.seed, row.index, row.banned)
                if row.logprobs is not None:
                    sampled.logprobs[len(sampled.token_ids)] = Logprobs(score(context, token), [])
                sampled.token_ids.append(token)
        step.sampled = sampled

    def _copy(self, pairs: list[tuple[int, int]], sources: list[int], targets: list[int]) -> None:
        for source, target in pairs:
            content = sources[source * self._size : (source + 1) * self._size]
            targets[target * self._size : (target + 1) * self._size] = content

    def _slot(self, table: list[int], position: int) -> int:
        return table[position // self._size] * self._size + position % self._size


class SimClock:
    """Time that passes when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


class Collector:
    """Collects an engine's results per sample and request; checks that offsets are contiguous and ends come once."""

    def __init__(self) -> None:
        self.tokens: dict[tuple[tuple[int, int], int], list[int]] = defaultdict(list)
        self.logprobs: dict[tuple[tuple[int, int], int], list[float]] = defaultdict(list)
        self.first_offset: dict[tuple[tuple[int, int], int], int] = {}
        self.prompt_logprobs: dict[tuple[int, int], list[float]] = defaultdict(list)
        self.samples: dict[tuple[tuple[int, int], int], SampleFinish] = {}
        self.finished: dict[tuple[int, int], RequestFinish] = {}

    def take(self, result: StepResult) -> None:
        for output in result.tokens:
            place = (output.key, output.index)
            assert place not in self.samples or self.samples[place] in result.samples_finished
            assert output.key not in self.finished
            first = self.first_offset.setdefault(place, output.offset)
            assert output.offset == first + len(self.tokens[place])
            self.tokens[place] += output.token_ids
            self.logprobs[place] += output.logprobs or []
        for part in result.prompt_logprobs:
            assert part.offset == len(self.prompt_logprobs[part.key])
            self.prompt_logprobs[part.key] += part.logprobs
        for sample in result.samples_finished:
            assert (sample.key, sample.index) not in self.samples
            assert sample.key not in self.finished
            self.samples[sample.key, sample.index] = sample
        for finish in result.finished:
            assert finish.key not in self.finished
            self.finished[finish.key] = finish


def run(engine: Engine, collector: Collector | None = None, *, max_steps: int = 5000) -> Collector:
    """Step until nothing is left, checking the books at every step."""
    collector = collector or Collector()
    num_steps = 0
    while num_steps < max_steps:
        if not engine.has_unfinished():
            return collector
        if engine.only_awaits_grammars:
            time.sleep(1e-3)  # how long their thread takes depends on the machine
        else:
            num_steps += 1
        collector.take(engine.step())
        engine.check_integrity()
    raise AssertionError(f"not done after {max_steps} steps: {engine.load()}")


def make_config(**changes: object) -> EngineConfig:
    values: dict[str, object] = {
        "num_blocks": 64,
        "max_model_len": 64,
        "vocab_size": VOCAB,
        "eos_token_ids": frozenset({EOS}),
        "block_size": 4,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 32,
    }
    return EngineConfig(**(values | changes))  # type: ignore[arg-type]


def make_request(handle: int, prompt: list[int], link: int = 0, **changes: object) -> EngineRequest:
    """Fields of EngineRequest and of SamplingParams alike; the seed defaults to 0, so that runs can be compared."""
    fields = {name: changes.pop(name) for name in list(changes) if name in EngineRequest.__dataclass_fields__}
    sampling = SamplingParams(**({"seed": 0} | changes))  # type: ignore[arg-type]
    return EngineRequest((link, handle), f"r{handle}", tuple(prompt), sampling, **fields)  # type: ignore[arg-type]
