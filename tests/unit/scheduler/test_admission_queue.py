"""AdmissionQueue against a plain list that is sorted anew for each question."""

from dataclasses import dataclass

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from services.common.errors import StatusError
from services.scheduler.admission_queue import AdmissionQueue


@dataclass(eq=False)
class Entry:
    priority: int
    arrival: int
    num_prompt_tokens: int
    tenant: bytes = b""
    turn: int = 0


class QueueMachine(RuleBasedStateMachine):
    """Random admissions, removals and returns."""

    max_requests, max_tokens = 8, 100

    def __init__(self):
        super().__init__()
        self.queue = AdmissionQueue(self.max_requests, self.max_tokens)
        self.waiting: list[Entry] = []
        self.dispatched: list[Entry] = []
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
        hopeless = remaining is not None and rate is not None and ahead / rate > remaining
        if full or hopeless:
            with pytest.raises(StatusError) as refusal:
                self.queue.admit(entry, remaining, rate)
            code = grpc.StatusCode.RESOURCE_EXHAUSTED if full else grpc.StatusCode.DEADLINE_EXCEEDED
            assert refusal.value.code is code
            assert entry not in self.queue
        else:
            self.queue.admit(entry, remaining, rate)
            self.waiting.append(entry)

    def expected_ahead(self, entry):
        own = self.tokens(entry.priority, entry.tenant)
        share = own + entry.num_prompt_tokens
        others = {b"a", b"b", b"c"} - {entry.tenant}
        urgent = sum(other.num_prompt_tokens for other in self.waiting if other.priority < entry.priority)
        return urgent + own + sum(min(share, self.tokens(entry.priority, other)) for other in others)

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

    @invariant()
    def matches_the_model(self):
        in_order = self.queue.in_order()
        assert in_order == sorted(self.waiting, key=lambda entry: (entry.priority, entry.turn, entry.arrival))
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
TestQueueMachine.settings = settings(max_examples=50)


def served(queue: AdmissionQueue[Entry], count: int) -> list[tuple[bytes, int]]:
    """Tenants and arrivals in the order in which they leave."""
    left = []
    for _ in range(count):
        entry = queue.in_order()[0]
        queue.remove(entry)
        left.append((entry.tenant, entry.arrival))
    return left


def test_a_burst_of_one_tenant_does_not_delay_another():
    queue = AdmissionQueue(1000, 10**6)
    for arrival in range(1, 101):
        queue.admit(Entry(0, arrival, 100, b"burst"), None, None)
    assert served(queue, 10) == [(b"burst", arrival) for arrival in range(1, 11)]
    late = Entry(0, 200, 100, b"late")
    assert queue.tokens_ahead(late) == 100  # one turn of the other's, and not 90
    for arrival in (200, 201):
        queue.admit(Entry(0, arrival, 100, b"late"), None, None)
    assert served(queue, 5) == [(b"burst", 11), (b"late", 200), (b"burst", 12), (b"late", 201), (b"burst", 13)]
    queue.admit(Entry(-1, 300, 100, b"burst"), None, None)
    assert served(queue, 1) == [(b"burst", 300)], "a priority goes before any turn"
    assert served(queue, len(queue)) == [(b"burst", arrival) for arrival in range(14, 101)]


def test_turns_are_shares_of_tokens():
    queue = AdmissionQueue(1000, 10**6)
    for arrival in range(1, 81):
        queue.admit(Entry(0, arrival, 744 if arrival % 2 else 244, b"long" if arrival % 2 else b"short"), None, None)
    tenants = [tenant for tenant, _ in served(queue, 30)]
    assert (tenants.count(b"long"), tenants.count(b"short")) == (10, 20)


def test_what_comes_back_goes_before_what_is_new():
    queue = AdmissionQueue(1000, 10**6)
    first, new = Entry(0, 1, 100, b"a"), Entry(0, 2, 100, b"b")
    queue.admit(first, None, None)
    queue.remove(first)
    queue.admit(new, None, None)
    queue.put_back(first)
    assert served(queue, 2) == [(b"a", 1), (b"b", 2)]


def test_one_request_larger_than_the_limit_may_wait_alone():
    queue = AdmissionQueue(4, 10)
    queue.admit(Entry(0, 1, 50), None, None)
    with pytest.raises(StatusError, match="50 prompt tokens wait, and 1 more exceed the limit of 10") as refusal:
        queue.admit(Entry(0, 2, 1), None, None)
    assert refusal.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_no_prediction_before_a_measurement():
    queue = AdmissionQueue(4, 1000)
    queue.admit(Entry(0, 1, 500), 0.001, None)
    queue.admit(Entry(0, 2, 1), 0.001, None)
    with pytest.raises(StatusError, match="501 prompt tokens wait before"):
        queue.admit(Entry(0, 3, 1), 0.001, 1000.0)
    queue.admit(Entry(-1, 4, 1), 0.001, 1000.0)


def test_a_deadline_in_the_past_is_refused():
    with pytest.raises(StatusError) as refusal:
        AdmissionQueue(4, 10).admit(Entry(0, 1, 5), 0.0, None)
    assert refusal.value.code is grpc.StatusCode.DEADLINE_EXCEEDED


@given(rate=st.floats(1, 1e6), queued=st.integers(1, 1000))
def test_retry_after_is_the_time_in_which_room_appears(rate, queued):
    queue = AdmissionQueue(100, queued)
    queue.admit(Entry(0, 1, queued), None, rate)
    with pytest.raises(StatusError) as refusal:
        queue.admit(Entry(0, 2, 10), None, rate)
    assert refusal.value.retry_after == pytest.approx(min(max(max(10, queued / 10) / rate, 0.1), 60.0))
