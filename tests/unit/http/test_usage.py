"""OpenAI's `usage`."""

import json

import pytest

from scalellm.services.tokenizer.http.wire import final_usage_json, total_usage
from scalellm.v1 import common_pb2, generation_pb2


@pytest.mark.parametrize(
    ("told", "details"),
    [
        ({}, None),
        ({"reasoning_tokens": 0}, {"reasoning_tokens": 0}),
        (
            {"accepted_prediction_tokens": 3},
            {"accepted_prediction_tokens": 3, "rejected_prediction_tokens": 0},
        ),
        (
            {"reasoning_tokens": 1, "rejected_prediction_tokens": 2},
            {"reasoning_tokens": 1, "accepted_prediction_tokens": 0, "rejected_prediction_tokens": 2},
        ),
    ],
)
def test_details_of_the_completion_are_told_where_there_are_any(told: dict[str, int], details: object) -> None:
    usage = common_pb2.Usage(prompt_tokens=10, completion_tokens=5, cached_tokens=4, **told)
    shown = json.loads(final_usage_json(usage))
    assert shown.pop("completion_tokens_details", None) == details
    assert shown == {
        "prompt_tokens": 10,
        "completion_tokens": 5,
        "total_tokens": 15,
        "prompt_tokens_details": {"cached_tokens": 4},
    }


def test_guesses_of_several_prompts_add_up() -> None:
    usage = common_pb2.Usage(accepted_prediction_tokens=3, rejected_prediction_tokens=1)
    total = total_usage([generation_pb2.Finished(usage=usage)] * 2)
    assert (total.accepted_prediction_tokens, total.rejected_prediction_tokens) == (6, 2)
