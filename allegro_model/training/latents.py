"""The latent cache: training clips encoded once with the finished encoder."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..vae import VideoVAE
from .captions import Attributes
from .data import draw_attributes, make_clip
from .distributed import Workers
from .loop import mixed_precision
from .recipe import CANVAS, TINY_VAE, Recipe
from .vae_stage import load_averaged, per_frame, to_tensor

logger = logging.getLogger(__name__)
PART = 250  # clips per file: a cancelled run loses at most this many


def encode_clip(vae: VideoVAE, frames: Tensor) -> Tensor:
    """Return the raw latent means ``[4, t, h, w]`` of one clip ``[1, 3, T, H, W]``."""
    with torch.no_grad(), mixed_precision():
        moments = per_frame(vae.quant_conv, vae.encode_tile(frames))
    return moments[0, : TINY_VAE.latent_channels].float()


def cache_latents(workers: Workers, recipe: Recipe, folder: Path) -> None:
    """Encode clips 0 .. ``recipe.num_latents`` - 1 into ``latents/part-NNN.safetensors``; existing parts are kept."""
    vae = VideoVAE(TINY_VAE, part="full")
    load_averaged(vae, folder / "vae.pt", "vae")

    def encode(seeds: range) -> dict[str, Tensor]:
        return {"latents": torch.stack([encode_clip(vae, to_tensor(make_clip(s, CANVAS).frames)[None]) for s in seeds]).half()}

    write_parts(workers, recipe.num_latents, folder / "latents", encode)


def write_parts(workers: Workers, count: int, target: Path, encode: Callable[[range], dict[str, Tensor]]) -> None:
    """Write what ``encode`` makes of seeds 0 .. ``count`` - 1, and the seeds, into files of ``PART`` clips each.

    Every process writes its share. Existing files are kept, so that an interrupted run goes on.
    """
    target.mkdir(parents=True, exist_ok=True)
    for part in range(workers.rank, -(-count // PART), workers.world):
        path = target / f"part-{part:03d}.safetensors"
        if path.exists():
            continue
        seeds = range(part * PART, min((part + 1) * PART, count))
        temporary = path.with_suffix(".tmp")
        save_file({**encode(seeds), "seeds": torch.tensor(list(seeds))}, temporary)
        temporary.rename(path)
        logger.info("%s: encoded clips %d to %d", target.name, seeds[0], seeds[-1])


def load_latents(folder: Path) -> tuple[Tensor, list[int]]:
    """Return the cached raw latents ``[N, 4, t, h, w]`` float32 and the seeds of their clips."""
    latents, seeds = [], []
    for path in sorted((folder / "latents").glob("part-*.safetensors")):
        tensors = load_file(path)
        latents.append(tensors["latents"].float())
        seeds += tensors["seeds"].tolist()
    return torch.cat(latents), seeds


def latent_scale(folder: Path) -> float:
    """Return the factor that gives the cached latents unit deviation, as the DiT is trained with."""
    return 1.0 / float(load_latents(folder)[0].std())


def attributes_of(seed: int) -> Attributes:
    """Return the attributes of training clip ``seed`` without drawing it."""
    return draw_attributes(np.random.default_rng(seed))
