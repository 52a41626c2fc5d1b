"""A small random Llama with a byte-level tokenizer: exact in float32, with the tokens that one asks for."""

from pathlib import Path

from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from engine import EngineConfig
from tests.engine.helpers import save_random_llama

NAME = "small"
_CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def save_small_model(directory: Path, special_tokens: tuple[str, ...] = ()) -> LlamaForCausalLM:
    """One token for each byte; `special_tokens` come behind them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", additional_special_tokens=list(special_tokens)
    )
    tokenizer.chat_template = _CHAT
    model = save_random_llama(
        directory,
        vocab_size=len(tokenizer),
        max_position_embeddings=1024,
        eos_token_id=tokenizer.eos_token_id,
    )
    tokenizer.save_pretrained(directory)
    return model


def small_engine_config(directory: Path) -> EngineConfig:
    return EngineConfig(
        model=str(directory), served_model_name=NAME, num_blocks=256, device="cpu", dtype="float32"
    )
