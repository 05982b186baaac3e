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
        tokens=st.integers(1, 120),
        remaining=st.none() | st.floats(0.001, 20),
        rate=st.none() | st.floats(0.5, 1000),
    )
    def admit(self, priority, tokens, remaining, rate):
        self.arrivals += 1
        entry = Entry(priority, self.arrivals, tokens)
        queued = sum(other.num_prompt_tokens for other in self.waiting)
        ahead = sum(other.num_prompt_tokens for other in self.waiting if other.priority <= priority)
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
        assert self.queue.in_order() == sorted(self.waiting, key=lambda entry: (entry.priority, entry.arrival))
        assert len(self.queue) == len(self.waiting)
        assert self.queue.num_tokens == sum(entry.num_prompt_tokens for entry in self.waiting)
        for priority in range(-3, 4):
            ahead = sum(entry.num_prompt_tokens for entry in self.waiting if entry.priority <= priority)
            assert self.queue.tokens_ahead(priority) == ahead
        assert all(entry in self.queue for entry in self.waiting)
        assert not any(entry in self.queue for entry in self.dispatched)


TestQueueMachine = QueueMachine.TestCase
TestQueueMachine.settings = settings(max_examples=50)


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
