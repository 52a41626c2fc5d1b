from langchain.agents import create_agent
from langchain.agents.middleware import wrap_model_call
from langchain.messages import AIMessageChunk, ToolMessage
from langchain.tools import tool
from langchain_openai import ChatOpenAI

llm = ChatOpenAI(
    base_url="http://127.0.0.1:8000/v1",
    api_key="none",
    model="SmolLM2-135M-Instruct",
    temperature=0,
    max_tokens=100,
)


@tool
def get_weather(city: str) -> str:
    """The weather of a city."""
    print("called:", city)
    return "It is sunny in Paris, 24 degrees."


@wrap_model_call
def call_first(request, handler):
    """Small models seldom call by themselves: the first step has to."""
    has_called = any(isinstance(message, ToolMessage) for message in request.messages)
    return handler(request.override(tool_choice=None if has_called else "any"))


agent = create_agent(llm, [get_weather], system_prompt="Be brief.", middleware=[call_first])
question = {"messages": [{"role": "user", "content": "What is the weather in Paris?"}]}
print("answer:", agent.invoke(question)["messages"][-1].content)

parts = [part for part, _ in agent.stream(question, stream_mode="messages")]
print("streamed:", "".join(part.text for part in parts if isinstance(part, AIMessageChunk)))
