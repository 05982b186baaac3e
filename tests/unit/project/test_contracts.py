"""Rules for every message of scalellm.v1 that a peer can send."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.descriptor import Descriptor

from scalellm.v1 import (
    common_pb2,
    executor_pb2,
    generation_pb2,
    scheduler_pb2,
    sessions_pb2,
    tokenizer_pb2,
)

ROOT = Path(__file__).resolve().parents[3]
SERVICES = [
    service
    for file in (executor_pb2, generation_pb2, scheduler_pb2, sessions_pb2, tokenizer_pb2)
    for service in file.DESCRIPTOR.services_by_name.values()
]


def within(message: Descriptor, seen: set[str]) -> Iterator[Descriptor]:
    """The message and all messages that it can hold."""
    if message.full_name in seen:
        return
    seen.add(message.full_name)
    yield message
    for field in message.fields:
        if field.message_type is not None:
            yield from within(field.message_type, seen)


def test_packages_are_no_older_than_what_generated_the_stubs() -> None:
    """Stubs refuse to be imported with an older grpcio or protobuf: pip has to know."""
    stubs = Path(generation_pb2.__file__).parent
    (grpcio,) = re.findall(r"GRPC_GENERATED_VERSION = '(.+)'", (stubs / "generation_pb2_grpc.py").read_text())
    protobuf = re.search(r"Protobuf Python Version: (\S+)", (stubs / "generation_pb2.py").read_text())
    assert protobuf is not None
    needed = [f"grpcio>={grpcio}", f"protobuf>={protobuf[1]}"]
    for file in ("pyproject.toml", "clients/python/pyproject.toml"):
        listed = tomllib.loads((ROOT / file).read_text())["project"]["dependencies"]
        assert [line for line in listed if re.match(r"(grpcio|protobuf)\b[^-]", line)] == needed, file


def test_no_peer_chooses_the_keys_of_a_map() -> None:
    seen: set[str] = set()
    sent = [method.input_type for service in SERVICES for method in service.methods]
    sent += [method.output_type for service in SERVICES for method in service.methods if method.client_streaming]
    messages = [message for root in sent for message in within(root, seen)]
    assert {"scalellm.v1.SamplingParams", "scalellm.v1.Submit", "scalellm.v1.StepOutput"} <= seen
    assert [message.full_name for message in messages if message.GetOptions().map_entry] == []


def test_logit_bias_is_read_as_the_map_that_it_was() -> None:
    """Clients of the first contract send a map<uint32, float>: its bytes are the same."""
    file = descriptor_pb2.FileDescriptorProto(name="old.proto", package="old", syntax="proto3")
    sampling = file.message_type.add(name="SamplingParams")
    entry = sampling.nested_type.add(name="LogitBiasEntry", options={"map_entry": True})
    field = descriptor_pb2.FieldDescriptorProto
    optional, repeated = field.LABEL_OPTIONAL, field.LABEL_REPEATED
    entry.field.add(name="key", number=1, label=optional, type=field.TYPE_UINT32)
    entry.field.add(name="value", number=2, label=optional, type=field.TYPE_FLOAT)
    type_name = ".old.SamplingParams.LogitBiasEntry"
    sampling.field.add(name="logit_bias", number=11, label=repeated, type=field.TYPE_MESSAGE, type_name=type_name)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    old = message_factory.GetMessageClass(pool.FindMessageTypeByName("old.SamplingParams"))
    values = {0: 0.0, 5: 1.5, 2**32 - 1: -100.0}
    new = common_pb2.SamplingParams.FromString(old(logit_bias=values).SerializeToString())
    assert {entry.token_id: entry.bias for entry in new.logit_bias} == values
    assert dict(old.FromString(new.SerializeToString()).logit_bias) == values
