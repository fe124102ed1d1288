"""The VideoVAE's parts: 2-D ResNets per frame, temporal blocks across frames, changes of size.

All take and return [B, C, T, H, W]. Attribute names equal the published checkpoint keys.

Whatever keeps its result from being copied between the view of frames and the view of time is worth it here: in
the channels-last layout (see `network_layout`) both views share their memory, and steps that are done with a
tensor let go of it before they allocate the next.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..geometry import FRAMES_BYTES

SPATIAL_EPS = 1e-6
TEMPORAL_EPS = 1e-5


def network_layout(x: Tensor) -> Tensor:
    """[B, C, T, H, W] in the memory layout the networks are fastest in.

    On the CPU that is channels last: convolutions over space and over time then read the same memory, and
    oneDNN's kernels over time are several times faster. CUDA's GroupNorm has no such kernel, so there the layout
    stays as it is.
    """
    return x.contiguous(memory_format=torch.channels_last_3d) if x.device.type == "cpu" else x


def per_frame(layer: Callable[[Tensor], Tensor], x: Tensor, *, growth: int = 1) -> Tensor:
    """Applies a 2-D layer, which treats every image by itself, to every frame of [B, C, T, H, W].

    Large clips go through a few frames at a time: what a layer needs besides input and result is then that of a
    few frames. With gradients there is nothing to gain, since all of it is kept.

    Args:
        layer: [n, C, H, W] -> [n, C', H', W'].
        x: the frames.
        growth: how much larger than `x` the layer's widest tensor is.
    """
    B, T = x.shape[0], x.shape[2]
    at_once = max(1, FRAMES_BYTES * T // max(1, x.numel() * x.element_size() * growth))
    if at_once >= T or torch.is_grad_enabled():
        y = layer(x.transpose(1, 2).flatten(0, 1))  # [B*T, C', H', W']
        return y.unflatten(0, (B, T)).transpose(1, 2)
    result: Tensor | None = None  # [B, T, C', H', W'], each frame in the memory layout of the layer
    for first in range(0, T, at_once):
        y = layer(x[:, :, first : first + at_once].transpose(1, 2).flatten(0, 1)).unflatten(0, (B, -1))
        if result is None:
            result = y.new_empty((B, T, *y.shape[2:])) if y.is_contiguous() else torch.empty(
                (B * T, *y.shape[2:]), dtype=y.dtype, device=y.device,
                memory_format=torch.channels_last).unflatten(0, (B, T))
        result[:, first : first + at_once] = y
        del y  # before the next frames, not after them
    assert result is not None
    return result.transpose(1, 2)


def norm_silu(norm: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """SiLU(norm(x))."""
    return F.silu(norm(x), inplace=not torch.is_grad_enabled())


def add_to(h: Tensor, x: Tensor) -> Tensor:
    """h + x, in the memory of `h` unless the sum has a wider type, as it has under autocast."""
    return h.add_(x) if h.dtype == x.dtype else h + x


class ResNet(nn.Module):
    """Two 3x3 convolutions per frame and a shortcut. Source: the ResNet of the SD image VAE."""

    def __init__(self, in_channels: int, channels: int, groups: int, operations: Any, **kwargs: Any) -> None:
        super().__init__()
        self.norm1 = operations.GroupNorm(groups, in_channels, eps=SPATIAL_EPS, **kwargs)
        self.conv1 = operations.Conv2d(in_channels, channels, 3, padding=1, **kwargs)
        self.norm2 = operations.GroupNorm(groups, channels, eps=SPATIAL_EPS, **kwargs)
        self.conv2 = operations.Conv2d(channels, channels, 3, padding=1, **kwargs)
        if in_channels != channels:
            self.conv_shortcut = operations.Conv2d(in_channels, channels, 1, **kwargs)
        self.has_shortcut = in_channels != channels

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_channels, T, H, W] -> [B, channels, T, H, W]."""
        return per_frame(self._frames, x)

    def _frames(self, x: Tensor) -> Tensor:
        h = norm_silu(self.norm1, x)
        h = self.conv1(h)
        h = norm_silu(self.norm2, h)
        h = self.conv2(h)
        return add_to(h, self.conv_shortcut(x) if self.has_shortcut else x)


class FrameAttention(nn.Module):
    """Self-attention over the pixels of each frame, one head."""

    def __init__(self, channels: int, groups: int, operations: Any, **kwargs: Any) -> None:
        super().__init__()
        self.group_norm = operations.GroupNorm(groups, channels, eps=SPATIAL_EPS, **kwargs)
        self.to_q = operations.Linear(channels, channels, **kwargs)
        self.to_k = operations.Linear(channels, channels, **kwargs)
        self.to_v = operations.Linear(channels, channels, **kwargs)
        self.to_out = nn.ModuleList([operations.Linear(channels, channels, **kwargs)])

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T, H, W] -> the same."""
        return per_frame(self._frames, x)

    def _frames(self, x: Tensor) -> Tensor:
        h = self.group_norm(x).flatten(2).transpose(1, 2)  # [B*T, H*W, C]
        h = F.scaled_dot_product_attention(self.to_q(h)[:, None], self.to_k(h)[:, None], self.to_v(h)[:, None])
        return x + self.to_out[0](h[:, 0]).transpose(1, 2).view_as(x)


def repeat_ends(x: Tensor) -> Tensor:
    """[B, C, T, H, W] -> [B, C, T + 2, H, W]: the first and the last frame once more."""
    return torch.cat((x[:, :, :1], x, x[:, :, -1:]), dim=2)


class TemporalBlock(nn.Module):
    """Four GroupNorm - SiLU - Conv3d stages across frames, added to the input.

    Args:
        channels: of input and output.
        groups: of the GroupNorms, whose statistics run over space and time.
        resample: "none", "down" halves the frames, "up" doubles them.
    """

    def __init__(self, channels: int, groups: int, operations: Any, *,
                 resample: Literal["none", "down", "up"] = "none", **kwargs: Any) -> None:
        super().__init__()
        self.resample = resample
        space = 1 if resample == "none" else 3
        kernels = {"none": (3, 1, 1), "down": (2, 3, 3), "up": (1, 3, 3)}
        pad = (0, space // 2, space // 2)

        def stage(kernel: tuple[int, int, int], index: int, width: int, stride: int = 1) -> nn.ModuleDict:
            conv = operations.Conv3d(channels, width, kernel, stride=(stride, 1, 1), padding=pad, **kwargs)
            norm = operations.GroupNorm(groups, channels, eps=TEMPORAL_EPS, **kwargs)
            # The published keys number the members of each stage; between norm and conv lie SiLU and,
            # in stages 2 and 3, the dropout of training.
            return nn.ModuleDict({"0": norm, str(index): conv})

        inner = (3, space, space)
        self.conv1 = stage(kernels[resample], 2, channels * (2 if resample == "up" else 1),
                           2 if resample == "down" else 1)
        self.conv2 = stage(inner, 3, channels)
        self.conv3 = stage(inner, 3, channels)
        self.conv4 = stage(inner, 2, channels)
        # A fresh block is the identity (or plain repetition / skipping of frames).
        for parameter in self.conv4["2"].parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T, H, W] -> the same with T, T/2 or 2T frames."""
        h = x
        for i, stage in enumerate((self.conv1, self.conv2, self.conv3, self.conv4)):
            norm, conv = stage.values()
            if i > 0 or self.resample == "none":
                h = repeat_ends(h)
            h = norm_silu(norm, h)
            h = conv(h)
            if i == 0 and self.resample == "up":
                h = interleave_halves(h)
        if self.resample == "up":  # every frame twice
            return add_to(h.unflatten(2, (-1, 2)), x.unsqueeze(3)).flatten(2, 3)
        return add_to(h, x[:, :, ::2] if self.resample == "down" else x)


