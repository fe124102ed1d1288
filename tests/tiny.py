"""Networks of the same family, small enough for a test, with weights from a fixed pattern instead of an RNG."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from allegro_model.config import DIT_88X720P, VAE_720P, DiTConfig, VAEConfig, VFIConfig
from allegro_model.dit import AllegroDiT
from allegro_model.vae import VideoVAE
from allegro_model.vfi import EMAVFI

DIT = replace(DIT_88X720P, num_layers=2, num_attention_heads=2, attention_head_dim=24, caption_channels=24,
              sample_size=(4, 4), sample_size_t=2)
VAE = replace(VAE_720P, block_out_channels=(8, 8, 8, 16), layers_per_block=1, norm_num_groups=4,
              temporal_norm_num_groups=4, tile_size=32, tile_overlap=(16, 8), tile_frames=16)

VFI = VFIConfig(base_channels=4, depth=(1, 1, 1, 2, 2), window=7, arbitrary_time=True)


def fill(module: torch.nn.Module) -> torch.nn.Module:
    """Sets every parameter to a smooth pattern with the scale of a trained network's."""
    state = {}
    for n, (name, value) in enumerate(module.state_dict().items()):
        wave = torch.sin(torch.arange(value.numel(), dtype=torch.float64) * (1.0 + 0.37 * n) + n)
        fan_in = max(1, math.prod(value.shape[1:])) if value.ndim > 1 else 1
        pattern = wave.view(value.shape) / math.sqrt(fan_in)
        if value.ndim == 1 and name.endswith("weight"):
            pattern = 1 + 0.2 * pattern
        state[name] = (pattern if value.ndim > 1 or name.endswith("weight") else 0.1 * pattern).float()
    module.load_state_dict(state)
    return module.eval().requires_grad_(False)


def tiny_dit(config: DiTConfig = DIT) -> AllegroDiT:
    """Two blocks, width 48."""
    return fill(AllegroDiT(config))


def tiny_vae(config: VAEConfig = VAE) -> VideoVAE:
    """Four levels of 8 to 16 channels."""
    return fill(VideoVAE(config))


def tiny_vfi(*, arbitrary_time: bool = True) -> EMAVFI:
    """Five stages of 4 to 64 channels."""
    return fill(EMAVFI(replace(VFI, arbitrary_time=arbitrary_time)))
