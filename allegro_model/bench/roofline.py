"""The most that a device gives: a large product of matrices, a convolution of the VAE's kind."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .measure import Run

EDGE = 1024  # of the matrices on a CPU
GPU_EDGE = 8192
_CHANNELS, _PIXELS, _FRAMES = 128, 64, 4


def matmul_run(device: torch.device, dtype: torch.dtype) -> tuple[Run, int]:
    """(call, operations) of a square product."""
    edge = EDGE if device.type == "cpu" else GPU_EDGE
    a, b = (torch.randn(edge, edge, device=device, dtype=dtype) for _ in range(2))

    def run() -> Tensor:
        return F.linear(a, b)

    return run, 2 * edge**3


def convolution_run(device: torch.device, dtype: torch.dtype) -> tuple[Run, int]:
    """(call, operations) of a 3x3 convolution per frame."""
    size = _PIXELS if device.type == "cpu" else 4 * _PIXELS
    x = torch.randn(_FRAMES, _CHANNELS, size, size, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(_CHANNELS, _CHANNELS, 3, 3, device=device, dtype=dtype)

    def run() -> Tensor:
        return F.conv2d(x, weight, padding=1)

    return run, 2 * _FRAMES * size**2 * _CHANNELS**2 * 9
