"""The image-to-video cache: clips, and the latents of what is given of them, encoded once.

Per clip three canvases are kept: the first frame, the first and the last, and a third that varies from clip to clip:
its first k frames, its last k, or a few frames anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from ..conditioning import GivenFrames
from ..vae import VideoVAE
from .captions import Attributes
from .data import Clip, make_clip
from .distributed import Workers
from .latents import attributes_of, encode_clip, write_parts
from .recipe import CANVAS, TINY_VAE, Recipe
from .scenes import Canvas
from .vae_stage import load_averaged, to_tensor

_LATE = 0.6  # clips that begin in mid-motion
#: What the third canvas holds: the clip's first k frames, its last k, a few anywhere.
_THIRD = {"start": 0.4, "end": 0.4, "anywhere": 0.2}
_SINGLE_END = 0.6  # of "end": the last frame alone
_MOST_ANYWHERE = 3


def make_ti2v_clip(seed: int, canvas: Canvas) -> Clip:
    """Make image-to-video clip number ``seed``.

    Most clips are the second half of one twice as long: their first frame shows a thing near the centre and does not tell
    where it goes, which is left to the caption. A ball is always shown whole, half of its clip has no bounce.
    """
    late = np.random.default_rng((seed, 1)).random() < _LATE
    if not late or attributes_of(seed)["kind"] == "ball":
        return make_clip(seed, canvas)
    clip = make_clip(seed, replace(canvas, num_frames=2 * canvas.num_frames))
    return replace(clip, frames=clip.frames[canvas.num_frames :])


def third_positions(rng: np.random.Generator, num_frames: int) -> list[int]:
    """Draw which frames the third canvas of a clip holds; k is uniform in 1 .. ``num_frames``."""
    kind = str(rng.choice(list(_THIRD), p=list(_THIRD.values())))
    if kind == "anywhere":
        count = int(rng.integers(1, _MOST_ANYWHERE + 1))
        return sorted(int(n) for n in rng.choice(num_frames, count, replace=False))
    count = int(rng.integers(1, num_frames + 1))
    if kind == "start":
        return list(range(count))
    if rng.random() < _SINGLE_END:
        count = 1
    return list(range(num_frames - count, num_frames))


def keep(frames: Tensor, positions: Sequence[int]) -> GivenFrames:
    """The frames of a clip ``[3, T, H, W]`` at ``positions``, as given frames."""
    return GivenFrames.at(frames[:, list(positions)].transpose(0, 1), positions, frames.shape[1])


def _encode(vae: VideoVAE, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return raw latents ``[4, t, h, w]`` of clip ``seed``, and of its canvases ``[3, 4, t, h, w]`` with masks ``[3, 4, t]``."""
    frames = to_tensor(make_ti2v_clip(seed, CANVAS).frames)
    third = third_positions(np.random.default_rng((seed, 2)), CANVAS.num_frames)
    given = [keep(frames, positions) for positions in ([0], [0, CANVAS.num_frames - 1], third)]
    canvases = torch.stack([encode_clip(vae, each.canvas()) for each in given])
    masks = torch.cat([each.latent_mask(1, 1) for each in given])
    return encode_clip(vae, frames[None]), canvases, masks[..., 0, 0]


def cache_ti2v_latents(workers: Workers, recipe: Recipe, folder: Path) -> None:
    """Encode clips 0 .. ``recipe.num_ti2v`` - 1 into ``ti2v_latents/part-NNN.safetensors``; existing parts are kept."""
    vae = VideoVAE(TINY_VAE, part="full")
    load_averaged(vae, folder / "vae.pt", "vae")

    def encode(seeds: range) -> dict[str, Tensor]:
        latents, canvases, masks = (torch.stack(parts).half() for parts in zip(*(_encode(vae, s) for s in seeds), strict=True))
        return {"latents": latents, "canvases": canvases, "masks": masks}

    write_parts(workers, recipe.num_ti2v, folder / "ti2v_latents", encode)


@dataclass(frozen=True)
class Cached:
    """The image-to-video cache.

    Attributes:
        latents: raw latents of the clips ``[N, 4, t, h, w]`` float32.
        canvases: raw latents of what is given of them ``[N, 3, 4, t, h, w]``.
        masks: where that is, ``[N, 3, 4, t]``, 0 = given, in the layout of ``GivenFrames.latent_mask``.
        attributes: of the clips.
    """

    latents: Tensor
    canvases: Tensor
    masks: Tensor
    attributes: list[Attributes]


def load_ti2v_latents(folder: Path) -> Cached:
    """Read what ``cache_ti2v_latents`` wrote."""
    parts = [load_file(path) for path in sorted((folder / "ti2v_latents").glob("part-*.safetensors"))]
    latents, canvases, masks = (torch.cat([part[name].float() for part in parts]) for name in ("latents", "canvases", "masks"))
    seeds = [seed for part in parts for seed in part["seeds"].tolist()]
    return Cached(latents, canvases, masks, [attributes_of(seed) for seed in seeds])
