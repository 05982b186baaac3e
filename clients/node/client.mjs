// Makes a gRPC client of a service whose code was generated from protos/scalellm/v1.
import { create, fromBinary, toBinary } from "@bufbuild/protobuf";
import { credentials, makeClientConstructor } from "@grpc/grpc-js";

/**
 * A client with one function per RPC, named as in the proto with a small first letter.
 *
 * @param service A generated service, such as `Generation` of gen/scalellm/v1/generation_pb.js.
 * @param address host:port of a ScaleLLM server.
 */
export function connect(service, address) {
  const definition = {};
  for (const method of service.methods) {
    definition[method.localName] = {
      path: `/${service.typeName}/${method.name}`,
      requestStream: ["client_streaming", "bidi_streaming"].includes(method.methodKind),
      responseStream: ["server_streaming", "bidi_streaming"].includes(method.methodKind),
      requestSerialize: (message) => Buffer.from(toBinary(method.input, create(method.input, message))),
      requestDeserialize: (bytes) => fromBinary(method.input, bytes),
      responseSerialize: (message) => Buffer.from(toBinary(method.output, create(method.output, message))),
      responseDeserialize: (bytes) => fromBinary(method.output, bytes),
    };
  }
  const Client = makeClientConstructor(definition, service.typeName);
  return new Client(address, credentials.createInsecure(), { "grpc.enable_http_proxy": 0 });
}
