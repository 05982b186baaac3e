"""The engine over a tiny random Llama, against recomputing every prefix from scratch."""

import random
from collections.abc import Callable

import pytest
import torch

import engine_kit
from runner_kit import CPU, MODEL, make_runner, random_model
from scalellm import kernels
from scalellm.services.executor.engine import Engine, EngineConfig, EngineRequest, RequestStatus
from scalellm.services.executor.engine_link import EngineLink
from scalellm.services.executor.models import (
    CausalLM,
    ForwardContext,
    ModelRuntime,
    PrefillRows,
    allocate_kv_caches,
)
from scalellm.services.executor.runner import CpuDevice, Device, ModelRunner
from scalellm.services.tokenizer.token_receiver import TokenReceiver
from scalellm.v1 import link_pb2


@pytest.fixture(scope="module")
def model() -> CausalLM:
    return random_model()


def make_engine(model: CausalLM, device: Device, **changes: object) -> Engine:
    config = engine_kit.make_config(
        vocab_size=MODEL.vocab_size,
        eos_token_ids=frozenset(MODEL.eos_token_ids),
        block_size=16,
        max_model_len=96,
        num_blocks=64,
        **changes,
    )
    return Engine(config, make_runner(model, config, device), engine_kit.SimClock())


@torch.inference_mode()
def all_logits(model: CausalLM, tokens: list[int]) -> torch.Tensor:
    """Oracle: the logits [len(tokens), V] of one sequence computed at once in a cache of its own."""
    n = len(tokens)
    num_blocks = -(-n // 16)
    context = ForwardContext(
        positions=torch.arange(n),
        slot_mapping=torch.arange(n),
        decode=None,
        prefill=PrefillRows(
            cu_seqlens_q=torch.tensor([0, n], dtype=torch.int32),
            seq_lens=torch.tensor([n], dtype=torch.int32),
            block_table=torch.arange(num_blocks, dtype=torch.int32).unsqueeze(0),
            max_seqlen_q=n,
        ),
    )
    caches = allocate_kv_caches(MODEL, num_blocks, 16, dtype=torch.float32, device=CPU, ops=model.runtime.ops)
    return model.compute_logits(model.forward(torch.tensor(tokens), context, caches))


def generate(model: CausalLM, request: EngineRequest, index: int = 0) -> list[int]:
    """Oracle: one sample, every token from scratch, one row at a time, penalties written out."""
    params = request.sampling
    tokens = list(request.prompt_token_ids)
    output: list[int] = []
    stops = params.stop_token_ids | (set() if params.ignore_eos else set(MODEL.eos_token_ids))
    while len(output) < (params.max_tokens or 0):
        row = all_logits(model, tokens)[-1].clone()
        for token_id, bias in params.logit_bias.items():
            row[token_id] += bias
        for token_id in set(tokens):
            penalty = params.repetition_penalty
            row[token_id] = row[token_id] / penalty if row[token_id] > 0 else row[token_id] * penalty
            count = output.count(token_id)
            row[token_id] -= params.frequency_penalty * count + params.presence_penalty * (count > 0)
        if len(output) < params.min_tokens:
            row[sorted(stops)] = float("-inf")
        drawn = kernels.sample(
            row.unsqueeze(0),
            torch.tensor([params.temperature]),
            torch.tensor([params.top_k]),
            torch.tensor([params.top_p]),
            torch.tensor([params.min_p]),
            torch.tensor([kernels.sample_seed(params.seed or 0, index)]),
            torch.tensor([len(tokens)]),
        )
        token = int(drawn.token_ids)
        output.append(token)
        tokens.append(token)
        if token in stops:
            break
    return output


Oracle = Callable[..., list[int]]


@pytest.fixture(scope="module")
def oracle(model: CausalLM) -> Oracle:
    """`generate`, which is called once for each request: what a request gets depends on no device and no setting."""
    known: dict[str, list[int]] = {}

    def ask(request: EngineRequest, index: int = 0) -> list[int]:
        key = repr((request.prompt_token_ids, request.sampling, index))
        if key not in known:
            known[key] = generate(model, request, index)
        return known[key]

    return ask


def requests(count: int, **common: object) -> list[EngineRequest]:
    rng = random.Random(3)
    shared = [rng.randrange(97) for _ in range(40)]
    built = []
    for handle in range(count):
        prompt = shared[: rng.choice((0, 16, 37))] + [rng.randrange(97) for _ in range(rng.randint(1, 20))]
        built.append(engine_kit.make_request(handle, prompt, seed=handle, max_tokens=rng.randint(6, 20), **common))
    return built


GREEDY = {"temperature": 0.0}
SAMPLED = {"temperature": 0.9, "top_p": 0.95, "top_k": 30, "min_p": 0.01}
SHAPED = SAMPLED | {
    "presence_penalty": 0.7,
    "frequency_penalty": 0.3,
    "repetition_penalty": 1.3,
    "logit_bias": {5: 4.0, 2: 6.0, 11: -100.0},
    "stop_token_ids": frozenset({5}),
    "min_tokens": 6,
}


@pytest.mark.parametrize("params", [GREEDY, SAMPLED, SHAPED], ids=["greedy", "sampled", "shaped"])
@pytest.mark.parametrize(
    "setting",
    [
        {"max_num_seqs": 1},
        {"max_num_seqs": 8},
        {"max_num_seqs": 8, "max_num_batched_tokens": 11},
        {"max_num_seqs": 8, "enable_prefix_cache": False},
    ],
    ids=["alone", "batched", "chunked", "no-prefix-cache"],
)
def test_tokens_equal_recomputation(
    model: CausalLM, oracle: Oracle, device: Device, params: dict[str, object], setting: dict[str, int]
) -> None:
    engine = make_engine(model, device, **setting)
    batch = requests(6, **params)
    for request in batch:
        engine.add(request)
    collector = engine_kit.run(engine)
    for request in batch:
        assert collector.tokens[request.key, 0] == oracle(request)


def test_samples_that_fork_equal_recomputation_and_differ(model: CausalLM, oracle: Oracle, device: Device) -> None:
    engine = make_engine(model, device)
    for length in (15, 16, 17):
        request = engine_kit.make_request(length, list(range(length)), n=3, max_tokens=12, ignore_eos=True, **SAMPLED)
        engine.add(request)
        collector = engine_kit.run(engine)
        outputs = [collector.tokens[request.key, index] for index in range(3)]
        assert outputs == [oracle(request, index) for index in range(3)]
        assert len({tuple(output) for output in outputs}) == 3


@pytest.mark.parametrize("params", [GREEDY, SHAPED], ids=["greedy", "shaped"])
def test_preemption_does_not_show(model: CausalLM, oracle: Oracle, device: Device, params: dict[str, object]) -> None:
    config = engine_kit.make_config(
        vocab_size=97, eos_token_ids=frozenset({2}), block_size=16, max_model_len=96, num_blocks=6
    )
    engine = Engine(config, make_runner(model, config, device), engine_kit.SimClock())
    batch = [
        engine_kit.make_request(
            i, [i] * 10, seed=i, ignore_eos=True, **(params | {"max_tokens": 50, "stop_token_ids": frozenset()})
        )
        for i in range(3)
    ]
    for request in batch:
        engine.add(request)
    collector = engine_kit.run(engine)
    assert engine.stats().preemptions > 0
    for request in batch:
        assert collector.tokens[request.key, 0] == oracle(request)


def test_logprobs_are_those_of_the_raw_logits(model: CausalLM, device: Device) -> None:
    engine = make_engine(model, device, max_num_batched_tokens=16)
    prompt = [(7 * i) % 97 for i in range(37)]
    plain = engine_kit.make_request(0, prompt, max_tokens=6, logprobs=3, prompt_logprobs=2, ignore_eos=True, **GREEDY)
    beside = engine_kit.make_request(
        1, prompt, max_tokens=6, logprobs=0, ignore_eos=True, **(SHAPED | {"min_tokens": 0})
    )
    tokens, prompt_parts = {plain.key: [], beside.key: []}, []
    engine.add(plain)
    engine.add(beside)
    while engine.has_unfinished():
        result = engine.step()
        prompt_parts += result.prompt_logprobs
        for output in result.tokens:
            tokens[output.key].append(output)

    for request in (plain, beside):
        output_ids = [output.token_ids[0] for output in tokens[request.key]]
        expected = all_logits(model, prompt + output_ids).log_softmax(-1)[len(prompt) - 1 : -1]
        for output, row in zip(tokens[request.key], expected, strict=True):
            assert output.logprobs == pytest.approx([float(row[output.token_ids[0]])], abs=1e-4)
            assert output.top_logprobs is not None
            best = row.topk(3 if request is plain else 0)
            assert [t for t, _ in output.top_logprobs[0]] == best.indices.tolist()
            assert [value for _, value in output.top_logprobs[0]] == pytest.approx(best.values.tolist(), abs=1e-4)

    rows = all_logits(model, prompt).log_softmax(-1)
    values = [value for part in prompt_parts for value in part.logprobs]
    tops = [top for part in prompt_parts for top in part.top_logprobs]
    assert len(prompt_parts) > 2
    assert (values[0], tops[0]) == (0.0, [])
    assert values[1:] == pytest.approx([float(rows[p, prompt[p + 1]]) for p in range(36)], abs=1e-4)
    assert [[t for t, _ in top] for top in tops[1:]] == rows[:-1].topk(2).indices.tolist()


def test_alternatives_stay_with_their_tokens_however_a_prompt_is_divided(model: CausalLM, device: Device) -> None:
    engine = make_engine(model, device, max_num_batched_tokens=16)
    link, receiver = (
        EngineLink(0, engine),
        TokenReceiver(1, num_prompt_logprobs=37),
    )
    prompt = [(7 * i) % 97 for i in range(37)]
    engine.add(engine_kit.make_request(0, prompt, max_tokens=1, prompt_logprobs=2, ignore_eos=True, **GREEDY))
    num_pieces = 0
    while engine.has_unfinished():
        frame = link_pb2.ServerFrame.FromString(b"".join(link.step_frames(engine.step().links[0], draining=False)))
        for entry in frame.step.prompt_logprobs:
            receiver.on_prompt_logprobs(entry)
            num_pieces += 1
    assert num_pieces > 2
    ((_, values),) = receiver.take_prompt_logprobs()
    best = all_logits(model, prompt).log_softmax(-1)[:-1].topk(2)
    assert values.num_top == 2
    assert list(values.top_token_ids) == [0, 0, *best.indices.flatten().tolist()]
    assert list(values.top_logprobs) == pytest.approx([0, 0, *best.values.flatten().tolist()], abs=1e-4)


def broken_at(model: CausalLM, bad_row: int, name: str = "model.embed_tokens.weight") -> CausalLM:
    """The model, but a row of a weight is not a number: a token, or a number of all values."""
    broken = CausalLM(MODEL, ModelRuntime())
    for slot, source in zip(broken.weight_slots(), model.weight_slots(), strict=True):
        slot.dest.copy_(source.dest)
        if slot.name == name:
            slot.dest[bad_row] = float("nan")
    return broken


@pytest.mark.parametrize(
    ("name", "row"),
    [("model.embed_tokens.weight", 50), (f"model.layers.{MODEL.num_layers - 1}.self_attn.v_proj.weight", 0)],
)
def test_values_that_are_not_finite_are_noticed_in_a_chunk_of_which_no_token_is_drawn(
    model: CausalLM, device: Device, name: str, row: int
) -> None:
    """Else blocks with them would be shared with other requests."""
    engine = make_engine(broken_at(model, row, name), device, max_num_batched_tokens=32)
    poison = engine_kit.make_request(0, [4] * 9 + [50] + [5] * 80, max_tokens=4, **GREEDY)
    engine.add(poison)
    num_steps = 0
    finished = []
    while not finished:
        finished = engine.step().finished
        num_steps += 1
    assert [finish.status for finish in finished] == [RequestStatus.INTERNAL]
    assert num_steps <= 1 + device.overlaps


def test_a_sequence_with_non_finite_values_fails_alone(model: CausalLM, oracle: Oracle, device: Device) -> None:
    sound = engine_kit.make_request(1, [4, 5, 6], max_tokens=8, **GREEDY)
    expected = oracle(sound)
    bad_token = next(token for token in range(10, 97) if token not in expected)
    engine = make_engine(broken_at(model, bad_token), device)
    poison = engine_kit.make_request(0, [4, bad_token, 5], max_tokens=8, n=2, **GREEDY)
    engine.add(poison)
    engine.add(sound)
    collector = engine_kit.run(engine)
    assert collector.finished[poison.key].status is RequestStatus.INTERNAL
    assert collector.finished[sound.key].status is RequestStatus.OK
    assert collector.tokens[sound.key, 0] == expected
    assert not collector.tokens[poison.key, 0]


def test_rows_are_updated_not_rebuilt(model: CausalLM) -> None:
    config: EngineConfig = engine_kit.make_config(
        vocab_size=97, eos_token_ids=frozenset({2}), block_size=16, max_model_len=96, num_blocks=24
    )
    sent = 0

    class CountingRunner(ModelRunner):
        def launch(self, batch):
            nonlocal sent
            sent += sum(len(s.seq.block_table) - s.first_new_block for s in batch.sequences)
            return super().launch(batch)

    caches = allocate_kv_caches(MODEL, 24, 16, dtype=torch.float32, device=CPU, ops=model.runtime.ops)
    engine = Engine(config, CountingRunner(model, caches, config, CpuDevice()), engine_kit.SimClock())
    for handle in range(4):
        engine.add(engine_kit.make_request(handle, [handle] * 20, max_tokens=60, ignore_eos=True))
    engine_kit.run(engine)
    assert sent == 4 * 5  # the blocks of 79 tokens each, once
