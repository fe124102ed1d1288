"""Colours straight from latents: the linear map that hosts draw previews with, fitted to clips."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..loading import load_vae
from ..vae import VideoVAE
from ..vae.scaling import normalise
from .data import make_clip
from .recipe import CANVAS
from .vae_stage import to_tensor

_SEEDS = range(900_000, 900_012)  # clips that training did not see; every cell of each is one equation
_DIGITS = 4


def cells(vae: VideoVAE, seeds: Iterable[int]) -> tuple[Tensor, Tensor]:
    """Encode clips cell by cell.

    Returns:
        Normalised latents ``[N, 4]`` and the mean colour in [-1, 1] of the pixels of each cell ``[N, 3]``.
    """
    latents, colours = [], []
    factors = (vae.config.temporal_factor, vae.config.spatial_factor, vae.config.spatial_factor)
    for seed in seeds:
        frames = to_tensor(make_clip(seed, CANVAS).frames)[None]
        with torch.no_grad():
            mean, _ = vae.encode(frames)
        latents.append(normalise(mean, vae.config.scale_factor)[0].flatten(1).T)
        colours.append(F.avg_pool3d(frames, factors)[0].flatten(1).T)
    return torch.cat(latents), torch.cat(colours)


def fit_colours(latents: Tensor, colours: Tensor) -> tuple[Tensor, Tensor]:
    """Return the least-squares map ``colours = latents @ factors + bias``: ``[C, 3]`` and ``[3]`` in float64."""
    inputs = torch.cat([latents, torch.ones(len(latents), 1)], dim=1).double()
    solution = torch.linalg.lstsq(inputs, colours.double()).solution
    return solution[:-1], solution[-1]


def add_preview(model: Path) -> None:
    """Fit the map for the VAE of a model folder and write it into ``vae/config.json``."""
    vae = load_vae(model)
    factors, bias = fit_colours(*cells(vae, _SEEDS))
    fitted = replace(vae.config, latent_rgb_factors=tuple(map(tuple, factors.round(decimals=_DIGITS).tolist())),
                     latent_rgb_factors_bias=tuple(bias.round(decimals=_DIGITS).tolist()))
    path = model / "vae" / "config.json"
    content = {**json.loads(path.read_text(encoding="utf-8")), **fitted.to_dict()}
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
