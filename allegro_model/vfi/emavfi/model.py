"""EMAVFI: two frames and a position between them -> the frame there.

Read `estimate` first; it is the whole model. Attribute names equal the published checkpoint keys. Reference:
MCG-NJU/EMA-VFI, arXiv 2303.00440.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...config import VFIConfig
from ...errors import GeometryError, InterpolationError, NonFiniteError
from ...geometry import centred_padding
from ...ops import CastParam, cast_like
from ..halving import by_halving
from .features import Backbone, FrameStages, PairFeatures
from .flow import Flow, FlowHead, head_features, resize
from .layers import Layers, network_layout
from .refine import RefineNet
from .warp import split_flow, warp, warp_pyramid

# The demos of the reference pad frames to this; less would do, but moves the attention windows.
PAD_MULTIPLE = 32
FLOW_SCALES = (1.0, 0.5, 0.25)
# Peak memory: bytes per pixel for pictures, flow and grids, and maps of the type computed in, per channel of the first
# stage. A tenth above what ours and ours_small were measured to need on a CPU at 448x256 and 896x512.
_PIXEL_BYTES, _MAPS = 200, 28
# (scale, stage) of the two flow heads
_HEADS = ((16, 5), (8, 4))


@dataclass(frozen=True)
class FrameFeatures:
    """Everything that depends on one frame alone; of use to both pairs that the frame belongs to.

    Attributes:
        frame: [B, 3, H, W] float32 in [0, 1], padded.
        stages: of the backbone.
        small: the same of the frame at the flow scale, None at scale 1.
        turned: the same of the frame turned by 180 degrees, None without test-time augmentation.
        padding: (left, right, top, bottom) pixels that `frame` has been given.
    """

    frame: Tensor
    stages: FrameStages
    small: FrameFeatures | None = None
    turned: FrameFeatures | None = None
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)

    @staticmethod
    def stack(frames: Sequence[FrameFeatures]) -> FrameFeatures:
        """Features of several frames, of equal size and options, as those of one batch."""
        if len(frames) == 1:
            return frames[0]
        small = [f.small for f in frames if f.small is not None]
        turned = [f.turned for f in frames if f.turned is not None]
        first, second, third = (torch.cat(level) for level in zip(*(f.stages.maps for f in frames), strict=True))
        stages = FrameStages((first, second, third), torch.cat([f.stages.tokens for f in frames]))
        return FrameFeatures(torch.cat([f.frame for f in frames]), stages, FrameFeatures.stack(small) if small else None,
                             FrameFeatures.stack(turned) if turned else None, frames[0].padding)


class Prediction(NamedTuple):
    """The frame between two frames, and how it came about; padded, float32.

    Attributes:
        frame: [B, 3, H, W] in [0, 1]: `merged` plus `detail`.
        merged: [B, 3, H, W], both frames warped by `flow` and mixed by `mask`.
        detail: [B, 3, H, W], the refinement network's output before its sigmoid.
        flow, mask: [B, 4, H, W] pixels and [B, 1, H, W] logit; see `Flow`.
    """

    frame: Tensor
    merged: Tensor
    detail: Tensor
    flow: Tensor
    mask: Tensor


class EMAVFI(nn.Module):
    """The frame interpolator EMA-VFI.

    Warps and flow are computed in float32, everything else in the type of the weights. Frames of any size may be
    given: they are padded inside, centred, by repeating their border.

    Args:
        config: sizes of the checkpoint.
        operations: namespace of layer classes, default `torch.nn`.
        cast_param: brings bare parameters to an activation's dtype and device.
        device, dtype: of the weights.
    """

    def __init__(self, config: VFIConfig, *, operations: Any = nn, cast_param: CastParam = cast_like,
                 device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        layers = Layers(operations, cast_param, {"device": device, "dtype": dtype})
        self.config, self.tables = config, layers.tables
        hidden = config.channels(3)
        self.feature_bone = Backbone(config, layers)
        # motion and appearance of both frames; (I0, I1), then (I0, I1, both warped, mask) and the flow so far
        self.block = nn.ModuleList(
            FlowHead(4 * config.channels(stage), extra, hidden, scale, layers)
            for (scale, stage), extra in zip(_HEADS, (6, 17), strict=True))
        self.unet = RefineNet(config.base_channels, layers)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights, in which the network computes."""
        weight: Tensor = self.unet.conv.weight  # type: ignore[assignment]
        return weight.dtype

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> EMAVFI:
        """Tables do not stay on a device that the weights leave."""
        self.tables.clear()
        return super()._apply(fn, recurse)

    def memory_used_forward(self, images_shape: Sequence[int], dtype: torch.dtype) -> int:
        """Bytes that one pair needs at its peak, beside the weights.

        Args:
            images_shape: (N, H, W, C); pairs are worked on one by one, so N does not matter.
            dtype: type the network computes in; warps are float32 all the same.
        """
        height, width = (math.ceil(side / PAD_MULTIPLE) * PAD_MULTIPLE for side in images_shape[1:3])
        F = self.config.base_channels
        return height * width * (_PIXEL_BYTES + F * _MAPS * dtype.itemsize)

    # One frame

    def extract_features(self, frame: Tensor, *, flow_scale: float = 1.0, tta: bool = False,
                         compute_dtype: torch.dtype | None = None) -> FrameFeatures:
        """The part that depends on one frame: keep it for the next pair.

        Args:
            frame: [B, 3, H, W] in [0, 1], any size.
            flow_scale: 1, 0.5 or 0.25: estimate flow at this share of the size, for large frames.
            tta: test-time augmentation: also for the frame turned by 180 degrees.
            compute_dtype: type to compute in; default that of the weights.
        Raises:
            GeometryError: another flow scale.
        """
        padding = centred_padding(frame.shape[3], frame.shape[2], pad_multiple(flow_scale))
        padded = frame.float()
        if any(padding):
            padded = F.pad(padded, padding, mode="replicate")
        dtype = compute_dtype or self.dtype
        found = replace(self.features(padded, flow_scale, dtype), padding=padding)
        return replace(found, turned=self.features(padded.flip(2, 3), flow_scale, dtype)) if tta else found

    def features(self, frame: Tensor, flow_scale: float, dtype: torch.dtype) -> FrameFeatures:
        """As `extract_features`, without padding and augmentation.

        Args:
            frame: [B, 3, H, W] float32 in [0, 1], sides multiples of 16 / flow_scale.
            flow_scale: as there.
            dtype: type to compute in.
        """
        stages = self.feature_bone.frame(network_layout(frame.to(dtype)))
        small = None if flow_scale == 1 else self.features(resize(frame, flow_scale), 1.0, dtype)
        return FrameFeatures(frame, stages, small)

    # A pair

    def forward(self, img0: Tensor, img1: Tensor, timestep: Tensor | float = 0.5,
                cache: Mapping[str, FrameFeatures] | None = None) -> Tensor:
        """The frames between `img0` and `img1`.

        Args:
            img0, img1: [B, 3, H, W] in [0, 1].
            timestep: where, in (0, 1): one number, [B], or [B, 1, H, W] of which one pixel is read.
            cache: features of `extract_features`, as "img0" and "img1"; with those of one pair for a batch of
                positions the backbone runs once.
        Returns:
            [B, 3, H, W] in [0, 1], of the images' type.
        Raises:
            InterpolationError: the model knows the middle only, and another position is asked for.
        """
        first, second = self._features(img0, img1, cache)
        positions: list[Tensor | float] = [timestep]
        if isinstance(timestep, Tensor):
            t = timestep.reshape(timestep.shape[0], -1)[:, 0] if timestep.ndim else timestep[None]
            one_pair = first.frame.shape[0] == 1
            positions = t.tolist() if one_pair else [t.to(first.frame).view(-1, 1, 1, 1)]
        return torch.cat(self.between(first, second, positions)).to(img0.dtype)

    def forward_multi_timestep(self, img0: Tensor, img1: Tensor, t_values: Sequence[float],
                               cache: Mapping[str, FrameFeatures] | None = None) -> Tensor:
        """Several frames between two, the backbone run once.

        Args:
            img0, img1: [1, 3, H, W] in [0, 1].
            t_values: positions in (0, 1). A model that knows the middle only takes those which halving reaches.
            cache: as in `forward`.
        Returns:
            [len(t_values), 3, H, W] in [0, 1], of the images' type.
        Raises:
            InterpolationError: halving does not reach a position.
        """
        first, second = self._features(img0, img1, cache)
        return torch.cat(self.between(first, second, t_values)).to(img0.dtype)

    def _features(self, img0: Tensor, img1: Tensor,
                  cache: Mapping[str, FrameFeatures] | None) -> tuple[FrameFeatures, FrameFeatures]:
        if cache is not None:
            return cache["img0"], cache["img1"]
        return self.extract_features(img0), self.extract_features(img1)

    def between(self, first: FrameFeatures, second: FrameFeatures,
                positions: Sequence[Tensor | float]) -> list[Tensor]:
        """The frames at `positions`, cropped to the size given to `extract_features`.

        A model that knows the middle only reaches other positions by halving.

        Args:
            first, second: features of the frames before and after, of equal options.
            positions: numbers in (0, 1), or [B, 1, 1, 1] each.
        Returns:
            [B, 3, H, W] float32 in [0, 1] each.
        Raises:
            InterpolationError: halving does not reach a position.
            NonFiniteError: NaN or Inf in the computation.
        """
        def middle(left: FrameFeatures, right: FrameFeatures) -> Tensor:
            return self._finished(next(self.predict(left, right, [0.5])), left)

        def again(frame: Tensor) -> FrameFeatures:
            scale = 1.0 if first.small is None else first.small.frame.shape[2] / first.frame.shape[2]
            return self.extract_features(frame, flow_scale=scale, tta=first.turned is not None,
                                         compute_dtype=first.stages.tokens.dtype)

        if self.config.arbitrary_time:
            return [self._finished(p, first) for p in self.predict(first, second, positions)]
        numbers = [_single_number(p) if isinstance(p, Tensor) else p for p in positions]
        return by_halving(numbers, first, second, middle=middle, features=again)

    @staticmethod
    def _finished(found: Prediction, features: FrameFeatures) -> Tensor:
        # Sigmoid and clamp would hide them.
        if not bool(torch.isfinite(found.detail).all() & torch.isfinite(found.flow).all()):
            dtype = str(features.stages.tokens.dtype).removeprefix("torch.")
            raise NonFiniteError(f"NaN or Inf between two frames, computed in {dtype}. Choose fp32, or check that the file "
                                 "of weights is intact.")
        return crop(found.frame, features.padding)

    def predict(self, first: FrameFeatures, second: FrameFeatures,
                positions: Sequence[Tensor | float]) -> Iterator[Prediction]:
        """As `between`, with everything that led to the frames; padded. One by one, since each is several frames large.

        Of augmented predictions `frame` and `detail` are means over both directions, the rest is that of the plain
        one.
        """
        plain = self._predict(first, second, positions)
        if first.turned is None or second.turned is None:
            return plain
        turned = self._predict(first.turned, second.turned, positions)
        return (p._replace(frame=(p.frame + q.frame.flip(2, 3)) / 2, detail=(p.detail + q.detail.flip(2, 3)) / 2)
                for p, q in zip(plain, turned, strict=True))

    def _predict(self, first: FrameFeatures, second: FrameFeatures,
                 positions: Sequence[Tensor | float]) -> Iterator[Prediction]:
        pair = self.feature_bone.pair(first.stages, second.stages)
        if first.small is None or second.small is None:
            return (self.refine(first.frame, second.frame, pair, self.estimate(first.frame, second.frame, pair, t))
                    for t in positions)
        small0, small1 = first.small, second.small
        small = self.feature_bone.pair(small0.stages, small1.stages)
        factor = first.frame.shape[2] / small0.frame.shape[2]
        flows = (self.estimate(small0.frame, small1.frame, small, t).resized(factor) for t in positions)
        return (self.refine(first.frame, second.frame, pair, flow) for flow in flows)

    def estimate(self, img0: Tensor, img1: Tensor, pair: PairFeatures, timestep: Tensor | float) -> Flow:
        """Flow and mask at a position, coarse to fine.

        Args:
            img0, img1: [B, 3, H, W] float32.
            pair: their features.
            timestep: a number in (0, 1), or [B, 1, 1, 1].
        """
        found: Flow | None = None
        for head, (_, stage) in zip(self.block, _HEADS, strict=True):
            features = head_features(pair.motion[stage - 4], pair.appearance[stage - 1], timestep)
            if found is None:
                found = head(features, torch.cat((img0, img1), dim=1))
                continue
            warped = warp(torch.cat((img0, img1)), split_flow(found.flow), self.tables).chunk(2)
            more = head(features, torch.cat((img0, img1, *warped, found.mask), dim=1), found.flow)
            found = Flow(found.flow + more.flow, found.mask + more.mask)
        assert found is not None
        return found

    def refine(self, img0: Tensor, img1: Tensor, pair: PairFeatures, found: Flow) -> Prediction:
        """Warps, merges and corrects.

        Args:
            img0, img1: [B, 3, H, W] float32.
            pair: their features; appearance is used.
            found: of `estimate`.
        """
        flow, mask = found
        warped = warp_pyramid((torch.cat((img0, img1)), *pair.appearance), flow, self.tables)
        (warped0, warped1), *maps = (x.chunk(2) for x in warped)
        detail = self.unet((img0, img1, warped0, warped1, mask, flow),
                           [first for first, _ in maps], [second for _, second in maps]).float()
        share = torch.sigmoid(mask)
        merged = warped0 * share + warped1 * (1 - share)
        frame = (merged + 2 * torch.sigmoid(detail) - 1).clamp(0, 1)
        return Prediction(frame, merged, detail, flow, mask)


def _single_number(positions: Tensor) -> float:
    """The one position that all pairs of a batch have.

    Raises:
        InterpolationError: they differ.
    """
    low, high = positions.aminmax()
    if low != high:
        raise InterpolationError(f"positions from {float(low):g} to {float(high):g} in one batch: this model knows the "
                                 "middle only and takes one position for all pairs. Interpolate pair by pair.")
    return float(low)


def pad_multiple(flow_scale: float) -> int:
    """What the sides of padded frames are multiples of.

    Raises:
        GeometryError: no such flow scale.
    """
    if flow_scale not in FLOW_SCALES:
        raise GeometryError(f"flow_scale={flow_scale!r}: must be one of {', '.join(f'{s:g}' for s in FLOW_SCALES)}. "
                            "Take 1 for frames up to about 1280x720, 0.5 for 2K and 0.25 for 4K.")
    return math.ceil(PAD_MULTIPLE / flow_scale)


def crop(x: Tensor, padding: tuple[int, int, int, int]) -> Tensor:
    """Takes the padding off [B, C, H, W]."""
    left, right, top, bottom = padding
    return x[:, :, top : x.shape[2] - bottom, left : x.shape[3] - right]
