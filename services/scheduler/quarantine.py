"""Quarantine of requests that kill engines: which one is to blame, and its refusal afterwards."""

from __future__ import annotations

import hashlib
import logging
from collections import OrderedDict
from collections.abc import Sequence

import grpc

from scalellm.services.common.errors import StatusError
from scalellm.services.scheduler.request import Request
from scalellm.v1 import common_pb2, link_pb2

_log = logging.getLogger(__name__)

_SECONDS = 600.0
_CAPACITY = 1024
_MOST_IN_ALL = 4
"""Limit of the engines lost under a request in total, as a multiple of the limit of those lost in a row."""


class Quarantine:
    """Finds the request that kills engines among those that ran on them, and refuses it when it is sent again.

    Many requests run on an engine that dies, and nearly all of them are innocent. A request is suspect when
    `max_deaths` engines in a row died under it without a new token in between; a single suspect is guilty. Several
    requests are suspect when they moved from one engine to the next together. They are then dispatched one at a time,
    each only after the one before has produced a token, so that the next death identifies the guilty one.

    Args:
        max_deaths: Engines lost in a row, without a token in between, that make a request suspect.
    """

    def __init__(self, max_deaths: int) -> None:
        self._max_deaths = max_deaths
        self._until: OrderedDict[bytes, float] = OrderedDict()
        self._on_trial: Request | None = None

    def __len__(self) -> int:
        return len(self._until)

    def check(self, submit: link_pb2.Submit, now: float) -> None:
        """Raise StatusError INTERNAL for a request that is in quarantine."""
        while self._until and next(iter(self._until.values())) <= now:
            self._until.popitem(last=False)
        if self._until and (digest := _digest(submit)) in self._until:
            seconds = self._until[digest] - now
            message = f"this request ended engines when it ran before and is not run again for {seconds:.0f} s"
            raise StatusError(grpc.StatusCode.INTERNAL, f"{message} (SHA-256 {digest.hex()})")

    def may_run(self, request: Request) -> bool:
        """True if a request may be dispatched now. Of suspect requests, only one runs at a time."""
        trial = self._on_trial
        if trial is not None and (trial.executor.replica is None or trial.num_new_tokens):
            if trial.num_new_tokens:
                trial.executor.deaths = 0
            self._on_trial = None
        return self._on_trial is None or not self._is_suspect(request)

    def on_dispatch(self, request: Request) -> None:
        """Record that a request was sent to an executor; a suspect one is now on trial."""
        if self._is_suspect(request):
            self._on_trial = request

    def on_engine_lost(self, requests: Sequence[Request], instance_id: str, now: float) -> dict[Request, str]:
        """Count the loss of an engine against the requests that ran on it.

        Returns:
            The guilty requests, which must not run again, each with the message for its client.
        """
        for request in requests:
            _count_death(request, instance_id)
        suspects = [request for request in requests if self._is_suspect(request)]
        guilty = suspects if len(suspects) == 1 else []
        guilty += [
            request
            for request in requests
            if request.executor.deaths_in_all >= _MOST_IN_ALL * self._max_deaths and request not in guilty
        ]
        return {request: self._add(request, now) for request in guilty}

    def _is_suspect(self, request: Request) -> bool:
        return request.executor.deaths >= self._max_deaths

    def _add(self, request: Request, now: float) -> str:
        digest = _digest(request.submit)
        self._until[digest] = now + _SECONDS
        self._until.move_to_end(digest)
        if len(self._until) > _CAPACITY:
            self._until.popitem(last=False)
        deaths, request_id = request.executor.deaths_in_all, request.submit.request_id
        _log.error("quarantined after %d engines: SHA-256 %s", deaths, digest.hex(), extra={"request_id": request_id})
        return (
            f"{deaths} executors died while they ran request {request_id!r}; it is not run again for {_SECONDS:.0f} s "
            f"(SHA-256 {digest.hex()})"
        )


def _count_death(request: Request, instance_id: str) -> None:
    executor = request.executor
    if executor.died_on == instance_id:
        return  # the same engine was reported lost twice, because it hangs
    executor.died_on = instance_id
    executor.deaths = 0 if request.num_new_tokens else executor.deaths + 1
    executor.deaths_in_all += 1


def _digest(submit: link_pb2.Submit) -> bytes:
    """Return a digest of the tokens, parameters and grammar of a request. The seed is left out, as it differs at each
    attempt, and so is `prompt_logprobs`, which is cleared once they have come.
    """
    sampling = common_pb2.SamplingParams()
    sampling.CopyFrom(submit.sampling)
    sampling.ClearField("seed")
    sampling.ClearField("prompt_logprobs")
    prompt = link_pb2.Submit(token_ids=submit.token_ids, sampling=sampling, grammar=submit.grammar)
    return hashlib.sha256(prompt.SerializeToString(deterministic=True)).digest()
