"""Router: whatever the candidates look like, filters hold and affinity is kept as promised."""

from dataclasses import dataclass, replace
from itertools import takewhile

from hypothesis import given
from hypothesis import strategies as st

from scalellm.services.scheduler.prefix_index import BLOCK_TOKENS, PrefixIndex, block_hashes
from scalellm.services.scheduler.router import Router, Verdict


@dataclass(frozen=True)
class Replica:
    address: str = "a:1"
    instance_id: str = "i"
    has_credit: bool = True
    is_suspect: bool = False
    max_model_len: int = 4096
    block_size: int = 16
    free_blocks: int = 1000
    pending_prefill_tokens: int = 0
    num_running: int = 0
    takes_grammars: bool = True
    tensor_parallel: int = 1


def replicas(max_size=6, **fields):
    field = {
        "has_credit": st.booleans(),
        "is_suspect": st.booleans(),
        "max_model_len": st.sampled_from([64, 4096]),
        "free_blocks": st.integers(0, 200),
        "pending_prefill_tokens": st.integers(0, 5000),
        "num_running": st.integers(0, 64),
    } | fields
    return st.lists(st.builds(Replica, **field), min_size=1, max_size=max_size).map(
        lambda found: [replace(r, address=f"host:{i}", instance_id=f"i{i}") for i, r in enumerate(found)]
    )


def route(candidates, tokens=100, output=1, hashes=(), routed=(), **options):
    """Return the instance that a request goes to; `routed` are earlier prompts as pairs of hashes and an instance."""
    prefixes = PrefixIndex()
    for prompt, instance_id in routed:
        prefixes.record(prompt, prefixes.join(instance_id))
    router = Router(prefixes)
    for candidate in candidates:
        router.join(candidate)
    return router.route(num_prompt_tokens=tokens, max_len=tokens + output, hashes=hashes, **options)


def common(hashes, others):
    """Tokens of the longest common prefix with any of the others."""
    lengths = [sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(hashes, o, strict=False))) for o in others]
    return BLOCK_TOKENS * max(lengths, default=0)


def least(candidates, tokens, hashes, routed):
    """The rule: the least of what is to be computed, by asking each executor for each block of the prompt."""

    def cost(candidate):
        cached = common(hashes, [prompt for prompt, instance_id in routed if instance_id == candidate.instance_id])
        to_compute = tokens - cached
        missing = max(0, to_compute - candidate.free_blocks * candidate.block_size)
        load = candidate.pending_prefill_tokens + 16 * candidate.num_running
        return candidate.is_suspect, to_compute + missing + load, candidate.num_running, candidate.address

    return min(candidates, key=cost)


@given(
    candidates=replicas(),
    tokens=st.integers(1, 5000),
    output=st.integers(1, 5000),
    session=st.none() | st.integers(0, 6).map("host:{}".format),
    may_wait=st.booleans(),
    refused_by=st.sets(st.integers(0, 5).map("i{}".format)),
)
def test_filters(candidates, tokens, output, session, may_wait, refused_by):
    choice = route(
        candidates, tokens=tokens, output=output, session_address=session, may_wait=may_wait, refused_by=refused_by
    )
    willing = [c for c in candidates if c.instance_id not in refused_by]
    longest = max((c.max_model_len for c in willing), default=0)
    able = [c for c in willing if tokens + output <= c.max_model_len or c.max_model_len == longest]
    free = [c for c in able if c.has_credit]
    at_home = [c for c in able if c.address == session and not c.is_suspect]
    if not willing:
        assert choice is Verdict.REFUSED_BY_ALL
    elif not free:
        assert choice is Verdict.NO_CREDIT
    elif at_home and not at_home[0].has_credit and may_wait:
        assert choice is Verdict.WAIT_FOR_SESSION
    elif at_home and at_home[0].has_credit:
        assert choice is at_home[0]
    else:
        assert choice in free
        assert not choice.is_suspect or all(c.is_suspect for c in free)


@given(
    candidates=replicas(
        has_credit=st.just(True), is_suspect=st.just(False), max_model_len=st.just(4096), free_blocks=st.just(1000)
    ),
    tokens=st.integers(1, 4000),
)
def test_without_any_cache_the_least_loaded_is_picked(candidates, tokens):
    choice = route(candidates, tokens=tokens)
    assert not any(
        (c.pending_prefill_tokens, c.num_running) < (choice.pending_prefill_tokens, choice.num_running)
        and c.pending_prefill_tokens <= choice.pending_prefill_tokens
        and c.num_running <= choice.num_running
        for c in candidates
    )


