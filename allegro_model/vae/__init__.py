"""The VideoVAE: frames <-> latents, 4x8x8 smaller, tile by tile."""

from .batching import cells_of, decoding_bytes, encoding_bytes, several_at_once
from .model import VideoVAE
from .scaling import denormalise, normalise
from .tiling import Tiling

__all__ = ["Tiling", "VideoVAE", "cells_of", "decoding_bytes", "denormalise", "encoding_bytes", "normalise", "several_at_once"]
