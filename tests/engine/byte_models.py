"""Small random models with a tokenizer: one token a byte, and a few of several bytes."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from engine.tokenizer import _byte_level_alphabet
from tests.engine.helpers import save_random_llama
from tests.engine.packed_models import pack_checkpoint

PAD, EOS = 0, 1
VOCAB_SIZE = 285  # with rows that have no token
_PAIRS = ['{"', '":', '",', '"}', "],", "[1", "12", "tr", "ue"]


def byte_llama(directory: Path, *, is_packed: bool = False) -> Path:
    """A random Llama that likes brackets, quotes and the end little enough to write more than one token.

    is_packed: its weights are packed, as the GPU's runner wants them.
    """
    model = save_random_llama(
        directory,
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=256,
        head_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=1024,
        initializer_range=0.06,
        eos_token_id=EOS,
    )
    with torch.no_grad():  # as in trained models, the next token depends on the last one first of all
        model.get_input_embeddings().weight *= 8.0
    model.save_pretrained(directory)
    if is_packed:
        pack_checkpoint(directory)
    _tokenizer().save_pretrained(directory)
    return directory


def _tokenizer() -> PreTrainedTokenizerFast:
    of_byte = {b: c for c, b in _byte_level_alphabet().items()}
    vocab = {"<pad>": PAD, "<eos>": EOS, **{of_byte[b]: 2 + b for b in range(256)}}
    for pair in _PAIRS:
        vocab[pair] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[(p[0], p[1]) for p in _PAIRS]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")
