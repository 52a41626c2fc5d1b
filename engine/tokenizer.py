"""The model's tokenizer: encoding, chat template, incremental detokenization."""

from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache
from typing import Any

from jinja2.exceptions import TemplateError
from tokenizers.decoders import DecodeStream

from engine.errors import ParameterError
from engine.outputs import TokenLogprob

_SPACE_MARK = "▁"  # SentencePiece's stand-in for a space


class Tokenizer:
    """A transformers fast tokenizer behind the few calls that the engine needs."""

    def __init__(self, hf_tokenizer: Any) -> None:
        self._hf = hf_tokenizer
        self.backend = hf_tokenizer.backend_tokenizer
        self._special_ids = frozenset(hf_tokenizer.all_special_ids)
        self._bytes_of_char = _byte_level_alphabet()
        self._is_byte_level = "ByteLevel" in str(type(self.backend.decoder)) or "ByteLevel" in str(
            self.backend.decoder
        )
        self.token_bytes = lru_cache(maxsize=None)(self._token_bytes)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        ids: list[int] = self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def token_id(self, token: str) -> int | None:
        """Id of a token by its exact string in the vocabulary; None where there is none."""
        token_id: int | None = self.backend.token_to_id(token)
        return token_id

    def token(self, token_id: int) -> str:
        """The token as the vocabulary spells it; empty for an id that has none."""
        return self.backend.id_to_token(token_id) or ""

    def chat_template(self, *, has_tools: bool) -> str | None:
        """The template's source; some checkpoints have another one for conversations with tools."""
        template: str | Mapping[str, str] | None = self._hf.chat_template
        if isinstance(template, Mapping):
            return (template.get("tool_use") if has_tools else None) or template.get("default")
        return template

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """Token ids of the conversation and, where asked for, the opening of the assistant's turn.

        tools: what the model may call, as Hugging Face's templates take it: {"type": "function", "function":
            {"name", "description", "parameters"}}. None, not empty, where there are none.

        Raises ParameterError("messages", ...) when there is no template or it refuses.
        """
        if not self._hf.chat_template:
            raise ParameterError("messages", "the model has no chat template; use the completions endpoint")
        try:
            text: str = self._hf.apply_chat_template(
                [dict(m) for m in messages],
                tools=None if tools is None else [dict(t) for t in tools],
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        except (TemplateError, ValueError, TypeError, KeyError) as error:
            raise ParameterError("messages", f"the chat template refuses the conversation: {error}") from None
        return self.encode(text, add_special_tokens=False)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of the tokens; unfinished characters become U+FFFD."""
        text: str = self.backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return text

    def describe(self, token_id: int, logprob: float) -> TokenLogprob:
        raw = self.token_bytes(token_id)
        return TokenLogprob(token_id, raw.decode("utf-8", errors="replace"), raw, logprob)

    def _token_bytes(self, token_id: int) -> bytes:
        token = self.backend.id_to_token(token_id)
        if token is None:  # padding rows of the embedding have no token
            return b""
        if token_id in self._special_ids:
            return token.encode()
        if self._is_byte_level:
            table = self._bytes_of_char
            if all(c in table for c in token):
                return bytes(table[c] for c in token)
            return token.encode()
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes([int(token[3:5], 16)])
        return token.replace(_SPACE_MARK, " ").encode()


class IncrementalDetokenizer:
    """Turns tokens into text as they come, never giving out a part of a character.

    What has been given out, after `flush`, equals `Tokenizer.decode` of all tokens.

    visible_ids: of special tokens that stay in the text.
    """

    def __init__(self, tokenizer: Tokenizer, visible_ids: Collection[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._visible_ids = visible_ids
        self._begin()

    def _begin(self) -> None:
        self._stream = DecodeStream(skip_special_tokens=True)
        self._token_ids: list[int] = []
        self._num_chars = 0

    def step(self, token_id: int) -> str:
        """Text that became certain with this token; empty while a character is unfinished."""
        if token_id in self._visible_ids:
            text = self.flush() + self._tokenizer.token(token_id)
            self._begin()
            return text
        self._token_ids.append(token_id)
        text = self._stream.step(self._tokenizer.backend, token_id) or ""
        self._num_chars += len(text)
        return text

    def flush(self) -> str:
        """What is still held back; bytes that form no character become U+FFFD."""
        return self._tokenizer.decode(self._token_ids)[self._num_chars :]


def _byte_level_alphabet() -> dict[str, int]:
    """Byte-level BPE's printable stand-in of every byte (GPT-2, Radford et al. 2019), reversed."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(b): b for b in printable}
    others = [b for b in range(256) if b not in set(printable)]
    table.update({chr(0x100 + i): b for i, b in enumerate(others)})
    return table
