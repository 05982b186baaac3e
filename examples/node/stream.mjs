// Streams a completion over gRPC with the client in clients/node.
import { connect, Generation } from "../../clients/node/client.mjs";

const { SCALELLM_ADDRESS, SCALELLM_API_KEY: apiKey } = process.env;
const client = connect(Generation, SCALELLM_ADDRESS || "127.0.0.1:50051", { apiKey });
const request = { prompt: "Once upon a time", sampling: { maxTokens: 32, temperature: 0 } };
try {
  for await (const { event, delta } of client.generate(request, { deadline: Date.now() + 120_000 })) {
    if (event === "delta") process.stdout.write(delta.text);
  }
  process.stdout.write("\n");
} catch (error) {
  console.error(`${error.code}: ${error.details}`);
  process.exitCode = 1;
} finally {
  client.close();
}
