"""Fixtures shared by all rooms."""

import os
from pathlib import Path

import pytest
import torch
import uvloop

if not torch.cuda.is_available():
    # Triton's interpreter is chosen when triton is first imported, which may be by any test.
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def event_loop_policy():
    """The event loop that Ray Serve's replicas run on: it differs from asyncio's own.

    pytest-asyncio's newer hook makes a loop's factory a parameter of each test, by which pytest sorts them.
    """
    return uvloop.EventLoopPolicy()


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The default model's GGUF file (`make setup` fetches it; here it is fetched if it is not there yet)."""
    from deploy.models import fetch_default_model

    return fetch_default_model()
