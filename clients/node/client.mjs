// Makes a gRPC client of a service whose code was generated from protos/scalellm/v1.
import { create, fromBinary, toBinary } from "@bufbuild/protobuf";
import { credentials, InterceptingCall, makeClientConstructor } from "@grpc/grpc-js";

/**
 * A client with one function per RPC, named as in the proto with a small first letter.
 *
 * @param service A generated service, such as `Generation` of gen/scalellm/v1/generation_pb.js.
 * @param address host:port of a ScaleLLM server.
 * @param options.apiKey API key of a server that asks for one, as `scalellm keys create` printed it.
 * @param options.tls Connect over TLS: `true` trusts the public authorities; `{ ca, cert, key, name }` trusts those of `ca`,
 *   shows the certificate `cert` with its private key `key` (PEM, as Buffers), and expects `name` in the server's
 *   certificate where it is not the host of the address. Everything in it may be left out.
 */
export function connect(service, address, { apiKey, tls } = {}) {
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
  const { ca = null, cert = null, key = null, name } = tls || {};
  return new Client(address, tls ? credentials.createSsl(ca, key, cert) : credentials.createInsecure(), {
    "grpc.enable_http_proxy": 0,
    ...(name ? { "grpc.ssl_target_name_override": name } : {}),
    ...(apiKey ? { interceptors: [showing(apiKey)] } : {}),
  });
}

// Not grpc-js's call credentials, which it sends over TLS only: a server on this machine may ask for a key without TLS.
function showing(apiKey) {
  return (options, nextCall) =>
    new InterceptingCall(nextCall(options), {
      start(metadata, listener, next) {
        metadata.set("authorization", `Bearer ${apiKey}`);
        next(metadata, listener);
      },
    });
}
