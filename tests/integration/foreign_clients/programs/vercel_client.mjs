// Vercel's AI SDK against a server: the address up to and with /v1 and the model. Prints what it got as JSON.

import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateObject, generateText, jsonSchema, streamText, tool } from "ai";

const [baseURL, name] = process.argv.slice(2);
const settings = { name: "scalellm", baseURL, apiKey: "none", includeUsage: true, supportsStructuredOutputs: true };
const compatible = createOpenAICompatible(settings);
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

const schema = jsonSchema({
  type: "object",
  properties: { city: { type: "string", maxLength: 12 }, days: { type: "integer", minimum: 1, maximum: 7 } },
  required: ["city", "days"],
  additionalProperties: false,
});

/** Makes a model call a function, whole and as a stream, and make an object: the names of what they hold. */
async function shaped(model) {
  const asked = { model, prompt: "How is the weather?", maxOutputTokens: 1500, maxRetries: 0, temperature: 1 };
  // Without `strict` the SDK says to /v1/responses that arguments may be any object.
  const tools = { weather: tool({ description: "The weather of a town", inputSchema: schema, strict: true }) };
  const calling = { ...asked, tools, toolChoice: { type: "tool", toolName: "weather" } };
  const answer = await generateText(calling);
  const [made] = answer.toolCalls;
  const found = { called: [answer.finishReason, made.toolName, Object.keys(made.input)] };
  for await (const part of streamText({ ...calling, onError() {} }).fullStream)
    if (part.type === "tool-call") found.streamed ??= [part.toolName, Object.keys(part.input)];
  found.object = Object.keys((await generateObject({ ...asked, schema })).object);
  return found;
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
  shaped: [await shaped(compatible(name)), await shaped(openai.chat(name)), await shaped(openai(name))],
};
console.log(JSON.stringify(found));