def interleave_halves(x: Tensor) -> Tensor:
    """[B, 2C, T, H, W] -> [B, C, 2T, H, W]: half d of the channels is frame 2f + d; channels last in memory."""
    halves = x.permute(0, 2, 3, 4, 1).unflatten(-1, (2, -1))  # [B, T, H, W, 2, C]
    return halves.movedim(4, 2).flatten(1, 2).permute(0, 4, 1, 2, 3)


def temporal_residual(conv: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """x + conv(x), for the (3, 1, 1) convolutions at the ends of the networks, which pad time with zeros."""
    return add_to(conv(x), x)


class Downsample(nn.Module):
    """Halves height and width."""

    def __init__(self, channels: int, operations: Any, **kwargs: Any) -> None:
        super().__init__()
        self.conv = operations.Conv2d(channels, channels, 3, stride=2, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T, H, W] -> [B, C, T, H/2, W/2]; zero padding at the right and the bottom only."""
        return per_frame(lambda y: self.conv(F.pad(y, (0, 1, 0, 1))), x)


class Upsample(nn.Module):
    """Doubles height and width."""

    def __init__(self, channels: int, operations: Any, **kwargs: Any) -> None:
        super().__init__()
        self.conv = operations.Conv2d(channels, channels, 3, padding=1, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T, H, W] -> [B, C, T, 2H, 2W]."""
        return per_frame(lambda y: self.conv(F.interpolate(y, scale_factor=2.0, mode="nearest")), x, growth=4)
