"""EMA-VFI: motion and appearance by inter-frame attention."""

from .model import EMAVFI, FLOW_SCALES, FrameFeatures, Prediction

__all__ = ["EMAVFI", "FLOW_SCALES", "FrameFeatures", "Prediction"]
