"""Text for calibration and for measuring, from the Python that runs: no download, the same everywhere.

Prose comes from the language reference (`pydoc_data.topics`) and from docstrings, code from the standard
library. Documents go to calibration or to the held-out half by turns, so that neither holds a piece of a
document of the other.
"""

import ast
import hashlib
import importlib.util
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.errors import ParameterError

_MODULES = (
    "argparse bisect calendar collections concurrent.futures configparser contextlib copy csv dataclasses "
    "datetime decimal difflib doctest email.message enum fractions functools gettext heapq html http.client "
    "http.server imaplib inspect ipaddress json.decoder logging mailbox mimetypes multiprocessing.pool "
    "optparse pathlib pickle pickletools plistlib pprint random selectors shelve shutil smtplib socketserver "
    "ssl statistics string subprocess tarfile tempfile textwrap threading timeit tokenize traceback turtle "
    "typing unittest.case unittest.mock urllib.parse urllib.request uuid weakref xml.dom.minidom zipfile"
)
_MIN_CHARACTERS = 600
_MAX_CHARACTERS = 12_000


@cache
def _documents() -> tuple[str, ...]:
    """Prose and code by turns, two of prose to one of code, in an order that is always the same."""
    from pydoc_data.topics import topics

    prose = [topics[name] for name in sorted(topics)]
    code = []
    for name in _MODULES.split():
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            continue
        source = Path(spec.origin).read_text(encoding="utf-8")
        code.append(source)
        prose.append(_docstrings(source))
    prose, code = (
        sorted((d[:_MAX_CHARACTERS] for d in documents if len(d) >= _MIN_CHARACTERS), key=_digest)
        for documents in (prose, code)
    )
    mixed = []
    for i, document in enumerate(prose):
        mixed.append(document)
        if i % 2 and i // 2 < len(code):
            mixed.append(code[i // 2])
    return tuple(mixed)


def calibration_documents() -> list[str]:
    """The half that quantization may look at."""
    return list(_documents()[0::2])


def heldout_documents() -> list[str]:
    """The half that only measures."""
    return list(_documents()[1::2])


def read_documents(path: Path) -> list[str]:
    """One document of a text file, cut at lines into pieces. Raises ParameterError when it has no text."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ParameterError("text", f"{path} cannot be read as UTF-8 text: {error}") from None
    pieces, piece = [], ""
    for line in text.splitlines(keepends=True):
        if len(piece) + len(line) > _MAX_CHARACTERS and piece:
            pieces.append(piece)
            piece = ""
        piece += line
    pieces = [p for p in [*pieces, piece] if p.strip()]
    if not pieces:
        raise ParameterError("text", f"{path} holds no text")
    return pieces


def digest(documents: Sequence[str]) -> str:
    """sha256 of the documents, for reports."""
    return hashlib.sha256("\0".join(documents).encode()).hexdigest()


def token_windows(tokenizer: Any, documents: Sequence[str], count: int, length: int) -> Tensor:
    """int64 [count, length]: windows of tokens, each from the start or from within one document.

    Every window starts with the tokenizer's BOS where it has one. Documents give one window each, then a
    second one each, and so on, so that few windows already cover many documents.

    Raises:
        ParameterError: the text is too short.
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
    raise ParameterError("text", f"gives {len(windows)} windows of {length} tokens, {count} are needed")


def _adds_bos(tokenizer: Any) -> bool:
    ids = tokenizer("a")["input_ids"]
    return tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]


def _docstrings(source: str) -> str:
    return "\n\n".join(_each_docstring(ast.parse(source)))


def _each_docstring(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text and len(text) > 80:
                yield text


def _digest(document: str) -> str:
    return hashlib.sha256(document.encode()).hexdigest()
