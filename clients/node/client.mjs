// Makes gRPC clients of ScaleLLM's services. It reads the protos themselves, so there is no generated code.
import { fileURLToPath } from "node:url";
import { credentials, InterceptingCall, loadPackageDefinition } from "@grpc/grpc-js";
import { loadSync } from "@grpc/proto-loader";

const files = ["generation", "sessions", "tokenizer"].map((name) => `scalellm/v1/${name}.proto`);
const definition = loadSync(files, {
  includeDirs: [fileURLToPath(new URL("../../protos", import.meta.url))],
  defaults: true, // a field that the server does not set has its default
  enums: String, // "FINISH_REASON_STOP"
  longs: String, // numbers of 64 bits, which JavaScript's numbers cannot all hold
  oneofs: true, // `event` names the field that is set: { event: "delta", delta: { text: "..." } }
});

/** The services, for `connect`. Names of fields are those of the protos in camel case: `maxTokens`. */
export const { Generation, Sessions, Tokenizer } = loadPackageDefinition(definition).scalellm.v1;

/**
 * A client with one function per RPC, named as in the proto with a small first letter.
 *
 * @param Service One of the services above.
 * @param address host:port of a ScaleLLM server.
 * @param options.apiKey API key of a server that asks for one, as `scalellm keys create` printed it.
 * @param options.tls Connect over TLS: `true` trusts the public authorities; `{ ca, cert, key, name }` trusts those of `ca`,
 *   shows the certificate `cert` with its private key `key` (PEM, as Buffers), and expects `name` in the server's
 *   certificate where it is not the host of the address. Everything in it may be left out.
 */
export function connect(Service, address, { apiKey, tls } = {}) {
  const { ca = null, cert = null, key = null, name } = tls || {};
  return new Service(address, tls ? credentials.createSsl(ca, key, cert) : credentials.createInsecure(), {
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
