"""What every part of the network is built from: injected layer classes, and the one activation with weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...ops import CastParam, cast_like


class PReLU(nn.Module):
    """A leaky ReLU with one slope per channel; a host's layer classes have none."""

    def __init__(self, channels: int, cast_param: CastParam, **kwargs: Any) -> None:
        super().__init__()
        self.cast_param = cast_param
        self.weight = nn.Parameter(torch.full((channels,), 0.25, **kwargs))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> the same."""
        return F.prelu(x, self.cast_param(self.weight, x))


@dataclass(frozen=True)
class Layers:
    """Builds the layers of one network.

    Attributes:
        operations: namespace of layer classes.
        cast_param: brings bare parameters to an activation's dtype and device.
        kwargs: device and dtype of the weights.
    """

    operations: Any = nn
    cast_param: CastParam = cast_like
    kwargs: dict[str, Any] = field(default_factory=dict)

    def conv(self, in_channels: int, channels: int, *, kernel: int = 3, stride: int = 1, dilation: int = 1,
             groups: int = 1) -> nn.Module:
        """A convolution with bias that keeps the size, divided by the stride."""
        return self.operations.Conv2d(in_channels, channels, kernel, stride=stride, padding=kernel // 2 * dilation,
                                      dilation=dilation, groups=groups, **self.kwargs)

    def prelu(self, channels: int) -> nn.Module:
        return PReLU(channels, self.cast_param, **self.kwargs)

    def conv_prelu(self, in_channels: int, channels: int, *, stride: int = 1) -> nn.Sequential:
        return nn.Sequential(self.conv(in_channels, channels, stride=stride), self.prelu(channels))

    def up_prelu(self, in_channels: int, channels: int) -> nn.Sequential:
        """Doubles the size with a transposed convolution."""
        up = self.operations.ConvTranspose2d(in_channels, channels, 4, stride=2, padding=1, **self.kwargs)
        return nn.Sequential(up, self.prelu(channels))

    def linear(self, in_channels: int, channels: int) -> nn.Module:
        return self.operations.Linear(in_channels, channels, **self.kwargs)

    def norm(self, channels: int, eps: float) -> nn.Module:
        return self.operations.LayerNorm(channels, eps=eps, **self.kwargs)
