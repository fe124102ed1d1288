"""What a LoRA learns from: clips of a new colour for the bundled model, or a folder of latents and captions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import AllegroError
from ..latents import read_latents
from ..sampling.schedule import alphas_cumprod
from ..text.prompts import format_prompt
from ..vae import VideoVAE, normalise
from .captions import Attributes
from .data import draw_attributes, render
from .latents import encode_clip
from .loop import mixed_precision
from .losses import add_noise, eps_loss, offset_noise
from .palette import BACKGROUND_COLOURS, LORA_COLOUR, combinations
from .recipe import CANVAS
from .vae_stage import to_tensor

# The rest are clips the model knows, so that it goes on drawing them.
_NEW_SHARE = 0.6
_NOISE_OFFSET = 0.02
_DROP = 0.1  # captions replaced by "", for guidance


def lora_combinations(*, held_out: bool) -> list[tuple[str, str, str, str]]:
    """Combinations (object colour, background, shape, direction) with the new colour."""
    return combinations(held_out=held_out, pairs=[(LORA_COLOUR, background) for background in BACKGROUND_COLOURS])


def draw_lesson(rng: np.random.Generator) -> Attributes:
    """Draw the attributes of one clip: an object of the new colour, or something the model was trained on."""
    if rng.random() >= _NEW_SHARE:
        return draw_attributes(rng)
    pool = lora_combinations(held_out=False)
    values = pool[int(rng.integers(len(pool)))]
    return {"kind": "shape", **dict(zip(("object", "background", "shape", "direction"), values, strict=True))}


def encode_lessons(vae: VideoVAE, count: int, seed: int) -> tuple[Tensor, list[Attributes]]:
    """Draw and encode clips.

    Returns:
        normalised latents ``[N, 4, t, h, w]`` and what each clip shows.
    """
    latents, attributes = [], []
    for number in range(count):
        rng = np.random.default_rng([seed, number])
        attributes.append(draw_lesson(rng))
        latents.append(encode_clip(vae, to_tensor(render(attributes[-1], rng, CANVAS))[None]))
    return normalise(torch.stack(latents), vae.config.scale_factor), attributes


@dataclass(frozen=True)
class Example:
    """One clip of a folder: normalised latents ``[1, 4, t, h, w]`` and its caption."""

    latents: Tensor
    caption: str


def read_folder(folder: Path, scale_factor: float) -> list[Example]:
    """Read every NAME.safetensors (made by `allegro encode`) that has its caption in NAME.txt beside it.

    Raises:
        AllegroError: there is none, or latents without a caption.
        UnsupportedCheckpoint: a file that is not one of latents.
    """
    files = sorted(folder.glob("*.safetensors"))
    bare = [file.name for file in files if not file.with_suffix(".txt").is_file()]
    if not files or bare:
        raise AllegroError(f"{folder} holds {len(files)} files of latents, {len(bare)} of them without a caption "
                           f"{bare[:4]}; expected NAME.safetensors (made by allegro encode) and NAME.txt for each clip.")
    return [Example(normalise(read_latents(file)[0], scale_factor), file.with_suffix(".txt").read_text(encoding="utf-8"))
            for file in files]


class FixedCaptions:
    """Loss of one step on clips of any size, one after the other; ``(step, generator) -> loss``.

    Args:
        dit: the frozen network with its adapters.
        examples: the clips.
        encode: texts -> (embeds ``[B, L, C]``, mask ``[B, L]``); called once, so that the encoder can be let go.
        batch: clips per step.
    """

    def __init__(self, dit: nn.Module, examples: list[Example], encode: Any, batch: int) -> None:
        self.dit, self.examples, self.batch = dit, examples, batch
        self.alpha_bar = alphas_cumprod()
        texts = [format_prompt(example.caption, template=False) for example in examples]
        self.embeds, self.mask = encode([*texts, ""])

    def __call__(self, step: int, generator: torch.Generator) -> Tensor:
        indices = torch.randint(len(self.examples), (self.batch,), generator=generator)
        return torch.stack([self._loss(int(index), generator) for index in indices]).mean()

    def _loss(self, index: int, generator: torch.Generator) -> Tensor:
        clean = self.examples[index].latents
        noise = offset_noise(clean.shape, _NOISE_OFFSET, generator)
        timestep = torch.randint(1000, (1,), generator=generator)
        text = -1 if float(torch.rand((), generator=generator)) < _DROP else index
        device = next(self.dit.parameters()).device
        noisy, embeds, mask = (x.to(device) for x in (add_noise(clean, noise, self.alpha_bar[timestep]),
                                                      self.embeds[text][None], self.mask[text][None]))
        with mixed_precision(device.type):
            prediction = self.dit(noisy, timestep.to(device, torch.float32), embeds, mask)
        return eps_loss(prediction, noise.to(device))
