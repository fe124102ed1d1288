"""The attention contract, and its default.

Every attention of the DiT goes through one callable with this signature, so that a host can put its own
kernel in its place. The model never asks which kernels are installed.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Attention(Protocol):
    """softmax(q k^T / sqrt(dh) + mask) v for heads that are contiguous slices of the last axis."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
        """Attends.

        Args:
            q: [B, Nq, heads * dh].
            k, v: [B, Nk, heads * dh].
            heads: number of heads.
            mask: additive bias, broadcastable to [B, heads, Nq, Nk], or None.
        Returns:
            [B, Nq, heads * dh].
        """
        ...


def sdpa(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """`Attention` by torch's scaled_dot_product_attention, which picks the fastest kernel it has."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))  # [B, heads, N, dh]
    if k.device.type == "cpu":  # this kernel reads keys and values once per block of queries; in one piece it is faster
        k, v = k.contiguous(), v.contiguous()
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out.transpose(1, 2).flatten(2)


def flash(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """`Attention` by the flash-attn package; a mask, which it does not take, goes to `sdpa`."""
    if mask is not None:
        return sdpa(q, k, v, heads, mask)
    from flash_attn import flash_attn_func

    q, k, v = (x.unflatten(-1, (heads, -1)) for x in (q, k, v))  # [B, N, heads, dh]
    return flash_attn_func(q, k, v).flatten(2)


def best_attention(device: torch.device, dtype: torch.dtype) -> Attention:
    """The fastest kernel installed for a device and dtype: flash-attn on CUDA in half precision, else torch's.

    flash-attn needs a GPU of the Ampere generation or later, and a build for the installed torch.
    """
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return sdpa
    try:
        import flash_attn  # noqa: F401
    except ImportError:
        return sdpa
    return flash if torch.cuda.get_device_capability(device) >= (8, 0) else sdpa
