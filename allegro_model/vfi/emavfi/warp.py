"""Backward warping: fetching every pixel from where the flow points. Always in float32.

A sampling grid in half precision moves samples by up to 0.16 pixels at width 1280, one in bfloat16 by more than a
pixel; shimmering details are what that looks like.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .tables import Tables

Warp = Callable[[Tensor], Tensor]


def warping(flow: Tensor, tables: Tables) -> Warp:
    """What samples pictures at pixel position + flow, bilinear; beyond the border the border is repeated.

    Args:
        flow: [B, 2, H, W] float32: x and y, pixels.
        tables: keeps the grid.
    Returns:
        a function from [B, C, H, W] to [B, C, H, W] float32.
    """
    # grid_sample reads one channel after the other; without gradients a CPU is 2 to 8 times faster at whole pixels.
    return _weighted_rows(flow) if flow.device.type == "cpu" and not torch.is_grad_enabled() else _grid_sample(flow, tables)


def warp(image: Tensor, flow: Tensor, tables: Tables | None = None) -> Tensor:
    """`warping(flow, tables)` of one image; by default no grid is kept."""
    return warping(flow, tables or Tables())(image)


def identity_grid(height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The grid of `grid_sample` that changes nothing, [1, H, W, 2], and what one pixel measures in it, [2]."""
    with torch.inference_mode(False):  # tables that are kept must also serve a run that records gradients
        x, y = torch.linspace(-1, 1, width, device=device), torch.linspace(-1, 1, height, device=device)
        grid = torch.stack((x.expand(height, width), y[:, None].expand(height, width)), dim=-1)
        return grid[None], torch.tensor((2 / max(width - 1, 1), 2 / max(height - 1, 1)), device=device)


def _grid_sample(flow: Tensor, tables: Tables) -> Warp:
    grid, pixel = tables(identity_grid, flow.shape[2], flow.shape[3], flow.device)
    # Clamped positions and zeros beyond are the same as border padding, which not every device has.
    where = torch.addcmul(grid, flow.permute(0, 2, 3, 1), pixel).clamp(-1, 1)
    return lambda image: F.grid_sample(image.float(), where, mode="bilinear", padding_mode="zeros", align_corners=True)


def _weighted_rows(flow: Tensor) -> Warp:
    """Every pixel of the result is the weighted sum of four pixels, which are rows of a table: an embedding bag."""
    B, _, H, W = flow.shape
    x = (torch.arange(W) + flow[:, 0]).clamp_(0, W - 1)  # [B, H, W]
    y = (torch.arange(H)[:, None] + flow[:, 1]).clamp_(0, H - 1)
    # NaN, which `int` would turn into any number, is made a position here; as a weight it remains.
    left, top = x.nan_to_num().clamp_(0, max(W - 2, 0)).int(), y.nan_to_num().clamp_(0, max(H - 2, 0)).int()
    right_share, low_share = x.sub_(left), y.sub_(top)
    rows = torch.empty((B, H, W, 4), dtype=torch.int32)
    torch.add(torch.arange(0, B * H * W, H * W, dtype=torch.int32)[:, None, None], top, alpha=W, out=rows[..., 0]).add_(left)
    torch.add(rows[..., 0], min(W - 1, 1), out=rows[..., 1])
    torch.add(rows[..., :2], W * min(H - 1, 1), out=rows[..., 2:])
    shares = torch.empty((B, H, W, 4))
    high = 1 - low_share
    torch.mul(high, 1 - right_share, out=shares[..., 0])
    torch.mul(high, right_share, out=shares[..., 1])
    torch.mul(low_share, 1 - right_share, out=shares[..., 2])
    torch.mul(low_share, right_share, out=shares[..., 3])

    def sample(image: Tensor) -> Tensor:
        table = image.float().permute(0, 2, 3, 1).reshape(B * H * W, -1)
        made = F.embedding_bag(rows.view(-1, 4), table, per_sample_weights=shares.view(-1, 4), mode="sum")
        return made.view(B, H, W, -1).permute(0, 3, 1, 2)

    return sample


def split_flow(flow: Tensor) -> Tensor:
    """[B, 4, H, W] -> [2B, 2, H, W]: into the first frames, then into the second ones."""
    return torch.cat((flow[:, :2], flow[:, 2:]))


def warp_pyramid(maps: Sequence[Tensor], flow: Tensor, tables: Tables | None = None) -> list[Tensor]:
    """Warps maps of both frames, each of the size of the one before or half of it.

    Args:
        maps: [2B, C, H, W] and so on, the first half belongs to the first frames.
        flow: [B, 4, H, W] at the size of the first map.
        tables: as in `warp`.
    Returns:
        [2B, C, H, W] and so on, in the maps' type.
    """
    both, tables = split_flow(flow), tables or Tables()
    sample, warped = warping(both, tables), []
    for x in maps:
        if x.shape[2] != both.shape[2]:
            both = F.interpolate(both, scale_factor=0.5, mode="bilinear") * 0.5
            sample = warping(both, tables)
        warped.append(sample(x).to(x.dtype))
    return warped
