"""Attention windows: padding a map to whole windows, masks, positions. Pure functions of sizes.

A map of h x w cells is padded with zeros, centred, to multiples of the window. Every second block shifts the
windows by half their size, as a roll of the padded map. Cells that only padding or rolling brought together must
not attend to each other: the masks add -100 to their logits, what the released weights were trained with.

Tables depend on (height, width, window, shift, device), all of which must be the key of who keeps them: the area alone,
the reference's key, gives transposed maps each other's masks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...geometry import centred_padding

MASKED = -100.0


def pad_to_windows(x: Tensor, window: int, shift: int) -> Tensor:
    """[B, h, w, C] -> [B, Hp, Wp, C]: zeros around it, centred, and rolled up and left by `shift`."""
    left, right, top, bottom = centred_padding(x.shape[2], x.shape[1], window)
    if left or right or top or bottom:
        x = F.pad(x, (0, 0, left, right, top, bottom))
    return x.roll((-shift, -shift), dims=(1, 2)) if shift else x


def crop_from_windows(x: Tensor, size: tuple[int, int], window: int, shift: int) -> Tensor:
    """The inverse of `pad_to_windows`: [B, Hp, Wp, C] -> [B, h, w, C]."""
    if shift:
        x = x.roll((shift, shift), dims=(1, 2))
    left, _, top, _ = centred_padding(size[1], size[0], window)
    return x[:, top : top + size[0], left : left + size[1]]


def to_windows(x: Tensor, window: int) -> Tensor:
    """[B, Hp, Wp, C] -> [B * windows, window * window, C]; windows and cells row by row."""
    B, height, width, C = x.shape
    x = x.view(B, height // window, window, width // window, window, C)
    return x.transpose(2, 3).reshape(-1, window * window, C)


def window_mask(height: int, width: int, window: int, shift: int, device: torch.device) -> Tensor | None:
    """What is added to the logits of every window, None when nothing is.

    Args:
        height, width: cells of the map before padding.
        window, shift: edge of a window and its displacement, cells.
        device: where the mask lives.
    Returns:
        [windows, N, N] float32, 0 or -100, N = window * window.
    """
    left, right, top, bottom = centred_padding(width, height, window)
    rows, columns = height + top + bottom, width + left + right
    labels = []
    if left or right or top or bottom:
        # Not rolled together with the cells, as it was in training.
        labels.append(_labels(_bands(rows, top, top + height), _bands(columns, left, left + width)))
    if shift:
        labels.append(_labels(_bands(rows, rows - window, rows - shift),
                              _bands(columns, columns - window, columns - shift)))
    if not labels:
        return None
    with torch.inference_mode(False):  # a mask that is kept must also serve a run that records gradients
        apart = torch.zeros(())
        for cells in labels:
            inside = to_windows(cells[None, ..., None], window).squeeze(-1)  # [windows, N]
            apart = torch.logical_or(apart, inside[:, None] != inside[:, :, None])
        return torch.zeros(apart.shape).masked_fill_(apart, MASKED).to(device)


def _bands(length: int, first: int, second: int) -> Tensor:
    """[length]: 0 below `first`, 1 from there, 2 from `second`."""
    cells = torch.arange(length)
    return (cells >= first).long() + (cells >= second).long()


def _labels(rows: Tensor, columns: Tensor) -> Tensor:
    """[rows, columns]: one number per pair of bands."""
    return 3 * rows[:, None] + columns


def window_positions(height: int, width: int, window: int, shift: int, device: torch.device) -> Tensor:
    """Position of every cell in its windows, [windows, N, 2] float32: x, then y, from -1 to 1; padding is at (0, 0)."""
    with torch.inference_mode(False):
        x, y = torch.linspace(-1, 1, width), torch.linspace(-1, 1, height)
        grid = torch.stack((x.expand(height, width), y[:, None].expand(height, width)), dim=-1)
        return to_windows(pad_to_windows(grid[None], window, shift), window).to(device)
