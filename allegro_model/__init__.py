"""Allegro text-to-video in plain PyTorch: the networks, sampling, loading, and a command line.

    from allegro_model import AllegroPipeline
    frames = AllegroPipeline.from_pretrained("tiny")("a red circle moves right over a blue background")
"""

from .config import DiTConfig, SamplingConfig, VAEConfig
from .dit import AllegroDiT
from .errors import AllegroError
from .loading import load_dit, load_text_encoder, load_vae
from .pipeline import AllegroPipeline
from .text import TextEncoder, clean_caption
from .vae import Tiling, VideoVAE

__version__ = "0.1.0"

__all__ = [
    "AllegroDiT", "AllegroError", "AllegroPipeline", "DiTConfig", "SamplingConfig", "TextEncoder", "Tiling",
    "VAEConfig", "VideoVAE", "clean_caption", "load_dit", "load_text_encoder", "load_vae",
]
