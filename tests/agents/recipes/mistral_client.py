import json

from mistralai.client import Mistral

client = Mistral(server_url="http://127.0.0.1:8000", api_key="none")  # without /v1
GREEDY = {"model": "SmolLM2-135M-Instruct", "temperature": 0, "max_tokens": 100}


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
asked = client.chat.complete(**GREEDY, messages=messages, tools=tools, tool_choice="any")
call = asked.choices[0].message.tool_calls[0]
result = get_weather(**json.loads(call.function.arguments))
messages += [
    asked.choices[0].message,
    {"role": "tool", "name": "get_weather", "tool_call_id": call.id, "content": result},
]
answer = client.chat.complete(**GREEDY, messages=messages, tools=tools)
print("answer:", answer.choices[0].message.content)

stream = client.chat.stream(**GREEDY, messages=messages, tools=tools)
print("streamed:", "".join(event.data.choices[0].delta.content or "" for event in stream))
