"""Frame interpolation: the frames between two frames.

    model = load_interpolator("ours_small_t.safetensors")
    images = interpolate_clip(images, EMAInterpolator(model), FrameTimes.between_rates(15, 30))
"""

from .emavfi import (
    EMAVFI,
    FLOW_SCALES,
    EMAInterpolator,
    FrameFeatures,
    Prediction,
    best_dtype,
    pairs_per_batch,
)
from .interpolate import Interpolator, Progress, interpolate_clip, interpolate_stream
from .scenes import DEFAULT_THRESHOLD
from .times import MAX_MULTIPLIER, FrameTimes, is_reached_by_halving

__all__ = [
    "DEFAULT_THRESHOLD",
    "EMAVFI",
    "FLOW_SCALES",
    "MAX_MULTIPLIER",
    "EMAInterpolator",
    "FrameFeatures",
    "FrameTimes",
    "Interpolator",
    "Prediction",
    "Progress",
    "best_dtype",
    "interpolate_clip",
    "interpolate_stream",
    "is_reached_by_halving",
    "pairs_per_batch",
]
