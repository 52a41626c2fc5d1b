import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";

const peregrine = createOpenAICompatible({
  name: "peregrine",
  baseURL: "http://127.0.0.1:8000/v1",
  apiKey: "none",
  includeUsage: true,
});
const weather = tool({
  description: "The weather of a city.",
  inputSchema: z.object({ city: z.string() }),
  execute: async ({ city }) => {
    console.log("called:", city);
    return "It is sunny in Paris, 24 degrees.";
  },
});
const request = {
  model: peregrine("SmolLM2-135M-Instruct"),
  system: "Be brief.",
  prompt: "What is the weather in Paris?",
  temperature: 0,
  maxOutputTokens: 100,
  tools: { weather },
  stopWhen: stepCountIs(2),
  // Small models seldom call by themselves: the first step has to.
  prepareStep: ({ stepNumber }) => ({
    toolChoice: stepNumber === 0 ? { type: "tool", toolName: "weather" } : "none",
  }),
};
const { text } = await generateText(request);
console.log("answer:", text);

let streamed = "";
for await (const delta of streamText(request).textStream) streamed += delta;
console.log("streamed:", streamed);
