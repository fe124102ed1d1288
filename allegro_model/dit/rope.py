"""3-D rotary position embedding: pure functions.

A head's dh dims are three contiguous groups for the axes t, h, w. In a group of width g, dim k pairs with
dim k + g/2 and turns by  position / scale_axis * 10000^(-2k/g).  Positions are plain token indices.
Everything is float32: in bfloat16 an angle near 40 is off by up to 0.125 rad.
Source: arXiv 2104.09864; the axis split and the scales are Allegro's (arXiv 2410.15458).
"""

from __future__ import annotations

import torch
from torch import Tensor

BASE = 10000.0


def axis_angles(length: int, width: int, scale: float) -> Tensor:
    """[length, width/2] float32 angles of one axis.

    Args:
        length: positions 0 .. length-1.
        width: dims of the axis' group, even.
        scale: interpolation scale the positions are divided by.
    """
    positions = torch.arange(length, dtype=torch.float32) / scale
    frequencies = 1.0 / BASE ** (torch.arange(0, width, 2, dtype=torch.float32) / width)
    return positions[:, None] * frequencies


def rope_tables(grid: tuple[int, int, int], head_dim: int, scales: tuple[float, float, float],
                device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines for every token of a grid.

    Args:
        grid: (t, h, w) tokens per axis; tokens are ordered with w fastest.
        head_dim: dh, a multiple of 6.
        scales: interpolation scale per axis.
        device: where the tables live.
    Returns:
        cos, sin, each [N, 3, dh/6] float32.
    """
    width = head_dim // 3
    with torch.inference_mode(False):  # tables that are kept must also serve a run that records gradients
        return _rope_tables(grid, width, scales, device)


def _rope_tables(grid: tuple[int, int, int], width: int, scales: tuple[float, float, float],
                 device: torch.device) -> tuple[Tensor, Tensor]:
    t, h, w = (axis_angles(n, width, s) for n, s in zip(grid, scales, strict=True))
    shape = (*grid, width // 2)
    angles = torch.stack((t[:, None, None].expand(shape), h[None, :, None].expand(shape),
                          w[None, None, :].expand(shape)), dim=-2)  # [t, h, w, 3, dh/6]
    angles = angles.flatten(0, 2).to(device)
    return angles.cos(), angles.sin()


def apply_rope(x: Tensor, heads: int, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates queries or keys.

    Args:
        x: [B, N, heads * dh].
        cos, sin: [N, 3, dh/6] float32, from `rope_tables`.
    Returns:
        [B, N, heads * dh], dtype of `x`; the rotation itself is float32.
    """
    pairs = x.unflatten(-1, (heads, 3, 2, -1))
    a, b = pairs.unbind(-2)  # [B, N, heads, 3, dh/6] each
    cos, sin = cos[:, None], sin[:, None]  # [N, 1, 3, dh/6] float32: the products are float32, too
    rotated = torch.empty_like(pairs)
    rotated[..., 0, :] = a * cos - b * sin
    rotated[..., 1, :] = b * cos + a * sin
    return rotated.flatten(-4)
