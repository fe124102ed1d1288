"""The latent cache: training clips encoded once with the finished encoder."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..vae import VideoVAE
from .captions import Attributes
from .data import draw_attributes, make_clip
from .distributed import Workers
from .recipe import CANVAS, TINY_VAE, Recipe
from .vae_stage import load_averaged, per_frame, to_tensor

logger = logging.getLogger(__name__)
_PART = 250  # clips per file: a cancelled run loses at most this many


def _encode(vae: VideoVAE, seed: int) -> Tensor:
    """Return the raw latent means ``[4, t, h, w]`` of training clip ``seed``."""
    frames = to_tensor(make_clip(seed, CANVAS).frames)[None]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        moments = per_frame(vae.quant_conv, vae.encode_tile(frames))
    return moments[0, : TINY_VAE.latent_channels].float()


def cache_latents(workers: Workers, recipe: Recipe, folder: Path) -> None:
    """Encode clips 0 .. ``recipe.num_latents`` - 1 into ``latents/part-NNN.safetensors``; existing parts are kept."""
    vae = VideoVAE(TINY_VAE, part="full")
    load_averaged(vae, folder / "vae.pt", "vae")
    target = folder / "latents"
    target.mkdir(parents=True, exist_ok=True)
    for part in range(workers.rank, -(-recipe.num_latents // _PART), workers.world):
        path = target / f"part-{part:03d}.safetensors"
        if path.exists():
            continue
        seeds = range(part * _PART, min((part + 1) * _PART, recipe.num_latents))
        latents = torch.stack([_encode(vae, seed) for seed in seeds]).half()
        temporary = path.with_suffix(".tmp")
        save_file({"latents": latents, "seeds": torch.tensor(list(seeds))}, temporary)
        temporary.rename(path)
        logger.info("encoded clips %d to %d", seeds[0], seeds[-1])


def load_latents(folder: Path) -> tuple[Tensor, list[int]]:
    """Return the cached raw latents ``[N, 4, t, h, w]`` float32 and the seeds of their clips."""
    latents, seeds = [], []
    for path in sorted((folder / "latents").glob("part-*.safetensors")):
        tensors = load_file(path)
        latents.append(tensors["latents"].float())
        seeds += tensors["seeds"].tolist()
    return torch.cat(latents), seeds


def attributes_of(seed: int) -> Attributes:
    """Return the attributes of training clip ``seed`` without drawing it."""
    return draw_attributes(np.random.default_rng(seed))
