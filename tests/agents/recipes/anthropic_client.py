from anthropic import Anthropic, beta_tool

client = Anthropic(base_url="http://127.0.0.1:8000", api_key="none")  # without /v1
GREEDY = {"model": "SmolLM2-135M-Instruct", "max_tokens": 100, "extra_body": {"temperature": 0}}


@beta_tool
def get_weather(city: str) -> str:
    """The weather of a city."""
    print("called:", city)
    return "It is sunny in Paris, 24 degrees."


messages = [{"role": "user", "content": "What is the weather in Paris?"}]
tools = [get_weather.to_dict()]
forced = {"type": "tool", "name": "get_weather"}
asked = client.messages.create(**GREEDY, messages=messages, tools=tools, tool_choice=forced)
use = asked.content[0]
result = {"type": "tool_result", "tool_use_id": use.id, "content": get_weather.call(use.input)}
messages += [{"role": "assistant", "content": asked.content}, {"role": "user", "content": [result]}]
answer = client.messages.create(**GREEDY, messages=messages, tools=tools)
print("answer:", answer.content[0].text)

question = {"role": "user", "content": "What is the capital of France?"}
with client.messages.stream(**GREEDY, messages=[question]) as stream:
    print("streamed:", "".join(stream.text_stream))
