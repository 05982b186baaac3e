"""Requests whose answers may have a shape."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from types import MappingProxyType
from typing import Any, ClassVar

from scalellm.services.tokenizer.http.api_request import SamplingRequest
from scalellm.services.tokenizer.http.structure_fields import Shape, shape_of
from scalellm.v1 import generation_pb2

_FIELDS = ("response_format", "structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar")


class ShapedRequest(SamplingRequest):
    """A chat, or a completion."""

    refused: ClassVar[Mapping[str, Sequence[object]]] = MappingProxyType(
        {"structural_tag": (), "guided_whitespace_pattern": ()}
    )
    response_format: Any = None
    structured_outputs: Any = None
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None

    def to_generate(self, request_id: str) -> generation_pb2.GenerateRequest:
        """Return the request without its input. Raises StatusError."""
        request = super().to_generate(request_id)
        if (shape := self.shape.wire) is not None:
            request.structured_output.CopyFrom(shape)
        return request

    @cached_property
    def shape(self) -> Shape:
        """The shape of the answer. Raises StatusError."""
        return shape_of({name: getattr(self, name) for name in _FIELDS})
