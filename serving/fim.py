"""Fill-in-the-middle (Bavarian et al. 2022): how families of code models want prefix and suffix written.

A family is known by its tokens: whatever a checkpoint is called, its vocabulary has them, or it was not
trained for this.
"""

from dataclasses import dataclass

from engine import InferenceEngine, ParameterError


@dataclass(frozen=True, slots=True)
class FimTemplate:
    """The prompt is `layout`, whose words "prefix" and "suffix" stand for the texts, all others for tokens.

    ends: tokens behind the middle, that is, of what comes after it in the training data; those that the
        vocabulary lacks are left out.
    """

    family: str
    layout: tuple[str, ...]
    ends: tuple[str, ...] = ()

    @property
    def marks(self) -> tuple[str, ...]:
        return tuple(part for part in self.layout if part not in _TEXTS)


_TEXTS = ("prefix", "suffix")

TEMPLATES = (
    FimTemplate("CodeLlama", ("▁<PRE>", "prefix", "▁<SUF>", "suffix", "▁<MID>"), ("▁<EOT>",)),
    FimTemplate(
        "StarCoder, StarCoder2, Granite Code",
        ("<fim_prefix>", "prefix", "<fim_suffix>", "suffix", "<fim_middle>"),
        ("<file_sep>", "<fim_pad>", "<|endoftext|>"),
    ),
    FimTemplate(
        "Qwen2.5-Coder, CodeGemma",
        ("<|fim_prefix|>", "prefix", "<|fim_suffix|>", "suffix", "<|fim_middle|>"),
        ("<|file_sep|>", "<|file_separator|>", "<|repo_name|>", "<|fim_pad|>", "<|endoftext|>"),
    ),
    FimTemplate(
        "DeepSeek-Coder",
        ("<｜fim▁begin｜>", "prefix", "<｜fim▁hole｜>", "suffix", "<｜fim▁end｜>"),
        ("<|EOT|>",),
    ),
    # Its suffix comes first, so that the prefix goes over into the middle without a mark.
    FimTemplate("Codestral", ("[SUFFIX]", "suffix", "[PREFIX]", "prefix")),
)


@dataclass(frozen=True, slots=True)
class Fim:
    """The template of the served model, in its own token ids."""

    template: FimTemplate
    mark_ids: dict[str, int]
    stop_token_ids: tuple[int, ...]

    async def prompt(self, engine: InferenceEngine, prefix: str | list[int], suffix: str) -> list[int]:
        """Token ids from which the middle is continued, behind what the tokenizer begins every text with."""
        texts = {
            "prefix": prefix if isinstance(prefix, list) else await _encode(engine, prefix),
            "suffix": await _encode(engine, suffix),
        }
        token_ids = await engine.tokenize("")
        for part in self.template.layout:
            token_ids += texts[part] if part in texts else [self.mark_ids[part]]
        return token_ids


def find_fim(engine: InferenceEngine) -> Fim:
    """Raises ParameterError("suffix", ...) for a model whose vocabulary has the tokens of no family."""
    for template in TEMPLATES:
        ids = {mark: engine.token_id(mark) for mark in template.marks}
        found = {mark: token_id for mark, token_id in ids.items() if token_id is not None}
        if len(found) == len(ids):
            ends = (engine.token_id(token) for token in template.ends)
            return Fim(template, found, tuple(i for i in ends if i is not None))
    families = "; ".join(t.family for t in TEMPLATES)
    raise ParameterError(
        "suffix",
        f"the model '{engine.model.name}' cannot fill in the middle: its tokenizer has the special tokens of "
        f"none of these families: {families}",
    )


async def _encode(engine: InferenceEngine, text: str) -> list[int]:
    return await engine.tokenize(text, add_special_tokens=False)
