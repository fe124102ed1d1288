"""Classifier-free guidance. Source: arXiv 2207.12598."""

from __future__ import annotations

import math

from torch import Tensor

from ..errors import ScheduleError


def check_guidance(guidance_scale: float) -> None:
    """Raises unless the weight is a finite number of at least 0.

    Raises:
        ScheduleError: negative, infinite or NaN.
    """
    if not math.isfinite(guidance_scale) or guidance_scale < 0:
        raise ScheduleError(f"guidance scale (cfg) {guidance_scale!r}: must be a finite number of at least 0; "
                            "1 turns guidance off, the released text-to-video model was made for 7.5.")


def guide(positive: Tensor, negative: Tensor, guidance_scale: float) -> Tensor:
    """negative + scale * (positive - negative), for predictions of the same shape."""
    return negative + guidance_scale * (positive - negative)
