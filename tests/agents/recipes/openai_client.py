import json

from openai import OpenAI

client = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
GREEDY = {"model": "SmolLM2-135M-Instruct", "temperature": 0}


def get_weather(city: str) -> str:
    print("called:", city)
    return "It is sunny in Paris, 24 degrees."


parameters = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
tools = [{"type": "function", "function": {"name": "get_weather", "parameters": parameters}}]
messages = [{"role": "user", "content": "What is the weather in Paris?"}]
asked = client.chat.completions.create(
    **GREEDY, messages=messages, tools=tools, tool_choice="required", parallel_tool_calls=False
)
call = asked.choices[0].message.tool_calls[0]
result = get_weather(**json.loads(call.function.arguments))
messages += [asked.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": result}]
answer = client.chat.completions.create(**GREEDY, messages=messages, tools=tools)
print("answer:", answer.choices[0].message.content)

stream = client.responses.create(**GREEDY, input="What is the capital of France?", stream=True)
print("streamed:", "".join(event.delta for event in stream if event.type == "response.output_text.delta"))
