from pydantic_ai import Agent, RunContext
from pydantic_ai.capabilities import AbstractCapability
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider
from pydantic_ai.settings import ModelSettings

provider = OpenAIProvider(base_url="http://127.0.0.1:8000/v1", api_key="none")
model = OpenAIChatModel("SmolLM2-135M-Instruct", provider=provider)


class CallFirst(AbstractCapability):
    """Small models seldom call by themselves: the first step has to."""

    def get_model_settings(self):
        def settings(context: RunContext) -> ModelSettings:
            return {"tool_choice": "required"} if context.run_step == 1 else {}

        return settings


agent = Agent(
    model,
    instructions="Be brief.",
    capabilities=[CallFirst()],
    model_settings={"temperature": 0, "max_tokens": 100, "parallel_tool_calls": False},
)


@agent.tool_plain
def get_weather(city: str) -> str:
    """The weather of a city."""
    print("called:", city)
    return "It is sunny in Paris, 24 degrees."


question = "What is the weather in Paris?"
print("answer:", agent.run_sync(question).output)

streamed = agent.run_stream_sync(question)
print("streamed:", "".join(streamed.stream_text(delta=True)))
