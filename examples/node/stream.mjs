// Streams a completion over gRPC with the client in clients/node.
import { connect } from "../../clients/node/client.mjs";
import { Generation } from "../../clients/node/gen/scalellm/v1/generation_pb.js";

const { SCALELLM_ADDRESS, SCALELLM_API_KEY: apiKey } = process.env;
const client = connect(Generation, SCALELLM_ADDRESS || "127.0.0.1:50051", { apiKey });
const request = {
  input: { case: "prompt", value: "Once upon a time" },
  sampling: { maxTokens: 32, temperature: 0 },
};
try {
  for await (const { event } of client.generate(request, { deadline: Date.now() + 120_000 })) {
    if (event.case === "delta") process.stdout.write(event.value.text);
  }
  process.stdout.write("\n");
} catch (error) {
  console.error(`${error.code}: ${error.details}`);
  process.exitCode = 1;
} finally {
  client.close();
}
