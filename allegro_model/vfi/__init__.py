"""Frame interpolation: the frames between two frames."""

from .emavfi import EMAVFI, FLOW_SCALES, FrameFeatures, Prediction

__all__ = ["EMAVFI", "FLOW_SCALES", "FrameFeatures", "Prediction"]
