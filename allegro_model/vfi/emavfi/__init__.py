"""EMA-VFI: motion and appearance by inter-frame attention."""

from .interpolator import EMAInterpolator, best_dtype, pairs_per_batch
from .model import EMAVFI, FLOW_SCALES, FrameFeatures, Prediction

__all__ = ["EMAVFI", "FLOW_SCALES", "EMAInterpolator", "FrameFeatures", "Prediction", "best_dtype", "pairs_per_batch"]
