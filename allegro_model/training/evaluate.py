"""Measures what a checkpoint draws: prompts that training never saw, sampled, decoded and read by image analysis."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config import SamplingConfig
from ..loading import load_dit, load_sampling_defaults, load_text_encoder, load_vae
from ..sampling import SAMPLERS, NoiseSource, reference_sigmas
from ..sampling.guidance import guide
from ..sampling.schedule import sigma_to_timestep
from ..text.prompts import format_prompt
from ..vae.scaling import denormalise
from .analyse import compare
from .captions import Attributes, write_caption
from .data import draw_attributes
from .palette import combinations

Encode = Callable[[Sequence[str]], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Case:
    """A prompt, the seed of its noise, and the attributes its clip must show."""

    prompt: str
    seed: int
    attributes: Attributes


def _shape_cases(count: int, rng: np.random.Generator) -> list[Case]:
    """Draw shape prompts from the held-out combinations, each direction and shape about equally often."""
    pool = combinations(held_out=True)
    order = rng.permutation(len(pool))
    cases = []
    for number in range(count):
        values = pool[int(order[number % len(pool)])]
        attributes = {"kind": "shape", **dict(zip(("object", "background", "shape", "direction"), values, strict=True))}
        cases.append(Case(write_caption(attributes, rng), 1000 + number, attributes))
    return cases


def _scene_cases(kind: str, count: int, rng: np.random.Generator) -> list[Case]:
    """Draw scene prompts with wordings reserved for tests."""
    cases: list[Case] = []
    while len(cases) < count:
        attributes = draw_attributes(rng)
        if attributes["kind"] != kind:
            continue
        try:
            cases.append(Case(write_caption(attributes, rng, held_out=True), 2000 + len(cases), attributes))
        except LookupError:  # every wording of these attributes is in the training part
            continue
    return cases


def evaluation_cases(shapes: int = 48, scenes: int = 8) -> list[Case]:
    """Return the fixed list of cases: ``shapes`` of objects, then ``scenes`` each of sea, clouds and ball."""
    rng = np.random.default_rng(20_000)
    cases = _shape_cases(shapes, rng)
    for kind in ("sea", "clouds", "ball"):
        cases += _scene_cases(kind, scenes, rng)
    return cases


class BatchDenoiser:
    """``(x, sigma) -> denoised`` for many prompts at once, with classifier-free guidance.

    Args:
        dit: the network.
        positive: embeds ``[B, L, C]`` and mask ``[B, L]``.
        negative: the same for one text, ``[1, L, C]``.
        guidance_scale: weight of guidance; 1 = off.
        condition: ``[B, 8, t, h, w]`` of an image-to-video network, joined to the scaled latents.
    """

    def __init__(self, dit: Any, positive: tuple[Tensor, Tensor], negative: tuple[Tensor, Tensor],
                 guidance_scale: float, *, condition: Tensor | None = None) -> None:
        self.dit, self.guidance_scale, self.condition = dit, guidance_scale, condition
        count = len(positive[0])
        self.positive = dit.prepare(*positive)
        self.negative = dit.prepare(negative[0].expand(count, -1, -1), negative[1].expand(count, -1))

    @torch.no_grad()
    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Denoise ``x [B, 4, t, h, w]`` at noise level ``sigma`` (0-d)."""
        latents = x / (sigma**2 + 1) ** 0.5
        if self.condition is not None:
            latents = torch.cat((latents, self.condition), dim=1)
        timesteps = sigma_to_timestep(sigma).expand(len(x))
        eps = self.dit.denoise(latents, timesteps, self.positive).float()
        if self.guidance_scale != 1.0:
            eps = guide(eps, self.dit.denoise(latents, timesteps, self.negative).float(), self.guidance_scale)
        return x - sigma * eps


def sample_latents(dit: Any, encode: Encode, cases: Sequence[Case], sampling: SamplingConfig, *,
                   condition: Tensor | None = None) -> Tensor:
    """Sample normalised latents ``[B, 4, t, h, w]``; each item is what the pipeline makes of its prompt and seed."""
    with torch.no_grad():
        positive, negative = encode([case.prompt for case in cases]), encode([sampling.negative_prompt])
    denoise = BatchDenoiser(dit, positive, negative, sampling.guidance_scale, condition=condition)
    shape = (4, sampling.num_frames // 4, sampling.height // 8, sampling.width // 8)
    source = NoiseSource([case.seed for case in cases], shape)
    sigmas = reference_sigmas(sampling.num_steps)
    return SAMPLERS[sampling.sampler](denoise, source.draw() * sigmas[0], sigmas, source.draw)


def to_frames(decoded: Tensor) -> np.ndarray:
    """Decoded ``[3, T, H, W]`` in [-1, 1] -> uint8 ``[T, H, W, 3]``."""
    return ((decoded.float() / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(1, 2, 3, 0).numpy()


def generate(models: tuple[Any, Encode, Any], cases: Sequence[Case], sampling: SamplingConfig, *,
             batch: int = 16) -> list[np.ndarray]:
    """Generate the clips of all cases.

    Args:
        models: DiT, text encoding function, VideoVAE.
        cases: prompts and seeds.
        sampling: size, steps, guidance.
        batch: clips sampled together.

    Returns:
        uint8 ``[T, H, W, 3]`` per case.
    """
    dit, encode, vae = models
    clips = []
    for first in range(0, len(cases), batch):
        latents = sample_latents(dit, encode, cases[first : first + batch], sampling)
        for item in denormalise(latents, vae.config.scale_factor).split(1):
            clips.append(to_frames(vae.decode(item)[0]))
    return clips


def score(clips: Sequence[np.ndarray], cases: Sequence[Case]) -> dict[str, tuple[int, int]]:
    """Return (right, total) per ``kind.attribute``."""
    results: dict[str, list[bool]] = defaultdict(list)
    for frames, case in zip(clips, cases, strict=True):
        for name, right in compare(frames, case.attributes).items():
            results[f"{case.attributes['kind']}.{name}"].append(right)
    return {name: (sum(values), len(values)) for name, values in sorted(results.items())}


def load_models(folder: Path) -> tuple[Any, Encode, Any]:
    """Load DiT, encoding function and VideoVAE of a model folder, in float32 on the CPU."""
    dit = load_dit(folder, dtype=torch.float32)
    text = load_text_encoder(folder, dtype=torch.float32)

    def encode(prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        return text.encode([format_prompt(prompt, template=False, clean=True) for prompt in prompts])

    return dit, encode, load_vae(folder)


def evaluate_folder(folder: Path) -> dict[str, tuple[int, int]]:
    """Return the scores of a model folder on the fixed cases with its own sampling defaults."""
    sampling = load_sampling_defaults(folder)
    cases = evaluation_cases()
    return score(generate(load_models(folder), cases, sampling), cases)
