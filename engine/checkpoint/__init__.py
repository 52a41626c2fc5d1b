"""Checkpoint loading: one face for Hugging Face directories and GGUF files."""

from engine.checkpoint.loading import Checkpoint, open_checkpoint

__all__ = ["Checkpoint", "open_checkpoint"]
