"""EMA-VFI as the loop over a clip wants it."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...errors import NonFiniteError
from .model import EMAVFI, FrameFeatures, crop, pad_multiple

logger = logging.getLogger(__name__)

# Small frames leave a GPU idle: so many pixels at once are about one frame of 1920x1088.
_PIXELS_PER_BATCH = 1920 * 1088
_MAX_PAIRS = 16


class EMAInterpolator:
    """An `Interpolator` made of an EMA-VFI model.

    When a computation in half precision gives NaN or Inf, everything from there on is computed in float32, by a
    copy of the model.

    Args:
        model: on the device that is to be used, in the type to compute in; it is left as it is.
        flow_scale: 1, 0.5 or 0.25; see `EMAVFI.extract_features`.
        tta: test-time augmentation: twice the time, slightly better.
        device: where to compute; default where the weights are, which a host may keep elsewhere.
    Raises:
        GeometryError: another flow scale.
    """

    def __init__(self, model: EMAVFI, *, flow_scale: float = 1.0, tta: bool = False,
                 device: torch.device | None = None) -> None:
        pad_multiple(flow_scale)  # raises
        self.model = model
        self.device = next(model.parameters()).device if device is None else device
        self.arbitrary_time = model.config.arbitrary_time
        self.options: dict[str, Any] = {"flow_scale": flow_scale, "tta": tta}

    @torch.inference_mode()
    def features(self, frame: Tensor) -> FrameFeatures:
        """[3, H, W] in [0, 1] on any device."""
        return self.model.extract_features(frame[None].to(self.device), **self.options)

    @torch.inference_mode()
    def between(self, first: Sequence[FrameFeatures], second: Sequence[FrameFeatures],
                positions: Sequence[float]) -> list[Tensor]:
        """See `Interpolator`."""
        try:
            return self._between(first, second, positions)
        except NonFiniteError as error:
            if self.model.dtype == torch.float32:
                raise
            logger.warning("%s Computing in float32 from here on.", error)
        self.model = self._in_float32()
        return self._between(first, second, positions)

    def _between(self, first: Sequence[FrameFeatures], second: Sequence[FrameFeatures],
                 positions: Sequence[float]) -> list[Tensor]:
        before, after = (FrameFeatures.stack([self._current(f) for f in side]) for side in (first, second))
        return self.model.between(before, after, positions)

    def _current(self, features: FrameFeatures) -> FrameFeatures:
        """Features in the model's type: those of before a change of type are worked out again."""
        if features.stages.tokens.dtype == self.model.dtype:
            return features
        return self.model.extract_features(crop(features.frame, features.padding), **self.options)

    def _in_float32(self) -> EMAVFI:
        """The model, computing in float32; the given one is left as it is."""
        return copy.deepcopy(self.model).float()


def pairs_per_batch(width: int, height: int, device: torch.device) -> int:
    """How many pairs to work on at once: on a CPU one, which is as fast; elsewhere as many as fill it."""
    if device.type == "cpu":
        return 1
    return max(1, min(_MAX_PAIRS, _PIXELS_PER_BATCH // (width * height)))


def best_dtype(device: torch.device) -> torch.dtype:
    """What "auto" computes in: float16 on CUDA, bfloat16 on a CPU that multiplies it, else the reference's float32."""
    if device.type == "cuda":
        return torch.float16
    if device.type == "cpu":
        for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):  # absent from older PyTorch
            if getattr(torch.cpu, name, bool)():
                return torch.bfloat16
    return torch.float32
