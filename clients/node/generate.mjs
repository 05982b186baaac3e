// Streams a completion: node generate.mjs "Once upon a time" [host:port] [max tokens]
//
// For a secured server: SCALELLM_API_KEY, and SCALELLM_TLS_CA, SCALELLM_TLS_CERT and SCALELLM_TLS_KEY (PEM files), as for the
// command line.
import { readFileSync } from "node:fs";
import { status } from "@grpc/grpc-js";
import { connect, Generation } from "./client.mjs";

const [prompt, address = "127.0.0.1:50051", maxTokens = "64"] = process.argv.slice(2);
if (prompt === undefined || !Number.isInteger(Number(maxTokens))) {
  console.error("usage: node generate.mjs PROMPT [HOST:PORT] [MAX_TOKENS]");
  process.exit(2);
}

process.stdout.on("error", () => process.exit(141)); // whoever read the answer has gone; so does the connection

// What a terminal obeys, or what reorders the text beside it, never reaches one; a pipe gets exactly what was sent.
const printable = (text) => text.replace(/(?![\n\t])[\p{Cc}\p{Cs}\p{Zl}\p{Zp}\p{Bidi_Control}]/gu, "");

const { SCALELLM_API_KEY: apiKey, SCALELLM_TLS_CA, SCALELLM_TLS_CERT, SCALELLM_TLS_KEY } = process.env;
const pem = (path) => (path ? readFileSync(path) : null);
const tls = SCALELLM_TLS_CA && { ca: pem(SCALELLM_TLS_CA), cert: pem(SCALELLM_TLS_CERT), key: pem(SCALELLM_TLS_KEY) };
const client = connect(Generation, address, { apiKey, tls });
const request = { prompt, sampling: { maxTokens: Number(maxTokens), temperature: 0 } };
const call = client.generate(request, { deadline: Date.now() + 120_000 });
process.on("SIGINT", () => call.cancel()); // the executor stops, too

try {
  for await (const { event, delta, finished } of call) {
    if (event === "delta") {
      const { text } = delta;
      process.stdout.write(process.stdout.isTTY ? printable(text) : text);
    } else if (event === "finished") {
      const { samples, usage, latency } = finished;
      const ms = (nanoseconds) => (Number(nanoseconds) / 1e6).toFixed(1);
      process.stdout.write("\n");
      console.error(
        `${samples[0].reason.replace("FINISH_REASON_", "")}: ${usage.promptTokens} + ${usage.completionTokens} tokens, ` +
          `first after ${ms(latency.ttftNs)} ms, all after ${ms(latency.totalNs)} ms`,
      );
    }
  }
} catch (error) {
  console.error(printable(`error: ${status[error.code] ?? error.code}: ${error.details ?? error.message}`));
  process.exitCode = error.code === status.CANCELLED ? 130 : 1;
} finally {
  client.close();
}
