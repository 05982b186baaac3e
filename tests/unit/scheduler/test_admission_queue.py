"""AdmissionQueue against a plain list that is sorted anew for each question."""

from collections import Counter
from dataclasses import dataclass, field

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from scalellm.services.common.errors import StatusError
from scalellm.services.scheduler.admission_queue import AdmissionQueue, QueueFullError


@dataclass(eq=False)
class Entry:
    priority: int
    arrival: int
    num_prompt_tokens: int
    tenant: bytes = b""


@dataclass
class Accounts:
    """Accounts of tenants with equal weights and service, except those named here."""

    weights: dict[bytes, float] = field(default_factory=dict)
    services: dict[bytes, float] = field(default_factory=dict)

    def served(self, tenant: bytes) -> float:
        return self.services.get(tenant, 0.0)

    def weight(self, tenant: bytes) -> float:
        return self.weights.get(tenant, 1.0)


def make_queue(max_requests: int, max_tokens: int, **weights: float) -> AdmissionQueue[Entry]:
    accounts = Accounts({tenant.encode(): weight for tenant, weight in weights.items()})
    return AdmissionQueue(max_requests, max_tokens, accounts)


SIZES = (lambda entry: 1, lambda entry: entry.num_prompt_tokens)


class QueueMachine(RuleBasedStateMachine):
    """Random admissions, removals and returns."""

    max_requests, max_tokens = 8, 100

    def __init__(self):
        super().__init__()
        self.served = dict.fromkeys((b"a", b"b", b"c"), 0.0)
        self.weights = {b"a": 1.0, b"b": 2.0, b"c": 0.5}
        self.queue = AdmissionQueue(self.max_requests, self.max_tokens, Accounts(self.weights, self.served))
        self.waiting: list[Entry] = []
        self.dispatched: list[Entry] = []
        self.returned: list[Entry] = []
        self.arrivals = 0

    @rule(
        priority=st.integers(-2, 2),
        tenant=st.sampled_from((b"a", b"b", b"c")),
        tokens=st.integers(1, 120),
        remaining=st.none() | st.floats(0.001, 20),
        rate=st.none() | st.floats(0.5, 1000),
    )
    def admit(self, priority, tenant, tokens, remaining, rate):
        self.arrivals += 1
        entry = Entry(priority, self.arrivals, tokens, tenant)
        queued = sum(other.num_prompt_tokens for other in self.waiting)
        ahead = self.expected_ahead(entry)
        full = len(self.waiting) >= self.max_requests or bool(self.waiting and queued + tokens > self.max_tokens)
        dropped = self.expected_drops(entry) if full else []
        full = dropped is None
        hopeless = remaining is not None and rate is not None and ahead / rate > remaining
        if full or hopeless:
            with pytest.raises(StatusError) as refusal:
                self.queue.admit(entry, remaining, rate)
            code = grpc.StatusCode.RESOURCE_EXHAUSTED if full else grpc.StatusCode.DEADLINE_EXCEEDED
            assert refusal.value.code is code
            assert entry not in self.queue
            if isinstance(refusal.value, QueueFullError):
                assert self.expected_drops(Entry(-100, self.arrivals, 1, tenant)) is None
                assert 0 < refusal.value.lasts <= 0.25
            elif code is grpc.StatusCode.RESOURCE_EXHAUSTED:
                assert "prompt tokens wait" in refusal.value.message
        else:
            left = self.queue.admit(entry, remaining, rate)
            assert len(left) == len(dropped)
            assert set(left) == set(dropped)
            self.waiting = [other for other in self.waiting if other not in dropped] + [entry]

    def expected_drops(self, entry):
        """By the rule, one at a time: of the tenants that may give, the one that holds most drops its last request."""
        waiting, dropped = list(self.waiting), []

        def held(tenant, size, more=0):
            return (more + sum(size(other) for other in waiting if other.tenant == tenant)) / self.weights[tenant]

        limits = ((SIZES[0], self.max_requests), (SIZES[1], self.max_tokens))
        for size, limit in limits:
            while sum(map(size, waiting)) + size(entry) > limit:
                lasts = {}
                for other in sorted(waiting, key=lambda other: (other.priority, other.arrival)):
                    if other not in self.returned:
                        lasts[other.tenant] = other
                lasts.pop(entry.tenant, None)
                share = held(entry.tenant, size, size(entry))
                giving = [last for tenant, last in lasts.items() if held(tenant, size, -size(last)) >= share]
                if not giving:
                    return None
                giver = min(giving, key=lambda last: (-held(last.tenant, size), last.tenant))
                waiting.remove(giver)
                dropped.append(giver)
        return dropped

    def expected_ahead(self, entry):
        own = self.tokens(entry.priority, entry.tenant)
        share = (own + entry.num_prompt_tokens) / self.weights[entry.tenant]
        others = {b"a", b"b", b"c"} - {entry.tenant}
        urgent = sum(other.num_prompt_tokens for other in self.waiting if other.priority < entry.priority)
        return (
            urgent
            + own
            + sum(min(int(share * self.weights[other]), self.tokens(entry.priority, other)) for other in others)
        )

    def tokens(self, priority, tenant):
        wanted = (priority, tenant)
        return sum(other.num_prompt_tokens for other in self.waiting if (other.priority, other.tenant) == wanted)

    @precondition(lambda self: self.waiting)
    @rule(choice=st.randoms(use_true_random=False))
    def remove(self, choice):
        entry = choice.choice(self.waiting)
        self.queue.remove(entry)
        self.waiting.remove(entry)
        self.dispatched.append(entry)
        with pytest.raises(KeyError):
            self.queue.remove(entry)

    @precondition(lambda self: self.dispatched)
    @rule(choice=st.randoms(use_true_random=False))
    def put_back(self, choice):
        entry = choice.choice(self.dispatched)
        self.dispatched.remove(entry)
        self.queue.put_back(entry)
        self.waiting.append(entry)
        self.returned.append(entry)

    @rule(tenant=st.sampled_from((b"a", b"b", b"c")), cost=st.integers(1, 100))
    def serve(self, tenant, cost):
        self.served[tenant] += cost

    def rank(self, entry):
        return entry.priority, self.served[entry.tenant], entry.arrival

    @rule(cost=st.integers(1, 50))
    def drain(self, cost):
        """Whoever is served in between goes on at its new place."""
        served = dict(self.served)
        for entry in self.queue.in_order():
            assert entry == min(self.waiting, key=self.rank)
            self.queue.remove(entry)
            self.waiting.remove(entry)
            self.served[entry.tenant] += cost
        assert not self.waiting
        self.served.update(served)

    @invariant()
    def matches_the_model(self):
        in_order = list(self.queue.in_order())
        assert in_order == sorted(self.waiting, key=self.rank)
        firsts = {entry.tenant: entry for entry in reversed(in_order)}
        assert self.queue.heads() == sorted(firsts.values(), key=self.rank)
        for tenant in (b"a", b"b", b"c"):
            own = [(entry.priority, entry.arrival) for entry in in_order if entry.tenant == tenant]
            assert own == sorted(own)
        assert len(self.queue) == len(self.waiting)
        assert self.queue.num_tokens == sum(entry.num_prompt_tokens for entry in self.waiting)
        for priority in range(-3, 4):
            entry = Entry(priority, 0, 30, b"b")
            assert self.queue.tokens_ahead(entry) == self.expected_ahead(entry)
        assert all(entry in self.queue for entry in self.waiting)
        assert not any(entry in self.queue for entry in self.dispatched)


