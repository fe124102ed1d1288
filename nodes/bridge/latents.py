"""Empty latents where ComfyUI wants them."""

from __future__ import annotations

from typing import Any

import comfy.model_management
import torch

from ...allegro_model.geometry import (
    LATENT_CHANNELS,
    MAX_FRAMES,
    MAX_PIXELS,
    PIXEL_MULTIPLE,
    SPATIAL_FACTOR,
    TEMPORAL_FACTOR,
    check_memory,
    check_multiple,
    frames_bytes,
    latent_shape,
)
from .compat import intermediate_dtype

MAX_BATCH = 64


def check_fits(width: int, height: int, num_frames: int, batch_size: int) -> None:
    """Raises if the finished frames could not be held in this machine's memory.

    Raises:
        NotEnoughMemory: with both numbers.
    """
    total = comfy.model_management.get_total_memory(torch.device("cpu"))
    check_memory(f"{batch_size} x {num_frames} frames of {width}x{height}", batch_size * frames_bytes(width, height, num_frames),
                 total, "batch_size 1; fewer frames; a smaller width and height")


def check_clip(width: int | None, height: int | None, length: int | None, batch_size: int | None) -> None:
    """Raises unless the widgets of a clip are legal and it fits; None is not known yet.

    Raises:
        GeometryError: an illegal size.
        NotEnoughMemory: see `check_fits`.
    """
    for name, value, multiple, maximum in (("width", width, PIXEL_MULTIPLE, MAX_PIXELS),
                                           ("height", height, PIXEL_MULTIPLE, MAX_PIXELS),
                                           ("length", length, TEMPORAL_FACTOR, MAX_FRAMES),
                                           ("batch_size", batch_size, 1, MAX_BATCH)):
        if value is not None:
            check_multiple(name, value, multiple, maximum)
    if width is not None and height is not None and length is not None:
        check_fits(width, height, length, batch_size or 1)


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
