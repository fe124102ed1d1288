"""Empty latents where ComfyUI wants them."""

from __future__ import annotations

from typing import Any

import comfy.model_management
import torch

from ...allegro_model.geometry import (
    LATENT_CHANNELS,
    SPATIAL_FACTOR,
    TEMPORAL_FACTOR,
    check_memory,
    frames_bytes,
    latent_shape,
)
from .compat import intermediate_dtype


def check_fits(width: int, height: int, num_frames: int, batch_size: int) -> None:
    """Raises if the finished frames could not be held in this machine's memory.

    Raises:
        NotEnoughMemory: with both numbers.
    """
    total = comfy.model_management.get_total_memory(torch.device("cpu"))
    check_memory(f"{batch_size} x {num_frames} frames of {width}x{height}", batch_size * frames_bytes(width, height, num_frames),
                 total, "batch_size 1; fewer frames; a smaller width and height")


def empty_latent(width: int, height: int, num_frames: int, batch_size: int) -> dict[str, Any]:
    """A LATENT of zeros.

    Args:
        width, height: pixels.  num_frames: frames.  batch_size: clips.
    Raises:
        GeometryError: an illegal size.
        NotEnoughMemory: see `check_fits`.
    """
    check_fits(width, height, num_frames, batch_size)
    shape = (batch_size, LATENT_CHANNELS, *latent_shape(width, height, num_frames))
    samples = torch.zeros(shape, device=comfy.model_management.intermediate_device(), dtype=intermediate_dtype())
    # Newer versions read these when the latent goes into a model of another kind.
    return {"samples": samples, "downscale_ratio_spacial": SPATIAL_FACTOR, "downscale_ratio_temporal": TEMPORAL_FACTOR}
