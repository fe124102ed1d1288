"""The VideoVAE: frames <-> latents, 4x8x8 smaller, tile by tile."""

from .batching import decoding_bytes, encoding_bytes
from .model import VideoVAE
from .scaling import denormalise, normalise
from .tiling import Tiling

__all__ = ["Tiling", "VideoVAE", "decoding_bytes", "denormalise", "encoding_bytes", "normalise"]
