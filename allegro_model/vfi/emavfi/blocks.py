"""The transformer block: attention between the windows of two frames, which yields appearance and motion.

Attribute names equal the published checkpoint keys. Source: EMA-VFI (arXiv 2303.00440), section 3.1.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ...config import VFI_HEAD_DIM
from .layers import Layers
from .windows import crop_from_windows, pad_to_windows, to_windows, window_mask, window_positions

BLOCK_EPS = 1e-6
MLP_RATIO = 4


class _DepthwiseConv(nn.Module):
    """Holds the checkpoint's `dwconv.dwconv` level."""

    def __init__(self, channels: int, layers: Layers) -> None:
        super().__init__()
        self.dwconv = layers.conv(channels, channels, groups=channels)


class MLP(nn.Module):
    """C -> 4C -> C, with a 3x3 convolution per channel in between."""

    def __init__(self, width: int, layers: Layers) -> None:
        super().__init__()
        self.fc1 = layers.linear(width, MLP_RATIO * width)
        self.dwconv = _DepthwiseConv(MLP_RATIO * width, layers)
        self.fc2 = layers.linear(MLP_RATIO * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, h, w, C] -> the same."""
        x = self.fc1(x).permute(0, 3, 1, 2)  # [B, 4C, h, w], channels last in memory
        x = self.dwconv.dwconv(x).permute(0, 2, 3, 1)  # [B, h, w, 4C]
        return self.fc2(F.gelu(x))


class InterFrameAttention(nn.Module):
    """Queries of one frame's window, keys and values of the other frame's.

    Appearance is what attention brings from there; motion is where it brought it from: the mean position
    attended to, less the own one, embedded.
    """

    def __init__(self, width: int, motion_width: int, layers: Layers) -> None:
        super().__init__()
        self.heads = max(1, width // VFI_HEAD_DIM)
        self.cast_param = layers.cast_param
        self.q = layers.linear(width, width)
        self.kv = layers.linear(width, 2 * width)
        self.cor_embed = layers.linear(2, motion_width)
        self.proj = layers.linear(width, width)
        self.motion_proj = layers.linear(motion_width, motion_width)

    def forward(self, q: Tensor, kv: Tensor, positions: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Attends, window by window.

        Args:
            q: [V, N, C] queries, V = windows of all frames.
            kv: [V, N, 2C] keys, then values, of the other frame's windows.
            positions: [W, N, 2] float32; V is a multiple of W, windows fastest.
            mask: [W, N, N] added to the logits.
        Returns:
            appearance [V, N, C], motion [V, N, M].
        """
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (q, *kv.chunk(2, dim=-1)))  # [V, nh, N, dh]
        logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)  # [V, nh, N, N]
        if mask is not None:
            logits = logits.unflatten(0, (-1, mask.shape[0])).add_(mask[:, None]).flatten(0, 1)
        weights = logits.float().softmax(dim=-1)  # motion needs it, and in bfloat16 it is slower on a CPU
        appearance = (weights.to(v.dtype) @ v).transpose(1, 2).flatten(2)  # [V, N, C]
        return self.proj(appearance), self.motion_proj(self._displacement(weights, positions).to(q.dtype))

    def _displacement(self, weights: Tensor, positions: Tensor) -> Tensor:
        """[V, nh, N, N], [W, N, 2] -> [V, N, M], all float32, which is what a small difference needs.

        The embedding is linear and the weights sum to one, so that attending to embedded positions is the same as
        embedding the attended position: two numbers per head instead of M / nh, and the bias falls out.
        """
        where = weights.unflatten(0, (-1, positions.shape[0])) @ positions[:, None]  # [B, W, nh, N, 2]
        moved = (where - positions[:, None]).flatten(0, 1)  # [V, nh, N, 2]
        table: Tensor = self.cor_embed.weight  # type: ignore[assignment]
        embed = self.cast_param(table, moved).unflatten(0, (self.heads, -1))  # [nh, M / nh, 2]
        return (moved @ embed.transpose(1, 2)).transpose(1, 2).flatten(2)


class Block(nn.Module):
    """Attention between both frames, then an MLP. The skip connection starts at the normalised tokens.

    Args:
        width: C, channels of the tokens.
        motion_width: M, channels of the motion it yields.
        window, shift: edge of the attention windows and their displacement, cells.
        layers: builds the layers.
    """

    def __init__(self, width: int, motion_width: int, window: int, shift: int, layers: Layers) -> None:
        super().__init__()
        self.window, self.shift, self.tables = window, shift, layers.tables
        self.norm1 = layers.norm(width, BLOCK_EPS)
        self.attn = InterFrameAttention(width, motion_width, layers)
        self.norm2 = layers.norm(width, BLOCK_EPS)
        self.mlp = MLP(width, layers)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Transforms the tokens of both frames.

        Args:
            x: [2B, h, w, C], the first half belongs to the first frames.
        Returns:
            tokens [2B, h, w, C] and motion [2B, h, w, M].
        """
        size, window, shift = (x.shape[1], x.shape[2]), self.window, self.shift
        key = (*size, window, shift, x.device)
        n = self.norm1(pad_to_windows(x, window, shift))  # [2B, Hp, Wp, C]; padding becomes the norm's bias
        other = self.attn.kv(n).roll(n.shape[0] // 2, dims=0)  # the other frame's
        appearance, motion = self.attn(
            to_windows(self.attn.q(n), window), to_windows(other, window),
            self.tables(window_positions, *key), self.tables(window_mask, *key))
        y = n + self._from_windows(appearance, n)  # [2B, Hp, Wp, C]
        y = crop_from_windows(y, size, window, shift)  # [2B, h, w, C]
        motion = crop_from_windows(self._from_windows(motion, n), size, window, shift)
        return y + self.mlp(self.norm2(y)), motion

    def _from_windows(self, x: Tensor, like: Tensor) -> Tensor:
        """The inverse of `to_windows`: [V, N, C] -> [2B, Hp, Wp, C], sizes as `like`."""
        B, height, width = like.shape[:3]
        x = x.view(B, height // self.window, width // self.window, self.window, self.window, -1)
        return x.transpose(2, 3).reshape(B, height, width, -1)
