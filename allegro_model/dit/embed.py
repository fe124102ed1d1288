"""What enters the transformer: latent patches, the time, the caption.

Attribute names equal the published checkpoint keys.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SINUSOID_WIDTH = 256


def timestep_sinusoid(timesteps: Tensor) -> Tensor:
    """[B] real-valued timesteps -> [B, 256] float32, 128 cosines then 128 sines.

    Source: the timestep embedding of DDPM (arXiv 2006.11239) with frequency shift 0.
    """
    half = SINUSOID_WIDTH // 2
    exponents = torch.arange(half, dtype=torch.float32, device=timesteps.device) / half
    angles = timesteps.float()[:, None] * torch.exp(-math.log(10000.0) * exponents)
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def position_table(grid: tuple[int, int, int], width: int, device: torch.device) -> Tensor:
    """[N, width] float32 sines and cosines of the absolute (t, h, w) token index.

    The last two thirds of the channels carry it, 2 * (width // 9) per axis with periods from 2 pi to
    200 pi tokens; the channels before stay zero, so that patch values can travel there undisturbed.
    """
    with torch.inference_mode(False):  # a table that is kept must also serve a run that records gradients
        return _position_table(grid, width).to(device)


def _position_table(grid: tuple[int, int, int], width: int) -> Tensor:
    pairs = width // 9
    frequencies = 100.0 ** (-torch.arange(pairs, dtype=torch.float32) / pairs)
    axes = []
    for axis, length in enumerate(grid):
        angles = torch.arange(length, dtype=torch.float32)[:, None] * frequencies
        shape = [1, 1, 1, 2 * pairs]
        shape[axis] = length
        axes.append(torch.cat((angles.sin(), angles.cos()), dim=-1).view(shape).expand(*grid, 2 * pairs))
    table = torch.cat(axes, dim=-1).flatten(0, 2)  # [N, 6 * pairs]
    return F.pad(table, (width - table.shape[-1], 0))


class PatchEmbed(nn.Module):
    """Latent cells -> tokens, frame by frame. Source: ViT patch embedding."""

    def __init__(self, in_channels: int, width: int, patch_size: int, operations: Any, **kwargs: Any) -> None:
        super().__init__()
        self.proj = operations.Conv2d(in_channels, width, kernel_size=patch_size, stride=patch_size, **kwargs)

    def forward(self, latents: Tensor) -> Tensor:
        """[B, C, t, h, w] -> [B, N, D], N = t * h/p * w/p with w fastest."""
        B, _, t, _, _ = latents.shape
        x = self.proj(latents.transpose(1, 2).flatten(0, 1))  # [B*t, D, h/p, w/p]
        return x.unflatten(0, (B, t)).permute(0, 1, 3, 4, 2).flatten(1, 3)  # [B, N, D]


class TimestepEmbedder(nn.Module):
    """Sinusoid -> D."""

    def __init__(self, width: int, operations: Any, **kwargs: Any) -> None:
        super().__init__()
        self.linear_1 = operations.Linear(SINUSOID_WIDTH, width, **kwargs)
        self.linear_2 = operations.Linear(width, width, **kwargs)

    def forward(self, sinusoid: Tensor) -> Tensor:
        """[B, 256] -> [B, D]."""
        return self.linear_2(F.silu(self.linear_1(sinusoid)))


class _TimestepEmbedding(nn.Module):
    """Holds the checkpoint's `emb` level."""

    def __init__(self, width: int, operations: Any, **kwargs: Any) -> None:
        super().__init__()
        self.timestep_embedder = TimestepEmbedder(width, operations, **kwargs)


class AdaLNSingle(nn.Module):
    """One modulation of the time for all blocks. Source: PixArt-alpha (arXiv 2310.00426)."""

    def __init__(self, width: int, operations: Any, **kwargs: Any) -> None:
        super().__init__()
        self.emb = _TimestepEmbedding(width, operations, **kwargs)
        self.linear = operations.Linear(width, 6 * width, **kwargs)

    def forward(self, timesteps: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Embeds the time.

        Args:
            timesteps: [B] in 0 .. 999, real-valued.
            dtype: dtype of the activations.
        Returns:
            modulation [B, 6, D] that every block adds its table to, and the embedding [B, D] for the output.
        """
        sinusoid = timestep_sinusoid(timesteps).to(dtype)  # fp32 until here: angles reach 999 rad
        embedding = self.emb.timestep_embedder(sinusoid)
        return self.linear(F.silu(embedding)).unflatten(-1, (6, -1)), embedding


class CaptionProjection(nn.Module):
    """Text embeddings -> D."""

    def __init__(self, caption_channels: int, width: int, operations: Any, **kwargs: Any) -> None:
        super().__init__()
        self.linear_1 = operations.Linear(caption_channels, width, **kwargs)
        self.linear_2 = operations.Linear(width, width, **kwargs)

    def forward(self, prompt_embeds: Tensor) -> Tensor:
        """[B, L, C] -> [B, L, D]."""
        return self.linear_2(F.gelu(self.linear_1(prompt_embeds), approximate="tanh"))
