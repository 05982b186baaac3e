"""JSON that nobody vouches for."""

from __future__ import annotations

import json

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scalellm.services.common.errors import StatusError
from scalellm.services.tokenizer.json_object import parse_object

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=16,
)


@given(st.dictionaries(st.text(), VALUES))
def test_what_json_says_is_read(value: dict[str, object]) -> None:
    assert parse_object(json.dumps(value).encode()) == value
    assert parse_object(json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")) == value


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (b"[]", "must be a JSON object"),
        (b"1", "must be a JSON object"),
        (b'"text"', "must be a JSON object"),
        (b'{"a": NaN}', "holds NaN"),
        (b'{"a": [-Infinity]}', "holds -Infinity"),
        (b'{"a": 1, "a": 2}', "has the key 'a' twice"),
        (b'{"b": {"a": 1, "c": 3, "a": 1}}', "has the key 'a' twice"),
        (b'{"a": "\xff"}', "is not UTF-8 at byte 7"),
        (b"\xef\xbb\xbf{}", "is not JSON"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "is nested too deeply"),
        (b'{"a": ' * 100_000 + b"1" + b"}" * 100_000, "is nested too deeply"),
        (b'{"a": ' + b"9" * 100_000 + b"}", "holds a number with too many digits"),
        (b'{"a": [' + b"{}," * 20_000 + b"{}]}", "holds more than 16384 objects"),
        (b'{"a": 1} x', "is not JSON"),
        (b"{'a': 1}", "is not JSON"),
    ],
)
def test_everything_else_is_refused(data: bytes, why: str) -> None:
    with pytest.raises(StatusError) as caught:
        parse_object(data)
    assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT
    assert caught.value.field == "body"
    assert why in caught.value.message
    assert len(caught.value.message) < 200
