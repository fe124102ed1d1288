"""Backward warping: fetching every pixel from where the flow points. Always in float32.

A sampling grid in half precision moves samples by up to 0.16 pixels at width 1280, one in bfloat16 by more than a
pixel; shimmering details are what that looks like.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor


@lru_cache(maxsize=8)
def identity_grid(height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The grid of `grid_sample` that changes nothing, [1, H, W, 2], and what one pixel measures in it, [2]."""
    with torch.inference_mode(False):  # the cached tables must also serve a run that records gradients
        x, y = torch.linspace(-1, 1, width, device=device), torch.linspace(-1, 1, height, device=device)
        grid = torch.stack((x.expand(height, width), y[:, None].expand(height, width)), dim=-1)
        return grid[None], torch.tensor((2 / max(width - 1, 1), 2 / max(height - 1, 1)), device=device)


def warp(image: Tensor, flow: Tensor) -> Tensor:
    """Samples `image` at pixel position + flow, bilinear; beyond the border the border is repeated.

    Args:
        image: [B, C, H, W].
        flow: [B, 2, H, W] float32: x and y, pixels.
    Returns:
        [B, C, H, W], float32.
    """
    grid, pixel = identity_grid(image.shape[2], image.shape[3], image.device)
    # Clamped positions and zeros beyond are the same as border padding, which not every device has.
    where = torch.addcmul(grid, flow.permute(0, 2, 3, 1), pixel).clamp(-1, 1)
    return F.grid_sample(image.float(), where, mode="bilinear", padding_mode="zeros", align_corners=True)


def split_flow(flow: Tensor) -> Tensor:
    """[B, 4, H, W] -> [2B, 2, H, W]: into the first frames, then into the second ones."""
    return torch.cat((flow[:, :2], flow[:, 2:]))


def warp_pyramid(maps: Sequence[Tensor], flow: Tensor) -> list[Tensor]:
    """Warps maps of both frames, each half the size of the one before.

    Args:
        maps: [2B, C, H, W] and so on, the first half belongs to the first frames.
        flow: [B, 4, H, W] at the size of the first map.
    Returns:
        [2B, C, H, W] and so on, in the maps' type.
    """
    both, warped = split_flow(flow), []
    for level, x in enumerate(maps):
        if level:
            both = F.interpolate(both, scale_factor=0.5, mode="bilinear") * 0.5
        warped.append(warp(x, both).to(x.dtype))
    return warped
