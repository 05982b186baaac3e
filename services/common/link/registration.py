"""Registers a service that serves a link."""

from __future__ import annotations

import grpc
from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.message_factory import GetMessageClass

from scalellm.services.common.guarded import guarded


def link_service_handler(service: ServiceDescriptor, servicer: object) -> grpc.GenericRpcHandler:
    """Serve `service` with the methods of `servicer`, which carry the RPCs' names.

    A bidirectional method is a link, which reads and writes bytes: its frames are serialised once, where they are made,
    and merged as bytes. Other methods get and return messages, or write them to the context. All raise StatusError for
    every outcome but OK.
    """
    handlers = {}
    for method in service.methods:
        behaviour = guarded(getattr(servicer, method.name), method.full_name)
        if method.client_streaming and method.server_streaming:
            handlers[method.name] = grpc.stream_stream_rpc_method_handler(behaviour)
        else:
            make = (
                grpc.unary_stream_rpc_method_handler if method.server_streaming else grpc.unary_unary_rpc_method_handler
            )
            handlers[method.name] = make(
                behaviour,
                request_deserializer=GetMessageClass(method.input_type).FromString,
                response_serializer=GetMessageClass(method.output_type).SerializeToString,
            )
    return grpc.method_handlers_generic_handler(service.full_name, handlers)
