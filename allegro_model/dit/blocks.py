"""The transformer block: modulated self-attention, cross-attention to the text, modulated feed-forward.

Attribute names equal the published checkpoint keys (`attn1`, `attn2`, `ff.net.2`, ...).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention import Attention
from ..ops import ROWS, CastParam, own_arithmetic
from .rope import apply_rope

KeysValues = tuple[Tensor, Tensor]
# (name, compute) -> the output of a part of a block, "self" or "cross" attention, which may be that of an earlier step.
Reuse = Callable[[str, Callable[[], Tensor]], Tensor]


def modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """LN(x) * (1 + scale) + shift, with LN over the last axis and without parameters."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=eps), 1 + scale)


class _Projections(nn.Module):
    """q, k, v and output projections, D -> D with bias."""

    def __init__(self, width: int, heads: int, operations: Any, **kwargs: Any) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = operations.Linear(width, width, **kwargs)
        self.to_k = operations.Linear(width, width, **kwargs)
        self.to_v = operations.Linear(width, width, **kwargs)
        self.to_out = nn.ModuleList([operations.Linear(width, width, **kwargs)])


class SelfAttention(_Projections):
    """Every token of the clip attends to every token."""

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], attention: Attention) -> Tensor:
        """[B, N, D] -> [B, N, D]; `rope` from `rope_tables`."""
        q = apply_rope(self.to_q(x), self.heads, *rope)  # [B, N, D]
        k = apply_rope(self.to_k(x), self.heads, *rope)
        return self.to_out[0](attention(q, k, self.to_v(x), self.heads))


class CrossAttention(_Projections):
    """Every token of the clip attends to the prompt."""

    def project(self, text: Tensor) -> KeysValues:
        """[B, L, D] caption tokens -> keys and values, the part that does not depend on the clip."""
        return self.to_k(text), self.to_v(text)

    def forward(self, x: Tensor, text: KeysValues, bias: Tensor | None, attention: Attention) -> Tensor:
        """[B, N, D] -> [B, N, D]; `bias` [B, 1, 1, L] additive, None when every key counts."""
        return self.to_out[0](attention(self.to_q(x), *text, self.heads, mask=bias))


class _GELUProjection(nn.Module):
    """Holds the checkpoint's `net.0.proj` level."""

    def __init__(self, width: int, hidden: int, operations: Any, **kwargs: Any) -> None:
        super().__init__()
        self.proj = operations.Linear(width, hidden, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.proj(x)  # 4D wide, the largest tensor of a step: without gradients there is room for one
        if torch.is_grad_enabled():
            return F.gelu(hidden, approximate="tanh")
        return torch.ops.aten.gelu_(hidden, approximate="tanh")


class FeedForward(nn.Module):
    """D -> 4D -> D."""

    def __init__(self, width: int, operations: Any, **kwargs: Any) -> None:
        super().__init__()
        # Index 1 was a dropout in training; the published keys say 0 and 2.
        self.net = nn.ModuleList([
            _GELUProjection(width, 4 * width, operations, **kwargs),
            nn.Identity(),
            operations.Linear(4 * width, width, **kwargs),
        ])

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        if not own_arithmetic(x):
            return self.net[2](self.net[0](x))
        # The hidden values, 4D wide, would be the largest tensor of a step; in parts they also stay near the processor.
        return torch.cat([self.net[2](self.net[0](part)) for part in x.split(ROWS, dim=1)], dim=1)


class Block(nn.Module):
    """One of the DiT's identical blocks. Source: PixArt-alpha block (arXiv 2310.00426) with 3-D RoPE."""

    def __init__(self, width: int, heads: int, norm_eps: float, operations: Any, cast_param: CastParam,
                 **kwargs: Any) -> None:
        super().__init__()
        self.norm_eps = norm_eps
        self.cast_param = cast_param
        self.attn1 = SelfAttention(width, heads, operations, **kwargs)
        self.attn2 = CrossAttention(width, heads, operations, **kwargs)
        self.ff = FeedForward(width, operations, **kwargs)
        self.scale_shift_table = nn.Parameter(torch.zeros(6, width, **kwargs))

    def forward(self, x: Tensor, modulation: Tensor, rope: tuple[Tensor, Tensor], text: KeysValues,
                text_bias: Tensor | None, attention: Attention, reuse: Reuse | None = None) -> Tensor:
        """Transforms the tokens.

        Args:
            x: [B, N, D] tokens.
            modulation: [B, 6, D] from `AdaLNSingle`.
            rope: rotary tables of the grid.
            text: keys and values of the prompt, from `attn2.project`.
            text_bias: [B, 1, 1, L] or None.
            attention: the kernel.
            reuse: decides for each attention whether it is computed; None computes both.
        Returns:
            [B, N, D].
        """
        def attend() -> Tensor:
            return self.attn1(modulate(x, shift_a, scale_a, self.norm_eps), rope, attention)

        def read() -> Tensor:
            return self.attn2(x, text, text_bias, attention)

        table = self.cast_param(self.scale_shift_table, x)
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = (table + modulation).unsqueeze(2).unbind(1)
        x = torch.addcmul(x, gate_a, attend() if reuse is None else reuse("self", attend))
        x = x + (read() if reuse is None else reuse("cross", read))  # neither normalised nor gated
        u = modulate(x, shift_f, scale_f, self.norm_eps)
        return torch.addcmul(x, gate_f, self.ff(u))
