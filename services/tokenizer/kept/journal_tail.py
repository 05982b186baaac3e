"""The tail of a journal, serialised StepOutputs one after the other: where one of them ends."""

from __future__ import annotations

from scalellm.v1 import link_pb2

_FIELDS = link_pb2.StepOutput.DESCRIPTOR.fields_by_name
_FIRST = frozenset(_FIELDS[name].number for name in ("handles", "prompt_logprobs"))
"""Fields with which a step begins. One that has neither tells only the ends of samples, and may as well count as a part
of the step before."""

_NUMBER_SHIFT, _WIRE_TYPE = 3, 7
_VARINT, _LENGTH_DELIMITED = 0, 2
_MORE, _LOW_BITS = 0x80, 0x7F


def whole_steps(piece: bytes) -> int:
    """Return the length of the part of a piece that has whole steps only, if more bytes follow the piece; 0: the first
    step may go on behind it.

    Fields of a step are in the order of their numbers, each of which fits into one byte with its wire type.
    """
    place = end = previous = 0
    try:
        while place < len(piece):
            number, wire_type = piece[place] >> _NUMBER_SHIFT, piece[place] & _WIRE_TYPE
            if number <= previous and number in _FIRST:
                end = place
            previous = number
            value, place = _read_varint(piece, place + 1)
            if wire_type == _LENGTH_DELIMITED:
                place += value
            elif wire_type != _VARINT:
                break
    except IndexError:  # the piece ends within a number
        pass
    return end


def _read_varint(data: bytes, place: int) -> tuple[int, int]:
    """Return the number at a place, and the place behind it. Raises IndexError if the data ends before."""
    value = shift = 0
    while data[place] & _MORE:
        value |= (data[place] & _LOW_BITS) << shift
        shift += 7
        place += 1
    return value | data[place] << shift, place + 1
