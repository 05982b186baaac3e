"""A simulated clock, and a runner whose tokens depend on every cell of the paged cache it is told to read."""

from collections import defaultdict
from collections.abc import Callable

from services.executor.engine import (
    CompletedStep,
    Engine,
    EngineConfig,
    EngineRequest,
    Logprobs,
    RequestFinish,
    SampledBatch,
    SampleFinish,
    SamplingParams,
    ScheduledBatch,
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
    """What a cache holds for these tokens: each cell depends on all tokens up to it, as keys and values do."""
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


class FakePagedRunner:
    """Writes one cell per token into a paged cache and reads every context through its own copy of the block tables,
    which it updates from `first_new_block` alone: a wrong table, copy, slot or hit changes the tokens.
    """

    def __init__(self, config: EngineConfig, on_execute: Callable[[ScheduledBatch], None] = lambda batch: None) -> None:
        self._size = config.block_size
        self._cache = [-1] * (config.num_blocks * config.block_size)
        self._tables: dict[int, list[int]] = {}
        self._config = config
        self._on_execute = on_execute
        self.batches: list[tuple[int, int]] = []
        self.table_writes = 0

    def copy_blocks(self, pairs: list[tuple[int, int]]) -> None:
        assert not {source for source, _ in pairs} & {target for _, target in pairs}
        assert len({target for _, target in pairs}) == len(pairs)
        for source, target in pairs:
            content = self._cache[source * self._size : (source + 1) * self._size]
            self._cache[target * self._size : (target + 1) * self._size] = content

    def launch(self, batch: ScheduledBatch) -> CompletedStep:
        config = self._config
        assert 0 < batch.num_tokens <= config.max_num_batched_tokens
        assert len(batch.sequences) <= config.max_num_seqs
        assert batch.num_tokens == sum(s.num_tokens for s in batch.sequences)
        assert all(s.num_tokens == 1 and s.samples for s in batch.sequences[: batch.num_decodes])
        assert len({s.seq.row for s in batch.sequences}) == len(batch.sequences)
        self.batches.append((batch.num_decodes, batch.num_prefill_tokens))
        self._on_execute(batch)
        sampled = SampledBatch([])
        for place, scheduled in enumerate(batch.sequences):
            seq = scheduled.seq
            new = seq.block_table[scheduled.first_new_block :]
            self.table_writes += len(new)
            table = self._tables.get(seq.row, []) if scheduled.first_new_block else []
            self._tables[seq.row] = table = [*table[: scheduled.first_new_block], *new]
            end = scheduled.start + scheduled.num_tokens
            for position in range(scheduled.start, end):
                before = self._cache[self._slot(table, position - 1)] if position else 0
                self._cache[self._slot(table, position)] = digest(before, seq.token_ids[position])
            context = [self._cache[self._slot(table, position)] for position in range(end)]
            params = seq.group.request.sampling
            if scheduled.prompt_logprobs:
                sampled.prompt_logprobs[place] = [
                    Logprobs(score(context[: p + 1], seq.token_ids[p + 1]), []) for p in scheduled.prompt_logprobs
                ]
            if scheduled.samples:
                banned = seq.group.stop_ids if seq.num_output_tokens < params.min_tokens else frozenset()
                token = choose(context, end, seq.group.seed, seq.index, banned)
                if params.logprobs is not None:
                    sampled.logprobs[len(sampled.token_ids)] = Logprobs(score(context, token), [])
                sampled.token_ids.append(token)
        return CompletedStep(sampled)

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
    """What an engine reported, per sample and request; checks that offsets are contiguous and ends come once."""

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
    for _ in range(max_steps):
        if not engine.has_unfinished():
            return collector
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
