"""Text to calibrate and to measure on, made of what every Python carries: its manual and its library.

There is no dataset to download and none to go stale; reports carry the text's SHA-256, because another
Python version carries another text. Two thirds of it are prose (the language reference of
`pydoc_data.topics`), one third is code (modules of the standard library).
"""

import hashlib
import random
import re
import sysconfig
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.errors import QualityError

# Modules that no supported Python lacks; together about half as much text as the manual.
_MODULES = (
    "calendar",
    "cmd",
    "csv",
    "filecmp",
    "fileinput",
    "fractions",
    "graphlib",
    "heapq",
    "queue",
    "shlex",
    "textwrap",
)
_PROSE_PER_CODE = 2
_PIECE_CHARS = 4000  # about a thousand tokens
_MIN_TOPIC_CHARS = 200
_SEED = 0


def calibration_documents() -> list[str]:
    """The half of the text that a quantizer may look at; never measured on.

    Raises:
        QualityError: this Python was installed without its manual or its library's sources.
    """
    return list(_halves()[0])


def heldout_documents() -> list[str]:
    """The half of the text that quality is measured on; shares no paragraph with the other.

    Raises:
        QualityError: this Python was installed without its manual or its library's sources.
    """
    return list(_halves()[1])


def documents_of_file(path: Path) -> list[str]:
    """The user's own held-out text, as a single document.

    Raises:
        QualityError: there is no such file, it is not UTF-8, or it is empty.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise QualityError(f"text: {path} cannot be read as UTF-8: {error}") from None
    if not text.strip():
        raise QualityError(f"text: {path} is empty")
    return [text]


def content_sha256(documents: Sequence[str]) -> str:
    """SHA-256 (hexadecimal) of the documents, their borders included."""
    digest = hashlib.sha256()
    for document in documents:
        content = document.encode()
        digest.update(len(content).to_bytes(8, "little") + content)
    return digest.hexdigest()


def token_windows(tokenizer: Any, documents: Sequence[str], count: int, length: int) -> Tensor:
    """int64 [count, length]: windows of tokens, each from the start or from within one document.

    Every window starts with the tokenizer's BOS where it has one. Documents give one window each, then a
    second one each, and so on, so that few windows already cover many documents.

    Raises:
        QualityError: the text is too short.
    """
    bos = tokenizer.bos_token_id if _adds_bos(tokenizer) else None
    body = length - (bos is not None)
    tokens = [tokenizer(d, add_special_tokens=False)["input_ids"] for d in documents]
    windows = []
    for start in range(0, max(map(len, tokens), default=0), body):
        for ids in tokens:
            window = ids[start : start + body]
            if len(window) == body:
                windows.append([bos, *window] if bos is not None else window)
            if len(windows) == count:
                return torch.tensor(windows)
    raise QualityError(f"text: gives {len(windows)} windows of {length} tokens, {count} are needed")


@cache
def _halves() -> tuple[tuple[str, ...], tuple[str, ...]]:
    prose, code = _split(_topics()), _split(_modules())
    first, second = (_interleave(p, c) for p, c in zip(prose, code, strict=True))
    return first, second


def _topics() -> dict[str, str]:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise QualityError("this Python has no pydoc_data.topics; give a text file") from None
    return _without_repetition(topics)


def _without_repetition(topics: dict[str, str]) -> dict[str, str]:
    """Each paragraph once: short topics repeat passages of long ones, which would leak between the halves."""
    seen: set[str] = set()
    kept: dict[str, str] = {}
    for name, text in sorted(topics.items(), key=lambda item: (-len(item[1]), item[0])):
        fresh = []
        for paragraph in _paragraphs(text):
            if (key := " ".join(paragraph.split())) not in seen:
                seen.add(key)
                fresh.append(paragraph)
        document = "\n\n".join(fresh)
        if len(document) >= _MIN_TOPIC_CHARS:
            kept[name] = document
    return kept


def _modules() -> dict[str, str]:
    library = Path(sysconfig.get_path("stdlib"))
    try:
        return {name: (library / f"{name}.py").read_text(encoding="utf-8") for name in _MODULES}
    except OSError as error:
        raise QualityError(f"this Python lacks its library's sources; give a text file ({error})") from None


def _split(documents: dict[str, str]) -> tuple[list[str], list[str]]:
    """Whole documents, longest first, each to the half that has less: equal sizes without chance."""
    halves: tuple[list[str], list[str]] = ([], [])
    for _, text in sorted(documents.items(), key=lambda item: (-len(item[1]), item[0])):
        min(halves, key=lambda half: sum(map(len, half))).append(text)
    return halves


def _interleave(prose: Iterable[str], code: Iterable[str]) -> tuple[str, ...]:
    """Pieces in a fixed random order, whichever kind is behind its share of the characters next."""
    shuffle = random.Random(_SEED).shuffle
    kinds = [[piece for text in texts for piece in _pieces(text)] for texts in (prose, code)]
    for pieces in kinds:
        shuffle(pieces)
    taken, result = [0.0, 0.0], []
    while any(kinds):
        kind = 0 if not kinds[1] or (kinds[0] and taken[0] <= _PROSE_PER_CODE * taken[1]) else 1
        piece = kinds[kind].pop()
        taken[kind] += len(piece)
        result.append(piece)
    return tuple(result)


def _pieces(text: str) -> list[str]:
    """Cut between paragraphs, so that no single topic or module fills a whole window after window."""
    pieces: list[str] = []
    piece: list[str] = []
    size = 0
    for paragraph in _paragraphs(text):
        if piece and size + len(paragraph) > _PIECE_CHARS:
            pieces.append("\n\n".join(piece))
            piece, size = [], 0
        piece.append(paragraph)
        size += len(paragraph)
    pieces.append("\n\n".join(piece))
    return pieces


def _paragraphs(text: str) -> list[str]:
    return re.split(r"\n[ \t]*\n", text.strip("\n"))


def _adds_bos(tokenizer: Any) -> bool:
    ids = tokenizer("a")["input_ids"]
    return tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]