@given(st.permutations(range(4)))
def test_the_order_of_candidates_does_not_matter(order):
    candidates = [Replica(f"host:{i}", f"i{i}", num_running=3) for i in order]
    assert route(candidates).address == "host:0"


def test_prefix_affinity_outweighs_a_little_load_and_not_a_lot():
    prompt = list(range(8 * BLOCK_TOKENS))
    hashes = block_hashes(prompt, b"")
    cold = Replica("a:1", "cold")
    options = {"routed": [(hashes, "warm")], "tokens": len(prompt), "hashes": hashes}
    assert route([cold, Replica("b:1", "warm", num_running=8)], **options).instance_id == "warm"
    assert route([cold, Replica("b:1", "warm", num_running=60)], **options).instance_id == "cold"
    assert route([cold, Replica("b:1", "warm", pending_prefill_tokens=4000)], **options).instance_id == "cold"
    assert route([cold, Replica("b:1", "reborn")], **options).instance_id == "cold"


def test_blocks_that_must_be_taken_from_others_count():
    full = Replica("a:1", "full", free_blocks=0)
    roomy = Replica("b:1", "roomy", num_running=4)
    assert route([full, roomy], tokens=200).instance_id == "roomy"


prompt_hashes = st.lists(st.integers(0, 1), max_size=12).map(
    lambda blocks: block_hashes([b for b in blocks for _ in range(BLOCK_TOKENS)], b"")
)
coarse = {
    "pending_prefill_tokens": st.sampled_from([0, 64, 640]),
    "num_running": st.integers(0, 4),
    "free_blocks": st.sampled_from([0, 8, 1000]),
}


@given(
    candidates=replicas(max_size=40, **coarse),
    tail=st.integers(0, 63),
    hashes=prompt_hashes,
    routed=st.lists(st.tuples(prompt_hashes, st.integers(0, 39).map("i{}".format)), max_size=60),
)
def test_the_choice_is_that_of_the_rule(candidates, tail, hashes, routed):
    tokens = len(hashes) * BLOCK_TOKENS + max(tail, not hashes)
    longest = max(candidate.max_model_len for candidate in candidates)
    able = [c for c in candidates if tokens + 1 <= c.max_model_len or c.max_model_len == longest]
    free = [candidate for candidate in able if candidate.has_credit]
    choice = route(candidates, tokens=tokens, hashes=hashes, routed=routed)
    assert choice is (least(free, tokens, hashes, routed) if free else Verdict.NO_CREDIT)


@given(data=st.data())
def test_the_choice_follows_every_change(data):
    states = replicas(max_size=1, **coarse).map(lambda found: found[0])
    router, ready = Router(PrefixIndex()), {}
    for step in range(data.draw(st.integers(1, 30))):
        number = data.draw(st.integers(0, 19))
        address = f"host:{number}"
        if address in ready and data.draw(st.booleans()):
            router.leave(ready.pop(address))
        elif address in ready:
            for name, value in vars(data.draw(states)).items():
                if name not in ("address", "instance_id", "max_model_len"):
                    object.__setattr__(ready[address], name, value)
            router.update(ready[address])
        else:
            ready[address] = replace(data.draw(states), address=address, instance_id=f"i{number} {step}")
            router.join(ready[address])
        free = [candidate for candidate in ready.values() if candidate.has_credit]
        assert router.has_credit() == bool(free)
        choice = router.route(num_prompt_tokens=100, max_len=64, hashes=[])
        assert choice is (least(free, 100, [], []) if free else Verdict.NO_CREDIT)


def test_a_request_leaves_its_pool_only_where_none_of_it_takes_it():
    large = Replica("a:1", "large", tensor_parallel=8, num_running=50)
    small = Replica("b:1", "small")
    assert route([large, small], pool=8) is large
    assert route([large, small], pool=1) is small
    assert route([replace(large, has_credit=False), small], pool=8) is small
    assert route([large, small], pool=4) is small  # whose executors have all left
    assert route([large, small], pool=8, session_address="b:1") is small


def test_an_executor_that_knows_no_grammars_gets_none():
    old, new = Replica("a:1", "old", takes_grammars=False), Replica("b:1", "new", num_running=9)
    assert route([old, new]).instance_id == "old"
    assert route([old, new], needs_grammars=True).instance_id == "new"
    router = Router(PrefixIndex())
    router.join(old)
    assert (router.takes_grammars, router.num_without_grammars) == (False, 1)
    router.join(new)
    assert (router.takes_grammars, router.num_without_grammars) == (True, 1)
    router.leave(old)
    assert (router.takes_grammars, router.num_without_grammars) == (True, 0)
