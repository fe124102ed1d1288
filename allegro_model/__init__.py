"""Allegro text-to-video in plain PyTorch: the networks, sampling, loading, and a command line.

    from allegro_model import AllegroPipeline
    frames = AllegroPipeline.from_pretrained("tiny")("a red circle moves right over a blue background")
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .errors import AllegroError

if TYPE_CHECKING:
    from .config import DiTConfig, SamplingConfig, VAEConfig
    from .dit import AllegroDiT
    from .loading import load_dit, load_text_encoder, load_vae
    from .pipeline import AllegroPipeline
    from .text import TextEncoder, clean_caption
    from .vae import Tiling, VideoVAE

__version__ = "0.1.0"

__all__ = [
    "AllegroDiT", "AllegroError", "AllegroPipeline", "DiTConfig", "SamplingConfig", "TextEncoder", "Tiling",
    "VAEConfig", "VideoVAE", "clean_caption", "load_dit", "load_text_encoder", "load_vae",
]

# Found when asked for, not before: `client` and the command `submit` work where there is no PyTorch.
_MODULES = {
    "AllegroDiT": "dit", "AllegroPipeline": "pipeline", "DiTConfig": "config", "SamplingConfig": "config",
    "TextEncoder": "text", "Tiling": "vae", "VAEConfig": "config", "VideoVAE": "vae", "clean_caption": "text",
    "load_dit": "loading", "load_text_encoder": "loading", "load_vae": "loading",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)
