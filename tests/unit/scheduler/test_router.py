"""Router: whatever the candidates look like, filters hold and affinity is kept as promised."""

from dataclasses import dataclass, replace

from hypothesis import given
from hypothesis import strategies as st

from services.scheduler.prefix_index import BLOCK_TOKENS, PrefixIndex, block_hashes
from services.scheduler.router import Router, Verdict


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


def replicas(**fields):
    field = {
        "has_credit": st.booleans(),
        "is_suspect": st.booleans(),
        "max_model_len": st.sampled_from([64, 4096]),
        "free_blocks": st.integers(0, 200),
        "pending_prefill_tokens": st.integers(0, 5000),
        "num_running": st.integers(0, 64),
    } | fields
    return st.lists(st.builds(Replica, **field), min_size=1, max_size=6).map(
        lambda found: [replace(r, address=f"host:{i}", instance_id=f"i{i}") for i, r in enumerate(found)]
    )


def route(candidates, prefixes=None, tokens=100, output=1, hashes=(), **options):
    router = Router(prefixes if prefixes is not None else PrefixIndex())
    return router.route(candidates, num_prompt_tokens=tokens, max_len=tokens + output, hashes=hashes, **options)


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
    prefixes = PrefixIndex()
    prompt = list(range(8 * BLOCK_TOKENS))
    hashes = block_hashes(prompt, b"")
    prefixes.record(hashes, "warm")
    cold = Replica("a:1", "cold")
    options = {"prefixes": prefixes, "tokens": len(prompt), "hashes": hashes}
    assert route([cold, Replica("b:1", "warm", num_running=8)], **options).instance_id == "warm"
    assert route([cold, Replica("b:1", "warm", num_running=60)], **options).instance_id == "cold"
    assert route([cold, Replica("b:1", "warm", pending_prefill_tokens=4000)], **options).instance_id == "cold"
    assert route([cold, Replica("b:1", "reborn")], **options).instance_id == "cold"


def test_blocks_that_must_be_taken_from_others_count():
    full = Replica("a:1", "full", free_blocks=0)
    roomy = Replica("b:1", "roomy", num_running=4)
    assert route([full, roomy], tokens=200).instance_id == "roomy"
