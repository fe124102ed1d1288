"""AllegroDiT: latents + time + prompt -> predicted noise.

Read `forward` first; it is the whole model. Attribute names equal the published checkpoint keys, which are
the same in the official and the diffusers layout. Reference: rhymes-ai/Allegro, arXiv 2410.15458.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ..attention import Attention, sdpa
from ..config import DiTConfig
from ..errors import GeometryError
from ..ops import CastParam, cast_like, layers
from .blocks import Block, CrossAttention, KeysValues, Reuse, modulate
from .embed import AdaLNSingle, CaptionProjection, PatchEmbed, position_table
from .rope import rope_tables

Table = TypeVar("Table")

# exp(-10000) is exactly 0 in every float type, so a masked key has no weight at all.
MASKED = -10000.0


class Prepared(NamedTuple):
    """What a run needs of its prompt, computed once: keys and values per block, and the bias of padded keys."""

    text: tuple[KeysValues, ...]
    bias: Tensor | None


def trim_text(prompt_embeds: Tensor, prompt_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Drops the padding that no prompt of the batch reaches; the result of attention is exactly the same.

    Args:
        prompt_embeds: [B, L, C].
        prompt_mask: [B, L], nonzero = attend, or None for all.
    Returns:
        [B, L', C] and the additive bias [B, 1, 1, L'] of what is still padded, None when nothing is.
    """
    if prompt_mask is None:
        return prompt_embeds, None
    keep = prompt_mask.to(device=prompt_embeds.device).bool()
    # A prompt without any token attends to all of them alike, as a constant bias does in the softmax.
    if bool(keep.any(dim=1).all()):
        length = int(keep.any(dim=0).nonzero().max()) + 1
        prompt_embeds, keep = prompt_embeds[:, :length], keep[:, :length]
    if bool(keep.all()):
        return prompt_embeds, None
    bias = torch.zeros(keep.shape, dtype=prompt_embeds.dtype, device=keep.device).masked_fill_(~keep, MASKED)
    return prompt_embeds, bias[:, None, None]


