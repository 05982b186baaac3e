"""Quarantine: which of many requests ends engines."""

from types import SimpleNamespace

import pytest

from scalellm.services.common.errors import StatusError
from scalellm.services.scheduler.quarantine import Quarantine
from scalellm.services.scheduler.request import Request
from scalellm.v1 import common_pb2, link_pb2


def make_request(number: int = 1, **sampling: object) -> Request:
    submit = link_pb2.Submit(
        handle=number, request_id=f"r{number}", token_ids=[7, number], sampling=common_pb2.SamplingParams(**sampling)
    )
    return Request(SimpleNamespace(), submit, number, 0.0)


class Fleet:
    """Engines that end as soon as the guilty one is on them, however far the others came."""

    def __init__(self, quarantine: Quarantine, requests: list[Request], guilty: Request) -> None:
        self.quarantine, self.requests, self.guilty = quarantine, requests, guilty
        self.num_engines = 0

    def run(self) -> dict[Request, str]:
        """Send off all that may go, let the engine end if the guilty one is there, else give everybody a token."""
        sent = []
        for request in self.requests:
            if request.executor.replica is None and self.quarantine.may_run(request):
                request.start(SimpleNamespace(), 1, 0.0)
                request.make_submit(0.0, 1)
                self.quarantine.on_dispatch(request)
                sent.append(request)
        if self.guilty not in sent:
            for request in sent:
                request.client.emitted[0].append(5)
            return {}
        self.num_engines += 1
        found = self.quarantine.on_engine_lost(sent, f"engine {self.num_engines}", 0.0)
        for request in sent:
            request.requeue(lost=True)
        return found


@pytest.mark.parametrize("place", [0, 3, 7])
def test_the_guilty_one_is_found_among_its_neighbours(place):
    requests = [make_request(number) for number in range(8)]
    fleet = Fleet(Quarantine(2), requests, requests[place])
    found: dict[Request, str] = {}
    for _ in range(20):
        found |= fleet.run()
        fleet.requests = [request for request in fleet.requests if request not in found]
    assert list(found) == [requests[place]]
    assert f"'r{place}'" in found[requests[place]]
    assert fleet.num_engines == 3
    assert all(request.client.progress.num_tokens for request in requests if request is not requests[place])


def test_one_that_is_alone_ends_two_engines():
    request = make_request()
    fleet = Fleet(Quarantine(2), [request], request)
    assert not fleet.run()
    assert list(fleet.run()) == [request]


def test_one_that_goes_on_in_between_is_innocent_for_long():
    quarantine, request = Quarantine(2), make_request()
    for number in range(1, 8):
        request.start(SimpleNamespace(), 1, 0.0)
        request.make_submit(0.0, 1)
        request.client.emitted[0].append(5)
        assert not quarantine.on_engine_lost([request], f"engine {number}", 0.0)
        request.requeue(lost=True)
    request.client.emitted[0].append(5)
    assert list(quarantine.on_engine_lost([request], "engine 8", 0.0)) == [request]


def test_the_same_engine_is_not_counted_twice():
    quarantine, request = Quarantine(2), make_request()
    for _ in range(5):
        assert not quarantine.on_engine_lost([request], "hangs", 0.0)


def test_what_is_known_is_refused_for_some_minutes_whatever_its_seed():
    quarantine, request = Quarantine(1), make_request(1, seed=1, temperature=1.0)
    (message,) = quarantine.on_engine_lost([request], "engine", 0.0).values()
    again = make_request(1, seed=2, temperature=1.0)
    with pytest.raises(StatusError, match="ended engines when it ran before") as refusal:
        quarantine.check(again.submit, 599.0)
    assert message[message.index("(SHA-256") :] in refusal.value.message
    quarantine.check(make_request(2, seed=1, temperature=1.0).submit, 1.0)
    quarantine.check(make_request(1, seed=1, temperature=0.5).submit, 1.0)
    quarantine.check(again.submit, 600.0)
    assert not len(quarantine)


def test_it_remembers_a_bounded_number():
    quarantine = Quarantine(1)
    for number in range(3000):
        quarantine.on_engine_lost([make_request(number)], "engine", 0.0)
    assert len(quarantine) == 1024


def test_the_same_request_is_known_though_its_prompt_was_scored_and_another_grammar_is_another_request():
    quarantine = Quarantine(1)
    guilty = make_request(1, prompt_logprobs=2)
    guilty.client.progress.num_prompt_logprobs = 2  # they came before the engine ended, and are not asked for again
    guilty.start(SimpleNamespace(), 1, 0.0)
    guilty.make_submit(0.0, 1)
    assert quarantine.on_engine_lost([guilty], "engine", 0.0)
    again = make_request(1, prompt_logprobs=2)
    with pytest.raises(StatusError, match="ended engines"):
        quarantine.check(again.submit, 0.0)
    again.submit.grammar = "start: /a/"
    quarantine.check(again.submit, 0.0)
