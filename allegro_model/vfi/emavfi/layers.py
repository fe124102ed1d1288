"""What every part of the network is built from: injected layer classes, and the one activation with weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...ops import CastParam, cast_like
from .tables import Tables

# Numbers a CPU works on at once, in bfloat16. With fewer channels than that PyTorch takes them one by one, up to thirty
# times slower, unless a whole row of a picture passes for its channels.
_VECTOR = 32


def network_layout(x: Tensor) -> Tensor:
    """[B, C, H, W] in the memory layout the convolutions are fastest in: channels last."""
    return x.contiguous(memory_format=torch.channels_last)


def join(*parts: Tensor) -> Tensor:
    """[B, *, H, W] side by side; of one layout, or else the result is none that convolutions take without a copy."""
    return torch.cat([network_layout(part) for part in parts], dim=1)


class PReLU(nn.Module):
    """A leaky ReLU with one slope per channel; a host's layer classes have none."""

    def __init__(self, channels: int, cast_param: CastParam, **kwargs: Any) -> None:
        super().__init__()
        self.cast_param = cast_param
        self.weight = nn.Parameter(torch.full((channels,), 0.25, **kwargs))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> the same."""
        slopes = self.cast_param(self.weight, x)
        if x.device.type != "cpu" or len(slopes) >= _VECTOR or not x.is_contiguous(memory_format=torch.channels_last):
            return F.prelu(x, slopes)
        B, C, H, W = x.shape
        rows = x.permute(0, 2, 3, 1).reshape(B * H, W * C)
        return F.prelu(rows, slopes.repeat(W)).view(B, H, W, C).permute(0, 3, 1, 2)


class TokenLinear(nn.Linear):
    """`nn.Linear` for [..., C], which on a CPU in float32 calls the faster of the two libraries PyTorch has.

    `nn.Linear` calls the BLAS, which on some processors reaches less than half the speed of oneDNN; in bfloat16 it
    calls oneDNN itself.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or x.dtype != torch.float32 or torch.is_grad_enabled() \
                or not torch.backends.mkldnn.is_available():
            return super().forward(x)
        cells = x.reshape(1, -1, 1, x.shape[-1]).permute(0, 3, 1, 2)  # a picture, channels last
        y = torch.mkldnn_convolution(cells, self.weight[:, :, None, None], self.bias, (0, 0), (1, 1), (1, 1), 1)
        return y.permute(0, 2, 3, 1).reshape(*x.shape[:-1], -1)


@dataclass(frozen=True)
class Layers:
    """Builds the layers of one network.

    Attributes:
        operations: namespace of layer classes.
        cast_param: brings bare parameters to an activation's dtype and device.
        kwargs: device and dtype of the weights.
        tables: of the network.
    """

    operations: Any = nn
    cast_param: CastParam = cast_like
    kwargs: dict[str, Any] = field(default_factory=dict)
    tables: Tables = field(default_factory=Tables)

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
        make = TokenLinear if self.operations is nn else self.operations.Linear
        return make(in_channels, channels, **self.kwargs)

    def norm(self, channels: int, eps: float) -> nn.Module:
        return self.operations.LayerNorm(channels, eps=eps, **self.kwargs)
