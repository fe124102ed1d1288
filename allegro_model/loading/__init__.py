"""Checkpoints: finding files, recognising them, building models from them."""

from .files import Checkpoint, Header, read_checkpoint, read_header

__all__ = ["Checkpoint", "Header", "read_checkpoint", "read_header"]
