"""A conversation as a job, for every API that has conversations."""

import time
import uuid
from collections.abc import Sequence

from engine import InferenceEngine, SamplingParams
from serving.api.generation import Job, check_context
from serving.state import package_version
from serving.tools import ChatPlan, Message, ToolChoice, ToolDefinition, plan_chat

NO_CHOICE = ToolChoice("none")


async def chat_job(
    engine: InferenceEngine,
    messages: Sequence[Message],
    params: SamplingParams,
    tools: Sequence[ToolDefinition] = (),
    choice: ToolChoice = NO_CHOICE,
    *,
    id_prefix: str,
    include_usage: bool,
    answer_beginning: str = "",
    may_exceed_context: bool = False,
) -> tuple[Job, ChatPlan]:
    """The job, and the plan whose parsers read its outputs.

    answer_beginning: text that the answer goes on from; it is not part of the output.
    may_exceed_context: more `params.max_tokens` than there is room for: the answer ends with the context.

    Raises:
        ParameterError: see `plan_chat` and `InferenceEngine.tokenize_chat`.
        ApiError: prompt and `params.max_tokens` exceed the context, and may not.
    """
    template = engine.chat_template(has_tools=bool(tools) and choice.mode != "none")
    plan = plan_chat(messages, tools, choice, params, template, engine.token_id)
    prompt = await engine.tokenize_chat(plan.messages, tools=plan.template_tools)
    if answer_beginning:
        prompt += await engine.tokenize(answer_beginning, add_special_tokens=False)
    if not may_exceed_context:
        check_context([prompt], params.max_tokens, engine.model.max_model_len)
    job = Job(
        request_id=f"{id_prefix}{uuid.uuid4().hex}",
        prompts=[prompt],
        params=plan.params,
        model=engine.model.name,
        created=int(time.time()),
        fingerprint=f"peregrine-{package_version()}-{engine.model.weight_format}",
        include_usage=include_usage,
    )
    return job, plan
