import asyncio

from agents import Agent, ModelSettings, OpenAIProvider, RunConfig, Runner, function_tool

# Without tracing, which would send the conversation to OpenAI. use_responses=False speaks chat completions.
provider = OpenAIProvider(base_url="http://127.0.0.1:8000/v1", api_key="none", use_responses=True)
config = RunConfig(model_provider=provider, tracing_disabled=True)


@function_tool
def get_weather(city: str) -> str:
    """The weather of a city."""
    print("called:", city)
    return "It is sunny in Paris, 24 degrees."


agent = Agent(
    name="Assistant",
    instructions="Be brief.",
    model="SmolLM2-135M-Instruct",
    model_settings=ModelSettings(tool_choice="required", parallel_tool_calls=False, temperature=0),
    tools=[get_weather],
)


async def main() -> None:
    question = "What is the weather in Paris?"
    result = await Runner.run(agent, question, run_config=config)
    print("answer:", result.final_output)
    streamed = Runner.run_streamed(agent, question, run_config=config)
    deltas = [
        event.data.delta
        async for event in streamed.stream_events()
        if event.type == "raw_response_event" and event.data.type == "response.output_text.delta"
    ]
    print("streamed:", "".join(deltas))


asyncio.run(main())