TestQueueMachine = QueueMachine.TestCase
TestQueueMachine.settings = settings(max_examples=60)


def tenants_of(queue: AdmissionQueue[Entry]) -> dict[bytes, int]:
    return dict(Counter(entry.tenant for entry in queue.in_order()))


def test_a_full_queue_is_shared_by_its_tenants():
    queue = make_queue(1000, 10**6)
    for arrival in range(1000):
        assert queue.admit(Entry(0, arrival, 10, b"burst"), None, None) == []
    with pytest.raises(StatusError, match="1000 requests wait"):
        queue.admit(Entry(0, 1000, 10, b"burst"), None, None)
    for number in range(500):
        (dropped,) = queue.admit(Entry(0, 2000 + number, 10, b"late"), None, None)
        assert (dropped.tenant, dropped.arrival) == (b"burst", 999 - number), "the newest goes"
    for tenant in (b"burst", b"late"):  # each has its share: from here on nobody drops the other's
        with pytest.raises(StatusError) as refusal:
            queue.admit(Entry(0, 3000, 10, tenant), None, None)
        assert refusal.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    for number in range(10):
        assert len(queue.admit(Entry(0, 4000 + number, 10, b"third"), None, None)) == 1
    assert tenants_of(queue) == {b"burst": 495, b"late": 495, b"third": 10}


def test_a_full_queue_is_shared_by_weight():
    queue = make_queue(1000, 10**6, heavy=3.0)
    for arrival in range(1000):
        queue.admit(Entry(0, arrival, 10, b"light"), None, None)
    for number in range(750):
        assert len(queue.admit(Entry(0, 2000 + number, 10, b"heavy"), None, None)) == 1
    for tenant in (b"light", b"heavy"):
        with pytest.raises(StatusError):
            queue.admit(Entry(0, 3000, 10, tenant), None, None)
    assert tenants_of(queue) == {b"light": 250, b"heavy": 750}