class AllegroDiT(nn.Module):
    """The text-to-video transformer.

    Args:
        config: sizes of the checkpoint.
        operations: namespace of layer classes, see `ops`.
        attention: kernel for self- and cross-attention.
        cast_param: brings the bare scale/shift tables to an activation's dtype and device.
        device, dtype: of the weights.
    """

    def __init__(self, config: DiTConfig, *, operations: Any = layers, attention: Attention = sdpa,
                 cast_param: CastParam = cast_like, device: torch.device | str | None = None,
                 dtype: torch.dtype | None = None) -> None:
        super().__init__()
        kwargs: dict[str, Any] = {"device": device, "dtype": dtype}
        self.config = config
        self.attention = attention
        self.cast_param = cast_param
        self._tables: dict[Callable[..., Any], tuple[Any, Any]] = {}  # what makes it -> of what, the table
        D, p = config.width, config.patch_size
        self.pos_embed = PatchEmbed(config.in_channels, D, p, operations, **kwargs)
        self.adaln_single = AdaLNSingle(D, operations, **kwargs)
        self.caption_projection = CaptionProjection(config.caption_channels, D, operations, **kwargs)
        self.transformer_blocks = nn.ModuleList([
            Block(D, config.num_attention_heads, config.norm_eps, operations, cast_param, **kwargs)
            for _ in range(config.num_layers)
        ])
        self.scale_shift_table = nn.Parameter(torch.zeros(2, D, **kwargs))
        self.proj_out = operations.Linear(D, p * p * config.out_channels, **kwargs)

    def forward(self, latents: Tensor, timesteps: Tensor, prompt_embeds: Tensor,
                prompt_mask: Tensor | None = None) -> Tensor:
        """Predicts the noise in `latents`.

        Args:
            latents: [B, 4, t, h, w], h and w even, already divided by sqrt(sigma^2 + 1).
            timesteps: [B], 0 .. 999, real-valued; never rounded.
            prompt_embeds: [B, L, C].
            prompt_mask: [B, L], nonzero = attend; None attends to everything.
        Returns:
            eps [B, 4, t, h, w].
        Raises:
            GeometryError: h or w is odd.
        """
        return self.denoise(latents, timesteps, self.prepare(prompt_embeds, prompt_mask))

    def prepare(self, prompt_embeds: Tensor, prompt_mask: Tensor | None = None) -> Prepared:
        """Everything that depends on the prompt alone; pass it to `denoise` at every step.

        Args:
            prompt_embeds: [B, L, C].
            prompt_mask: [B, L], nonzero = attend; None attends to everything.
        """
        prompt_embeds, bias = trim_text(prompt_embeds, prompt_mask)
        text = self.caption_projection(prompt_embeds)  # [B, L, D]
        cross: list[CrossAttention] = [block.attn2 for block in self.transformer_blocks]  # type: ignore[misc]
        return Prepared(tuple(attention.project(text) for attention in cross), bias)

    def denoise(self, latents: Tensor, timesteps: Tensor, prepared: Prepared, *,
                reuse: Callable[[int], Reuse] | None = None) -> Tensor:
        """`forward` with the prompt's share already computed; `reuse(i)` is given to block i."""
        grid = self.grid(latents)  # tokens per axis
        x = self.embed(latents)  # [B, N, D]
        modulation, time = self.adaln_single(timesteps, x.dtype)  # [B, 6, D], [B, D]
        rope = self.rope(grid, x.device)
        for i, (block, text) in enumerate(zip(self.transformer_blocks, prepared.text, strict=True)):
            x = block(x, modulation, rope, text, prepared.bias, self.attention,
                      None if reuse is None else reuse(i))  # [B, N, D]
        return self.unembed(x, self.output_time(time, latents), grid)  # [B, 4, t, h, w]

    def grid(self, latents: Tensor) -> tuple[int, int, int]:
        """(t, h/p, w/p), the tokens per axis.

        Raises:
            GeometryError: h or w is not a multiple of the patch size.
        """
        t, h, w = latents.shape[-3:]
        p = self.config.patch_size
        if h % p or w % p:
            raise GeometryError(f"latents of {h}x{w} cells: height and width must be multiples of {p} cells "
                                f"({8 * p} pixels). Choose the next multiple.")
        return t, h // p, w // p

    def rope(self, grid: tuple[int, int, int], device: torch.device) -> tuple[Tensor, Tensor]:
        """Rotary tables of the grid."""
        c = self.config
        scales = (c.interpolation_scale_t, c.interpolation_scale_h, c.interpolation_scale_w)
        return self._keep(rope_tables, grid, c.attention_head_dim, scales, device)

    def _keep(self, make: Callable[..., Table], *key: Any) -> Table:
        """`make(*key)`, kept for the next step: one table of a kind, 30 MB for 720p, gone when the weights move."""
        if torch.compiler.is_compiling():
            return make(*key)
        if self._tables.get(make, (None, None))[0] != key:
            self._tables[make] = (key, make(*key))
        return self._tables[make][1]

    def _apply(self, *args: Any, **kwargs: Any) -> AllegroDiT:
        self._tables.clear()
        return super()._apply(*args, **kwargs)

    def embed(self, latents: Tensor) -> Tensor:
        """[B, C, t, h, w] -> tokens [B, N, D]."""
        x = self.pos_embed(latents)
        if self.config.absolute_position:
            x = x + self._keep(position_table, self.grid(latents), self.config.width, x.device).to(x.dtype)
        return x

    def output_time(self, time: Tensor, latents: Tensor) -> Tensor:
        """The embedding [B, D] that modulates the output: the time alone; image-to-video adds to it."""
        return time

    def unembed(self, x: Tensor, time: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """Tokens [B, N, D] and time embedding [B, D] -> eps [B, 4, t, h, w]."""
        p, (t, h, w) = self.config.patch_size, grid
        table = self.cast_param(self.scale_shift_table, x)
        shift, scale = (table + time[:, None]).unsqueeze(2).unbind(1)  # [B, 1, D] each
        y = self.proj_out(modulate(x, shift, scale, 1e-6))  # [B, N, p*p*C]
        y = y.unflatten(-1, (p, p, -1)).unflatten(1, (t, h, w))  # [B, t, h, w, p, q, C]
        y = y.permute(0, 6, 1, 2, 4, 3, 5)  # [B, C, t, h, p, w, q]
        return y.reshape(y.shape[0], -1, t, h * p, w * p)
