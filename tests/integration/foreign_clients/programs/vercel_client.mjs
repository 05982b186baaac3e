// Vercel's AI SDK against a server: the address up to and with /v1 and the model. Prints what it got as JSON.

import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, streamText } from "ai";

const [baseURL, name] = process.argv.slice(2);
const compatible = createOpenAICompatible({ name: "scalellm", baseURL, apiKey: "none", includeUsage: true });
const call = { model: compatible(name), prompt: "Hello", seed: 7, maxRetries: 0 };
const openai = createOpenAI({ baseURL, apiKey: "none" });

async function streamed(options) {
  const result = streamText({ ...options, onError() {} });
  let text = "";
  for await (const part of result.textStream) text += part;
  return { text, usage: (await result.usage).outputTokens, reason: await result.finishReason };
}

async function aborted() {
  const controller = new AbortController();
  const kinds = [];
  const result = streamText({ ...call, maxOutputTokens: 1500, abortSignal: controller.signal, onError() {} });
  for await (const part of result.fullStream) {
    kinds.push(part.type);
    if (part.type === "text-delta") controller.abort();
  }
  return kinds.at(-1);
}

async function refused(options) {
  try {
    await generateText({ ...call, ...options });
  } catch (error) {
    return [error.statusCode, error.message];
  }
  return [0, ""];
}

const whole = await generateText({ ...call, maxOutputTokens: 24 });
const responses = await generateText({ model: openai(name), prompt: "Hello", maxOutputTokens: 24, maxRetries: 0 });
const found = {
  whole: { text: whole.text, usage: whole.usage.outputTokens, reason: whole.finishReason },
  streamed: await streamed({ ...call, maxOutputTokens: 24 }),
  completions: (await generateText({ ...call, model: compatible.completionModel(name), maxOutputTokens: 4 })).usage
    .outputTokens,
  chat: await streamed({ ...call, model: openai.chat(name), maxOutputTokens: 24 }),
  responses: responses.usage.outputTokens,
  responsesStreamed: (await streamed({ model: openai(name), prompt: "Hello", maxOutputTokens: 24, maxRetries: 0 }))
    .usage,
  aborted: await aborted(),
  topP: await refused({ topP: 7 }),
};
console.log(JSON.stringify(found));
