"""Fifteen kinds of prompts as lengths, and the tiers' deadlines under which goodput is counted.

The lengths are ours: round figures of each use, documented so that anyone can drive another server with them.
"""

from dataclasses import dataclass
from typing import Literal

Ends = Literal["first token", "answer"]


@dataclass(frozen=True)
class Workload:
    """Lengths in tokens; every prompt is new, so that no cached prefix helps."""

    name: str
    prompt_tokens: int
    output_tokens: int
    what: str


WORKLOADS = (
    Workload("multi-turn chat", 1024, 256, "four earlier turns and a question"),
    Workload("single question", 64, 192, "a question and a paragraph in answer"),
    Workload("voice turn", 192, 64, "two spoken turns, a short reply"),
    Workload("code completion", 768, 32, "the lines around a cursor, the rest of a statement"),
    Workload("code generation", 256, 512, "a described function, written out"),
    Workload("code edit", 1024, 512, "a file and a change, the file again"),
    Workload("code review", 1536, 256, "a diff, remarks"),
    Workload("summarization", 2048, 192, "an article, its summary"),
    Workload("retrieval answer", 1792, 160, "six retrieved passages, an answer from them"),
    Workload("extraction", 1024, 128, "a document, fields as JSON"),
    Workload("classification", 96, 8, "a message, its label"),
    Workload("translation", 384, 384, "a page, the page in another language"),
    Workload("agent tool call", 1280, 64, "tools, history, one call"),
    Workload("reasoning", 256, 1024, "a problem, a chain of steps"),
    Workload("creative writing", 128, 768, "a premise, a story"),
)


@dataclass(frozen=True)
class Deadline:
    """service_tier names the server's tier; None sends the deadline in x-slo-ttft-ms instead.

    ends: what has to come within `seconds` of the moment at which the request was due.
    """

    tier: str
    seconds: float
    ends: Ends
    workload: Workload
    service_tier: str | None


def named(name: str) -> Workload:
    """Raises KeyError."""
    return {w.name: w for w in WORKLOADS}[name]


DEADLINES = (
    Deadline("edge", 0.1, "first token", named("classification"), None),
    Deadline("voice", 0.2, "first token", named("voice turn"), "voice"),
    Deadline("copilot", 0.5, "answer", named("code completion"), "copilot"),
    Deadline("agent", 1.0, "answer", named("agent tool call"), "agent"),
)
