"""Cuts and stills: pairs of frames between which nothing is to be invented."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_SIDE = 32  # of the thumbnails
_WINDOW = 8  # in which structure is compared
# Constants of SSIM for values in [0, 1]: Wang et al. 2004, "Image quality assessment", section III.
_C1, _C2 = 0.01**2, 0.03**2
DEFAULT_THRESHOLD = 0.2


def thumbnail(frame: Tensor) -> Tensor:
    """[3, H, W] in [0, 1] -> [1, 1, 32, 32], the mean of the colours."""
    if frame.device.type == "mps":  # pools to sizes that divide the frame's only
        frame = frame.cpu()
    return F.adaptive_avg_pool2d(frame.float()[None], (_SIDE, _SIDE)).mean(dim=1, keepdim=True)


def similarity(first: Tensor, second: Tensor) -> float:
    """How much two thumbnails have in common: 1 for equal ones, about 0 for unrelated ones.

    The structural similarity (SSIM), averaged over windows; light that changes in all of the picture counts little.
    """
    def mean(x: Tensor) -> Tensor:
        return F.avg_pool2d(x, _WINDOW, stride=_WINDOW // 2)

    a, b = mean(first), mean(second)
    var_a, var_b = mean(first * first) - a * a, mean(second * second) - b * b
    covariance = mean(first * second) - a * b
    ssim = (2 * a * b + _C1) * (2 * covariance + _C2) / ((a * a + b * b + _C1) * (var_a + var_b + _C2))
    return float(ssim.mean())


def is_cut(first: Tensor, second: Tensor, threshold: float) -> bool:
    """Whether the scene changes between two thumbnails: their similarity is below `threshold`; never if that is 0."""
    return threshold > 0 and similarity(first, second) < threshold


def is_still(first: Tensor, second: Tensor) -> bool:
    """Whether two frames are the same, bit for bit."""
    return torch.equal(first, second)
