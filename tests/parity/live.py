"""Both sides of the live comparisons: our modules and diffusers', with the same weights and inputs."""

import pytest
import torch
from parity.cases import recipe
from torch import Tensor, nn

from allegro_model.config import DiTConfig
from allegro_model.dit import AllegroDiT

diffusers = pytest.importorskip("diffusers", reason="the reference of these comparisons is diffusers (test extra)")
from diffusers.models.embeddings import get_3d_rotary_pos_embed_allegro  # noqa: E402 (after the guard)

DIT = {
    "num_layers": 2, "num_attention_heads": 3, "attention_head_dim": 48, "caption_channels": 40,
    "cross_attention_dim": 144, "sample_height": 12, "sample_width": 20, "sample_frames": 6,
}

def build_dit() -> tuple[AllegroDiT, nn.Module]:
    """Our DiT and diffusers', tiny, with the same weights."""
    ours = AllegroDiT(DiTConfig.from_dict(DIT))
    weights = {k: recipe(k, tuple(v.shape), 5) for k, v in ours.state_dict().items()}
    ours.load_state_dict(weights, strict=True)
    reference = diffusers.AllegroTransformer3DModel(**DIT)
    reference.load_state_dict(weights, strict=True)
    return ours.eval(), reference.eval()


def dit_inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """latents, fractional timesteps, text embeddings and a mask that keeps a different number per item."""
    generator = torch.Generator().manual_seed(3)
    B, L = shape[0], 11
    latents = torch.randn(shape, generator=generator)
    embeds = torch.randn((B, L, DIT["caption_channels"]), generator=generator)
    mask = torch.arange(L)[None] < torch.tensor([7, 4])[:B, None]
    return latents.to(dtype), torch.tensor([909.0909, 52.5789])[:B], embeds.to(dtype), mask


def rotary(config: DiTConfig, shape: tuple[int, ...]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """What diffusers' pipeline hands to its transformer."""
    grid = (shape[3] // 2, shape[4] // 2)
    scales = (config.interpolation_scale_t, config.interpolation_scale_h, config.interpolation_scale_w)
    *tables, t, h, w = get_3d_rotary_pos_embed_allegro(
        embed_dim=config.attention_head_dim, crops_coords=((0, 0), grid), grid_size=grid, temporal_size=shape[2],
        interpolation_scale=scales, device=torch.device("cpu"))
    positions = torch.cartesian_prod(t.long(), h.long(), w.long()).T.reshape(3, 1, -1).contiguous()
    return tuple(tables), tuple(positions)


def relative_error(x: Tensor, exact: Tensor) -> float:
    """Root mean square of the difference, relative to that of `exact`."""
    return float((x.float() - exact).pow(2).mean().sqrt() / exact.pow(2).mean().sqrt())
