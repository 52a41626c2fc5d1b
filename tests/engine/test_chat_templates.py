"""Templates with tools, and special tokens that stay in the text."""

import pytest

from engine.checkpoint import open_checkpoint
from engine.errors import ParameterError
from engine.tokenizer import IncrementalDetokenizer, Tokenizer

pytestmark = pytest.mark.model

HELLO = [{"role": "user", "content": "Hello"}]
TOOLS = [
    {
        "type": "function",
        "function": {"name": "f", "description": "Does f.", "parameters": {"type": "object"}},
    }
]
WITH_TOOLS = (
    "{% for t in tools or [] %}[{{ t.function.name }}: {{ t.function.parameters | tojson }}]{% endfor %}"
)
CALLS = (
    "{% for m in messages %}{% for c in m.tool_calls or [] %}{{ c.function.arguments.city }}{% endfor %}"
    "{{ m.content }}{% endfor %}"
)


@pytest.fixture
def hf(smollm2):
    return open_checkpoint(smollm2).load_tokenizer()


def rendered(tokenizer: Tokenizer, messages=HELLO, **kw) -> str:
    return tokenizer.decode(tokenizer.apply_chat_template(messages, **kw), skip_special_tokens=False)


def test_tools_reach_the_template(hf):
    hf.chat_template = WITH_TOOLS
    tokenizer = Tokenizer(hf)
    assert rendered(tokenizer, tools=TOOLS) == '[f: {"type": "object"}]'
    assert rendered(tokenizer) == ""


def test_arguments_are_objects_to_the_template(hf):
    hf.chat_template = CALLS
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": {"city": "Rome"}}}
    assert rendered(Tokenizer(hf), [{"role": "assistant", "content": "!", "tool_calls": [call]}]) == "Rome!"


def test_a_template_for_tools_alone(hf):
    hf.chat_template = {"default": "plain", "tool_use": "with tools"}
    tokenizer = Tokenizer(hf)
    assert tokenizer.chat_template(has_tools=True) == rendered(tokenizer, tools=TOOLS) == "with tools"
    assert tokenizer.chat_template(has_tools=False) == rendered(tokenizer) == "plain"


def test_a_template_that_refuses(hf):
    hf.chat_template = "{{ raise_exception('no tools here') }}"
    with pytest.raises(ParameterError, match="no tools here"):
        Tokenizer(hf).apply_chat_template(HELLO, tools=TOOLS)


def test_visible_tokens_stay_in_the_text(hf):
    tokenizer = Tokenizer(hf)
    text = "é <|im_start|>{“x”: 1}<|im_end|> é"
    ids = tokenizer.encode(text, add_special_tokens=False)

    def detokenized(*visible: str) -> str:
        stream = IncrementalDetokenizer(tokenizer, [tokenizer.token_id(token) for token in visible])
        return "".join(map(stream.step, ids)) + stream.flush()

    assert detokenized() == "é {“x”: 1} é"
    assert detokenized("<|im_start|>") == "é <|im_start|>{“x”: 1} é"
    assert detokenized("<|im_start|>", "<|im_end|>") == text
