"""Flow heads: from features of a pair to flow and merge mask.

Attribute names equal the published checkpoint keys. Source: EMA-VFI (arXiv 2303.00440), section 3.3.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import Layers, join


class Flow(NamedTuple):
    """From the wanted frame into both of its neighbours; float32.

    Attributes:
        flow: [B, 4, H, W] pixels: x and y into the first frame, x and y into the second.
        mask: [B, 1, H, W] logit of the first frame's share.
    """

    flow: Tensor
    mask: Tensor

    def resized(self, factor: float) -> Flow:
        """The same flow at another size of the frames."""
        return Flow(resize(self.flow, factor) * factor, resize(self.mask, factor))


def resize(x: Tensor, factor: float) -> Tensor:
    """Bilinear, without anti-aliasing; sides times `factor` are whole numbers."""
    if factor == 1:
        return x
    return F.interpolate(x, scale_factor=factor, mode="bilinear", recompute_scale_factor=False)


def head_features(motion: Tensor, appearance: Tensor, timestep: Tensor | float) -> Tensor:
    """What a head reads: of the time it knows only how much of each frame's motion it gets.

    Args:
        motion, appearance: [2B, C, h, w] of one stage, the first half belongs to the first frames.
        timestep: a number in (0, 1), or [B, 1, 1, 1].
    Returns:
        [B, 4C, h, w].
    """
    first, second = motion.chunk(2)
    parts = (timestep * first, (1 - timestep) * second)
    return torch.cat((*(part.to(motion.dtype) for part in parts), *appearance.chunk(2)), dim=1)


class FlowHead(nn.Module):
    """Three convolutions that estimate flow and mask at a fraction of the size.

    Args:
        in_channels: of the features, before they are unfolded.
        extra: channels of the images (and of the flow so far) that are shown beside the features.
        hidden: channels inside.
        scale: the size of a feature cell, pixels; the head works at a quarter of that.
        layers: builds the layers.
    """

    def __init__(self, in_channels: int, extra: int, hidden: int, scale: int, layers: Layers) -> None:
        super().__init__()
        self.reduction = scale // 4
        # All three have their PReLU, the last one too.
        self.conv = nn.Sequential(layers.conv_prelu(in_channels // 16 + extra, hidden),
                                  layers.conv_prelu(hidden, hidden), layers.conv_prelu(hidden, 5))

    def forward(self, features: Tensor, images: Tensor, flow: Tensor | None = None) -> Flow:
        """Estimates.

        Args:
            features: [B, in_channels, H/scale, W/scale].
            images: [B, C, H, W] float32.
            flow: [B, 4, H, W] float32 estimated so far, None for the first head.
        Returns:
            Flow and mask, or what is to be added to them, at full size.
        """
        r = self.reduction
        x = F.pixel_shuffle(F.pixel_shuffle(features, 2), 2)  # [B, in_channels/16, H/r, W/r]
        shown = [resize(images, 1 / r)]
        if flow is not None:
            shown.append(resize(flow, 1 / r) / r)
        x = self.conv(join(x, torch.cat(shown, dim=1).to(x.dtype))).float()
        x = resize(x, r)
        return Flow(x[:, :4] * r, x[:, 4:])
