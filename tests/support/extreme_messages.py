"""Messages that parse, with values that nobody would send: what a fuzzer of bytes hardly ever hits."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, TypeVar

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from hypothesis import strategies as st

MessageT = TypeVar("MessageT", bound=Message)

_NONE, _ALL = "0" * 32, "f" * 32
_TEXTS = (
    *("", " ", "x", "\0", "\n\x1b[2J", "\u202e\U0001f98a", "x" * 129, "é" * 300, "x" * 5000),
    *(f"00-{_NONE}-{'0' * 16}-01", f"00-{_ALL}-{'f' * 16}-zz", f"ff-{_ALL}-{'f' * 16}-01", "00-1-1-01", "a=b,,=,c"),
)
_SIGNED = (0, 1, -1, 100, -101, 2**31 - 1, -(2**31))
_UNSIGNED = (0, 1, 2, 15, 16, 17, 63, 64, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1)
_FLOATS = (0.0, -0.0, 1.0, -1.0, 1e-45, 3.4e38, -3.4e38, float("inf"), float("-inf"), float("nan"))
_VALUES: dict[int, tuple[Any, ...]] = {
    FieldDescriptor.CPPTYPE_INT32: _SIGNED,
    FieldDescriptor.CPPTYPE_INT64: (*_SIGNED, 2**53, 2**63 - 1, -(2**63)),
    FieldDescriptor.CPPTYPE_UINT32: _UNSIGNED,
    FieldDescriptor.CPPTYPE_UINT64: (*_UNSIGNED, 2**53, 10**18, 2**63 - 1, 2**63, 2**64 - 1),
    FieldDescriptor.CPPTYPE_FLOAT: _FLOATS,
    FieldDescriptor.CPPTYPE_DOUBLE: _FLOATS,
    FieldDescriptor.CPPTYPE_BOOL: (False, True),
    FieldDescriptor.CPPTYPE_ENUM: (0, 1, 2, 5, 6, 99, -1, 2**31 - 1),
}
_LENGTHS = (0, 1, 2, 17, 65, 1025)


def altered(seeds: Sequence[MessageT], most_changes: int = 3) -> st.SearchStrategy[MessageT]:
    """Copies of `seeds` with up to `most_changes` fields, at any depth, set to an extreme, repeated or left out.

    Works from the descriptors: a field that is added to a message is altered from then on.
    """

    def change(seed: MessageT, number: int) -> MessageT:
        rng, message = random.Random(number), type(seed)()
        message.CopyFrom(seed)
        for _ in range(rng.randint(0, most_changes)):
            _alter(message, rng)
        return message

    return st.builds(change, st.sampled_from(seeds), st.integers(0, 2**32))


def _alter(message: Message, rng: random.Random) -> None:
    fields = message.DESCRIPTOR.fields
    # Fields of a oneof exclude one another: another kind of message is another seed.
    present = [field for field, _ in message.ListFields()]
    able = [field for field in fields if _is_optional(field) or field in present] or fields
    # What is set, and what has fields of its own, is altered more often than its share.
    field = rng.choices(able, [1 + (field in present) + 2 * (field.message_type is not None) for field in able])[0]
    if field.is_repeated:
        _alter_list(getattr(message, field.name), field, rng)
    elif field.cpp_type == FieldDescriptor.CPPTYPE_MESSAGE:
        inner = getattr(message, field.name)
        if rng.random() < 0.1:
            message.ClearField(field.name)
        else:
            inner.SetInParent()
            _alter(inner, rng)
    elif rng.random() < 0.1:
        message.ClearField(field.name)
    else:
        setattr(message, field.name, _value(field, rng))


def _is_optional(field: FieldDescriptor) -> bool:
    return field.containing_oneof is None or len(field.containing_oneof.fields) == 1


def _alter_list(values: Any, field: FieldDescriptor, rng: random.Random) -> None:
    is_message = field.cpp_type == FieldDescriptor.CPPTYPE_MESSAGE
    match rng.randrange(4):
        case 0 if values:
            place = rng.randrange(len(values))
            if is_message:
                _alter(values[place], rng)
            else:
                values[place] = _value(field, rng)
        case 1 if values:
            del values[rng.randrange(len(values)) :]
        case 2 if values:
            values.extend(values[:])
        case _:
            count = rng.choice(_LENGTHS)
            if is_message:
                for _ in range(min(count, 20)):
                    _alter(values.add(), rng)
            else:
                values.extend([_value(field, rng)] * count)


def _value(field: FieldDescriptor, rng: random.Random) -> Any:
    if field.type == FieldDescriptor.TYPE_BYTES:
        return rng.choice(_TEXTS).encode()
    if field.type == FieldDescriptor.TYPE_STRING:
        return rng.choice(_TEXTS)
    return rng.choice(_VALUES[field.cpp_type])
