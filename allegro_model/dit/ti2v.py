"""AllegroTI2V: the text-to-video transformer with given frames as a second input. Only the difference is here.

Attribute names equal the published checkpoint keys. Reference: rhymes-ai/Allegro-TI2V.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..attention import Attention, sdpa
from ..config import DiTConfig
from ..errors import GeometryError
from ..ops import CastParam, cast_like, layers
from .embed import PatchEmbed
from .model import AllegroDiT

MIN_LATENT_FRAMES = 2


class AllegroTI2V(AllegroDiT):
    """Noise prediction from noisy latents and a condition.

    The input has 3 x 4 channels: noisy latents, latents of the video in which only the given frames are not
    grey, and a mask that is 0 for them. Each has its own patch embedding; those of the condition pass through
    a linear layer that was zero before training. What the condition adds to the tokens is the same at every
    step, but it takes a thousandth of one, less than keeping it would cost in memory.

    Args:
        config: sizes of the checkpoint; `in_channels` is that of one third of the input.
        operations, attention, cast_param, device, dtype: as in `AllegroDiT`.
    """

    def __init__(self, config: DiTConfig, *, operations: Any = layers, attention: Attention = sdpa,
                 cast_param: CastParam = cast_like, device: torch.device | str | None = None,
                 dtype: torch.dtype | None = None) -> None:
        super().__init__(config, operations=operations, attention=attention, cast_param=cast_param,
                         device=device, dtype=dtype)

        def extra_embed() -> nn.Sequential:
            D, kwargs = config.width, {"device": device, "dtype": dtype}
            return nn.Sequential(PatchEmbed(config.in_channels, D, config.patch_size, operations, **kwargs),
                                 operations.Linear(D, D, bias=False, **kwargs))

        self.pos_embed_masked_video = extra_embed()
        self.pos_embed_mask = extra_embed()
        self.pos_embed_first_frame = extra_embed()

    def embed(self, latents: Tensor) -> Tensor:
        """[B, 12, t, h, w] -> tokens [B, N, D].

        Raises:
            GeometryError: another number of channels, or a single latent frame.
        """
        channels = self.config.in_channels
        if latents.shape[1] != 3 * channels or latents.shape[2] < MIN_LATENT_FRAMES:
            raise GeometryError(
                f"input of shape {list(latents.shape)}: expected [B, {3 * channels}, t, h, w] with t of at least "
                f"{MIN_LATENT_FRAMES} ({4 * MIN_LATENT_FRAMES} frames): noisy latents, masked video, mask.")
        noisy, masked_video, mask = latents.chunk(3, dim=1)
        return super().embed(noisy) + self.pos_embed_masked_video(masked_video) + self.pos_embed_mask(mask)

    def output_time(self, time: Tensor, latents: Tensor) -> Tensor:
        """Adds the mean token of the first noisy latent frame: [B, D]."""
        first = latents[:, : self.config.in_channels, :1]
        return time + self.pos_embed_first_frame(first).mean(dim=1)
