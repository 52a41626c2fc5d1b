"""docs/recipes.md on the live cluster: each client and framework, unmodified, makes the round trip of a tool
call, and streams. Only the server's address is replaced.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.e2e.conftest import MODEL

pytestmark = [pytest.mark.e2e, pytest.mark.model, pytest.mark.timeout(180)]

ROOT = Path(__file__).parents[2]
AGENTS = ROOT / "tests" / "agents"
PYTHON = ROOT / ".venv-agents" / "bin" / "python"
NODE = shutil.which("node")
SERVER = "http://127.0.0.1:8000"
RECIPES = sorted((AGENTS / "recipes").iterdir())
PAGE = (ROOT / "docs" / "recipes.md").read_text()

# What the page says can be put in place of what the recipe has.
VARIANTS = {
    "chat completions": ("openai_agents_sdk.py", {"use_responses=True": "use_responses=False"}),
    "responses": ("langchain_agent.py", {'api_key="none"': 'api_key="none", use_responses_api=True'}),
    "anthropic": (
        "langchain_agent.py",
        {"langchain_openai": "langchain_anthropic", "ChatOpenAI": "ChatAnthropic", f"{SERVER}/v1": SERVER},
    ),
    "deepseek": (
        "langchain_agent.py",
        {"langchain_openai": "langchain_deepseek", "ChatOpenAI": "ChatDeepSeek", "base_url": "api_base"},
    ),
    "pydantic-ai responses": ("pydantic_ai_agent.py", {"OpenAIChatModel": "OpenAIResponsesModel"}),
    "litellm's anthropic": (
        "litellm_client.py",
        {f"openai/{MODEL}": f"anthropic/{MODEL}", f"{SERVER}/v1": SERVER},
    ),
    "@ai-sdk/openai": (
        "vercel_ai.mjs",
        {'  name: "peregrine",\n': "", "  includeUsage: true,\n": "", "OpenAICompatible": "OpenAI",
         "@ai-sdk/openai-compatible": "@ai-sdk/openai"},
    ),
    "@ai-sdk/anthropic": (
        "vercel_ai.mjs",
        {'  name: "peregrine",\n': "", "  includeUsage: true,\n": "", "OpenAICompatible": "Anthropic",
         "@ai-sdk/openai-compatible": "@ai-sdk/anthropic"},
    ),
}  # fmt: skip


def run(name: str, source: str, url: str) -> str:
    """What the program prints. It comes by standard input, and so finds its packages beside the recipes."""
    if name.endswith(".py"):
        if not PYTHON.exists():
            pytest.skip("the agent frameworks are not installed: make agents")
        command = [str(PYTHON), "-"]
    else:
        if NODE is None or not (AGENTS / "node_modules").is_dir():
            pytest.skip("node or its packages are not installed: make agents")
        command = [NODE, "--input-type=module", "-"]
    assert SERVER in source
    done = subprocess.run(
        command,
        input=source.replace(SERVER, url),
        cwd=AGENTS,
        env={**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True"},  # it asks the network otherwise
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def check(printed: str) -> None:
    """The model was held to the call, its tool ran here, and the model had its result to answer from."""
    assert re.search(r"^called: Paris$", printed, re.MULTILINE), printed
    assert re.search(r"^answer: \S(.|\n)*24 degrees", printed, re.MULTILINE), printed
    streamed = printed.partition("\nstreamed: ")[2]
    assert "24 degrees" in streamed or streamed == "The capital of France is Paris.\n", printed


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_recipe(recipe, cluster):
    check(run(recipe.name, recipe.read_text(), cluster))


@pytest.mark.parametrize("variant", VARIANTS)
def test_variant(variant, cluster):
    name, changes = VARIANTS[variant]
    source = (AGENTS / "recipes" / name).read_text()
    for old, new in changes.items():
        assert old in source
        source = source.replace(old, new)
    check(run(name, source, cluster))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_the_page_has_the_recipe(recipe):
    language = {".py": "python", ".mjs": "js"}[recipe.suffix]
    assert f"```{language}\n{recipe.read_text()}```\n" in PAGE
