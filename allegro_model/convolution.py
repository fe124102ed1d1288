"""Convolutions in float32 with fewer multiplications, for processors."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

# Values of a block that stays in a processor core's caches while several steps are done with it.
BLOCK_VALUES = 2**20


def convolve_wide(x: Tensor, weight: Tensor, bias: Tensor | None, padding: tuple[int, ...]) -> Tensor:
    """`F.conv3d` with two thirds of the multiplications for every axis along which the kernel is 3 long.

    Two neighbouring results of such an axis are sums and differences of four products instead of six: F(2, 3) of
    Winograd's minimal filtering, nested over the axes (arXiv 1509.09308). Everything is float32, and rounds no
    worse than the usual order of sums. Blocks of rows are done at a time, so that what lies between stays in caches.

    Args:
        x: [B, C, T, H, W] of any float type.
        weight: [C', C, kt, kh, kw] float32, each k 1 or 3.
        bias: [C'] float32 or None.
        padding: zeros along time, height and width.
    Returns:
        [B, C', T', H', W'], dtype of `x`, in the layout channels_last_3d.
    """
    x = x.permute(0, 2, 3, 4, 1)  # [B, T, H, W, C]
    size = [n + 2 * p - k + 1 for n, p, k in zip(x.shape[1:4], padding, weight.shape[2:], strict=True)]
    y = torch.empty((len(x), *size, len(weight)), dtype=x.dtype)
    kernels, axes = _filters(weight)
    for item, result in zip(x, y, strict=True):
        if axes == [0] and not any(padding[1:]):  # points do not meet: one row of blocks
            item, result = item.flatten(1, 2)[:, :, None], result.flatten(1, 2)[:, :, None]
        for box in _blocks(result, axes):
            window = _window(item, box, padding, axes)
            block = _filter(window, kernels, bias, axes)
            result[box].copy_(block[tuple(slice(n) for n in result[box].shape[:3])])
    return y.permute(0, 4, 1, 2, 3)


def _filters(weight: Tensor) -> tuple[Tensor, list[int]]:
    """[C', C, kt, kh, kw] -> the kernels of the products [4, ..., C', C], one 4 per axis of length 3, and these axes."""
    axes = [axis for axis, length in enumerate(weight.shape[2:]) if length == 3]
    sums = torch.ones(1, 1)
    for _ in axes:
        sums = torch.kron(sums, torch.tensor([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]]))
    kernels = sums @ weight.reshape(-1, sums.shape[1]).t()  # the fastest way to have the channels last
    return kernels.view(*[4] * len(axes), *weight.shape[:2]), axes


def _blocks(y: Tensor, axes: list[int]) -> Iterator[tuple[slice, slice]]:
    """Frames and rows of a result [T, H, W, C] that are done at once: even numbers, all frames if these meet."""
    T, H, W, C = y.shape
    budget = BLOCK_VALUES * torch.get_num_threads() // (W * C)  # rows
    frames = T if 0 in axes else max(1, min(T, budget // H))
    rows = max(2, budget // frames // 2 * 2)
    for t in range(0, T, frames):
        for r in range(0, H, rows):
            yield slice(t, min(t + frames, T)), slice(r, min(r + rows, H))


def _window(x: Tensor, box: tuple[slice, slice], padding: tuple[int, ...], axes: list[int]) -> Tensor:
    """What the results of a box depend on, as float32, with zeros where it ends; one more where a size is odd."""
    spans = [*box, slice(0, x.shape[2] + 2 * padding[2] - 2 * (2 in axes))]
    pads: list[int] = []
    for axis, span in enumerate(spans):
        length = span.stop - span.start
        first = span.start - padding[axis]
        last = first + (length + length % 2 + 2 if axis in axes else length)
        low, high = max(first, 0), min(last, x.shape[axis])
        x = x.narrow(axis, low, high - low)
        pads = [low - first, last - high, *pads]
    return F.pad(x, (0, 0, *pads)).float() if any(pads) else x.float()


def _filter(x: Tensor, kernels: Tensor, bias: Tensor | None, axes: list[int]) -> Tensor:
    """[T, H, W, C] -> [T', H', W', C'], two shorter along each of the axes; nested, the last level multiplies."""
    if not axes:
        rows = x.reshape(-1, x.shape[-1])
        return F.linear(rows, kernels, bias).view(*x.shape[:-1], -1)
    axis, rest = axes[0], axes[1:]
    a, b, c, d = (_every_other(x, axis, first) for first in range(4))
    plus = _filter(b + c, kernels[1], bias, rest)
    minus = _filter(c - b, kernels[2], None, rest)
    shape = list(plus.shape)
    shape[axis] *= 2
    y = plus.new_empty(shape)
    torch.sub(plus, minus, out=_every_other(y, axis, 1, 0))
    plus += minus
    torch.add(plus, _filter(a - c, kernels[0], None, rest), out=_every_other(y, axis, 0, 0))
    _every_other(y, axis, 1, 0).sub_(_filter(b - d, kernels[3], None, rest))
    return y


def _every_other(x: Tensor, axis: int, first: int, halo: int = 2) -> Tensor:
    """Every other slice along an axis from `first` on, as many as there are pairs of results."""
    return x[(slice(None),) * axis + (slice(first, first + x.shape[axis] - halo, 2),)]
