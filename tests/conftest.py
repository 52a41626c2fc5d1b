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


def pytest_asyncio_loop_factories():
    """The event loop that Ray Serve's replicas run on: it differs from asyncio's own."""
    return {"uvloop": uvloop.new_event_loop}


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The default model's GGUF file (`make setup` fetches it; here it is fetched if it is not there yet)."""
    from deploy.models import fetch_default_model

    return fetch_default_model()
