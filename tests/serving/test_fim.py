"""Templates of fill-in-the-middle by the tokens of a vocabulary."""

import pytest

from engine import ParameterError
from serving.fim import TEMPLATES, find_fim


class _Vocabulary:
    """As much of an engine as the templates ask for: each character is a token, so is each special one."""

    def __init__(self, *special: str) -> None:
        self.special = {token: 1000 + i for i, token in enumerate(special)}
        self.model = type("Model", (), {"name": "m"})

    def token_id(self, token: str) -> int | None:
        return self.special.get(token)

    async def tokenize(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [1] * add_special_tokens + [ord(c) for c in text]


@pytest.mark.parametrize(
    ("tokens", "layout", "ends"),
    [
        (["▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>"], "0 p 1 s 2", [3]),
        (["<fim_prefix>", "<fim_suffix>", "<fim_middle>"], "0 p 1 s 2", []),
        (["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|fim_pad|>"], "0 p 1 s 2", [3]),
        (["<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>", "<|EOT|>"], "0 p 1 s 2", [3]),
        (["[PREFIX]", "[SUFFIX]"], "1 s 0 p", []),
    ],
    ids=[t.family for t in TEMPLATES],
)
async def test_every_family(tokens, layout, ends):
    vocabulary = _Vocabulary(*tokens)
    fim = find_fim(vocabulary)
    texts = {"p": [ord("a")], "s": [ord("b"), ord("c")]}
    expected = [1]
    for part in layout.split():
        expected += texts[part] if part in texts else [1000 + int(part)]
    assert await fim.prompt(vocabulary, "a", "bc") == expected
    assert fim.stop_token_ids == tuple(1000 + i for i in ends)


def test_a_model_without_the_tokens_is_told_so():
    with pytest.raises(ParameterError, match="'m' cannot fill in the middle") as error:
        find_fim(_Vocabulary("<fim_prefix>", "<fim_suffix>"))
    assert error.value.field == "suffix"
