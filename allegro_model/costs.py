"""What a run costs in arithmetic, from the sizes of the networks alone.

A FLOP is one multiplication or one addition, so that a product of [m, k] and [k, n] has 2 m k n of them. Matrix products,
convolutions and attention are counted, nothing else: the rest is moving memory. All functions are plain formulas of whole
numbers, so that a page in a browser can say the same. N tokens, D width of the transformer, L tokens of text.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from .config import DiTConfig, VAEConfig
from .geometry import LatentShape, token_count


class DiTFlops(NamedTuple):
    """Operations of one evaluation of the transformer, for one prompt."""

    linear: int
    self_attention: int
    cross_attention: int

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self)


def dit_flops(config: DiTConfig, shape: LatentShape, text_tokens: int) -> DiTFlops:
    """One evaluation for one prompt, whose keys and values are there already.

    A layer has 28 N D^2 in its linear parts: 4 projections of self-attention (8), 2 of cross-attention (4), a feed-forward
    of 4 D (16). Self-attention has 4 N^2 D, cross-attention 4 N L D. At 88 frames of 1280x720 (79,200 tokens, 32 layers of
    2304) that is 2.2e15 in all, 83 % of it self-attention.

    Args:
        config: of the transformer.
        shape: of the latents.
        text_tokens: L, of the prompt.
    """
    N, D, patch = token_count(shape, config.patch_size), config.width, config.patch_size**2
    ends = 2 * N * patch * (config.in_channels + config.out_channels) * D
    return DiTFlops(config.num_layers * 28 * N * D * D + ends, config.num_layers * 4 * N * N * D,
                    config.num_layers * 4 * N * text_tokens * D)


def prompt_flops(config: DiTConfig, text_tokens: int) -> int:
    """What the transformer computes of one prompt, once per run: its projection, and keys and values for every layer."""
    D = config.width
    return 2 * text_tokens * (config.caption_channels * D + D * D + config.num_layers * 2 * D * D)


def text_flops(config: Mapping[str, Any], text_tokens: int) -> int:
    """A T5 v1.1 encoder reading one text.

    Args:
        config: of the encoder, in the names of transformers.
        text_tokens: of the text, without padding.
    """
    d, inner, ff = config["d_model"], config["d_kv"] * config["num_heads"], config["d_ff"]
    layer = 2 * text_tokens * (4 * d * inner + 3 * d * ff) + 4 * text_tokens**2 * inner
    return int(config["num_layers"] * layer)


# The VideoVAE. P is the number of positions (frames x rows x columns) a layer works at.


def vae_decode_flops(config: VAEConfig, cells: tuple[int, int, int]) -> int:
    """Decoding one tile.

    Args:
        config: of the VAE.
        cells: (t, h, w) of the tile, latent cells.
    """
    channels = tuple(reversed(config.block_out_channels))
    P = cells[0] * cells[1] * cells[2]
    total = _conv(config.latent_channels, channels[0], 9, P) + _conv(channels[0], channels[0], 3, P)
    total += _middle(channels[0], cells)
    for level, width in enumerate(channels):
        total += _residuals(channels[max(level - 1, 0)], width, config.layers_per_block + 1, P)
        if config.temporal_up[level]:
            total += _conv(width, 2 * width, 9, P) + 3 * _conv(width, width, 27, 2 * P)
            P *= 2
        if level < len(channels) - 1:
            P *= 4
            total += _conv(width, width, 9, P)
    return total + _conv(channels[-1], channels[-1], 3, P) + _conv(channels[-1], 3, 9, P)


def vae_encode_flops(config: VAEConfig, cells: tuple[int, int, int]) -> int:
    """Encoding one tile; `cells` (t, h, w) of its latents."""
    channels = config.block_out_channels
    t, h, w = cells
    P = t * h * w * config.temporal_factor * config.spatial_factor**2
    total = _conv(3, channels[0], 9, P) + _conv(channels[0], channels[0], 3, P)
    for level, width in enumerate(channels):
        total += _residuals(channels[max(level - 1, 0)], width, config.layers_per_block, P)
        if config.temporal_down[level]:
            P //= 2
            total += _conv(width, width, 18, P) + 3 * _conv(width, width, 27, P)
        if level < len(channels) - 1:
            P //= 4
            total += _conv(width, width, 9, P)
    return (total + _middle(channels[-1], cells) + _conv(channels[-1], channels[-1], 3, P)
            + _conv(channels[-1], 2 * config.latent_channels, 9, P))


def _conv(in_channels: int, channels: int, kernel: int, positions: int) -> int:
    """A convolution with `kernel` weights per pair of channels."""
    return 2 * in_channels * channels * kernel * positions


def _residuals(in_channels: int, channels: int, count: int, positions: int) -> int:
    """So many pairs of a ResNet and a temporal block; the first ResNet changes the width, with a shortcut if it does."""
    first = _conv(in_channels, channels, 9, positions) + _conv(channels, channels, 9, positions)
    if in_channels != channels:
        first += _conv(in_channels, channels, 1, positions)
    return first + (count - 1) * 2 * _conv(channels, channels, 9, positions) + count * 4 * _conv(channels, channels, 3, positions)


def _middle(channels: int, cells: tuple[int, int, int]) -> int:
    """Two pairs of blocks, and attention among the cells of each frame."""
    t, h, w = cells
    attention = 4 * _conv(channels, channels, 1, t * h * w) + 4 * t * (h * w) ** 2 * channels
    return _residuals(channels, channels, 2, t * h * w) + attention
