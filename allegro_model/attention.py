"""The attention contract, and its default.

Every attention of the DiT goes through one callable with this signature, so that a host can put its own
kernel in its place. The model never asks which kernels are installed.
"""

from __future__ import annotations

from typing import Protocol

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
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out.transpose(1, 2).flatten(2)
