"""Empty latents where ComfyUI wants them."""

from __future__ import annotations

from typing import Any

import comfy.model_management
import torch

from ...allegro_model.geometry import LATENT_CHANNELS, SPATIAL_FACTOR, TEMPORAL_FACTOR, latent_shape
from .compat import intermediate_dtype


def empty_latent(width: int, height: int, num_frames: int, batch_size: int) -> dict[str, Any]:
    """A LATENT of zeros.

    Args:
        width, height: pixels.  num_frames: frames.  batch_size: clips.
    Raises:
        GeometryError: an illegal size.
    """
    shape = (batch_size, LATENT_CHANNELS, *latent_shape(width, height, num_frames))
    samples = torch.zeros(shape, device=comfy.model_management.intermediate_device(), dtype=intermediate_dtype())
    # Newer versions read these when the latent goes into a model of another kind.
    return {"samples": samples, "downscale_ratio_spacial": SPATIAL_FACTOR, "downscale_ratio_temporal": TEMPORAL_FACTOR}
