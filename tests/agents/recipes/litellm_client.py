import json

import litellm

SERVER = {"model": "openai/SmolLM2-135M-Instruct", "api_base": "http://127.0.0.1:8000/v1", "api_key": "none"}
GREEDY = {**SERVER, "temperature": 0, "max_tokens": 100}


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
forced = {"type": "function", "function": {"name": "get_weather"}}
messages = [{"role": "user", "content": "What is the weather in Paris?"}]
asked = litellm.completion(**GREEDY, messages=messages, tools=tools, tool_choice=forced).choices[0].message
call = asked.tool_calls[0]
result = get_weather(**json.loads(call.function.arguments))
messages += [asked, {"role": "tool", "tool_call_id": call.id, "content": result}]
answer = litellm.completion(**GREEDY, messages=messages, tools=tools)
print("answer:", answer.choices[0].message.content)

stream = litellm.completion(**GREEDY, messages=messages, tools=tools, stream=True)
print("streamed:", "".join(chunk.choices[0].delta.content or "" for chunk in stream))