def test_tokens_are_shared_as_well():
    queue = make_queue(1000, 1000)
    for arrival in range(10):
        queue.admit(Entry(0, arrival, 100, b"burst"), None, None)
    dropped = queue.admit(Entry(0, 20, 250, b"late"), None, None)
    assert [entry.arrival for entry in dropped] == [9, 8, 7]
    with pytest.raises(StatusError, match="950 prompt tokens wait, and 500 more exceed"):
        queue.admit(Entry(0, 21, 500, b"late"), None, None)
    assert tenants_of(queue) == {b"burst": 7, b"late": 1}, "a refusal drops nothing"


def test_a_full_queue_says_for_how_long_and_is_not_dry_then():
    queue = make_queue(10, 10**6)
    for arrival in range(10):
        queue.admit(Entry(0, arrival, 100, b"a"), None, None)
    for rate, lasts in ((None, 0.25), (100.0, 0.25), (10_000.0, 0.01)):
        with pytest.raises(QueueFullError) as refusal:
            queue.admit(Entry(0, 10, 1, b"a"), None, rate)
        assert refusal.value.lasts == pytest.approx(lasts)
        assert rate is None or rate * lasts <= queue.num_tokens / 10


def test_a_request_that_is_too_large_for_what_is_left_says_nothing_of_others():
    queue = make_queue(2, 1000)
    for arrival in (0, 1):
        queue.admit(Entry(0, arrival, 400, b"burst"), None, None)
    with pytest.raises(StatusError, match="900 more exceed") as refusal:
        queue.admit(Entry(0, 2, 900, b"late"), None, None)
    assert not isinstance(refusal.value, QueueFullError)
    assert len(queue.admit(Entry(0, 3, 100, b"late"), None, None)) == 1


def test_what_came_back_from_an_executor_is_not_dropped():
    queue = make_queue(3, 1000)
    running = [Entry(0, arrival, 10, b"burst") for arrival in range(3)]
    for entry in running:
        queue.admit(entry, None, None)
        queue.remove(entry)
    for entry in running:
        queue.put_back(entry)
    with pytest.raises(StatusError, match="3 requests wait"):
        queue.admit(Entry(0, 3, 10, b"late"), None, None)
    assert list(queue.in_order()) == running


def test_what_another_scheduler_had_admitted_is_taken_although_the_queue_is_full():
    queue = make_queue(2, 10**6)
    for arrival in (1, 2):
        queue.admit(Entry(0, arrival, 100, b"a"), None, None)
    queue.put_back(Entry(0, -3, 100, b"b"))
    assert len(queue) == 3
    with pytest.raises(StatusError, match="the admission queue is full"):
        queue.admit(Entry(0, 4, 100, b"a"), None, None)
    assert [entry.arrival for entry in queue.in_order()] == [-3, 1, 2]


def test_one_request_larger_than_the_limit_may_wait_alone():
    queue = make_queue(4, 10)
    queue.admit(Entry(0, 1, 50), None, None)
    with pytest.raises(StatusError, match="50 prompt tokens wait, and 1 more exceed the limit of 10") as refusal:
        queue.admit(Entry(0, 2, 1), None, None)
    assert refusal.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_no_prediction_before_a_measurement():
    queue = make_queue(4, 1000)
    queue.admit(Entry(0, 1, 500), 0.001, None)
    queue.admit(Entry(0, 2, 1), 0.001, None)
    with pytest.raises(StatusError, match="501 prompt tokens wait before"):
        queue.admit(Entry(0, 3, 1), 0.001, 1000.0)
    queue.admit(Entry(-1, 4, 1), 0.001, 1000.0)


def test_a_deadline_in_the_past_is_refused():
    with pytest.raises(StatusError) as refusal:
        make_queue(4, 10).admit(Entry(0, 1, 5), 0.0, None)
    assert refusal.value.code is grpc.StatusCode.DEADLINE_EXCEEDED


@given(rate=st.floats(1, 1e6), queued=st.integers(1, 1000))
def test_retry_after_is_the_time_in_which_room_appears(rate, queued):
    queue = make_queue(100, queued)
    queue.admit(Entry(0, 1, queued), None, rate)
    with pytest.raises(StatusError) as refusal:
        queue.admit(Entry(0, 2, 10), None, rate)
    assert refusal.value.retry_after == pytest.approx(min(max(max(10, queued / 10) / rate, 0.1), 60.0))
