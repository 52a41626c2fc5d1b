import OpenAI from "openai";

const client = new OpenAI({ baseURL: "http://127.0.0.1:8000/v1", apiKey: "none" });
const greedy = { model: "SmolLM2-135M-Instruct", temperature: 0, max_tokens: 100 };

function getWeather({ city }) {
  console.log("called:", city);
  return "It is sunny in Paris, 24 degrees.";
}

const parameters = {
  type: "object",
  properties: { city: { type: "string" } },
  required: ["city"],
  additionalProperties: false,
};
const tools = [{ type: "function", function: { name: "get_weather", parameters } }];
const tool_choice = { type: "function", function: { name: "get_weather" } };
const messages = [{ role: "user", content: "What is the weather in Paris?" }];
const asked = await client.chat.completions.create({ ...greedy, messages, tools, tool_choice });
const { message } = asked.choices[0];
const [call] = message.tool_calls;
const content = getWeather(JSON.parse(call.function.arguments));
messages.push(message, { role: "tool", tool_call_id: call.id, content });
const answer = await client.chat.completions.create({ ...greedy, messages, tools });
console.log("answer:", answer.choices[0].message.content);

const stream = await client.responses.create({
  model: "SmolLM2-135M-Instruct",
  input: "What is the capital of France?",
  temperature: 0,
  stream: true,
});
let text = "";
for await (const event of stream) {
  if (event.type === "response.output_text.delta") text += event.delta;
}
console.log("streamed:", text);
