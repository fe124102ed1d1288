"""Image to video: the finished transformer goes on with given frames as a second input; text encoder and VAE stay."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..dit import AllegroTI2V
from .captions import Attributes, write_caption, write_motion
from .distributed import Workers
from .dit_stage import TextToVideo, build_text_model, keep_float32, make_tokenise, plain_attention
from .initialise import initialise_ti2v
from .latents import latent_scale
from .loop import Loop
from .losses import add_noise, eps_loss, given_frames, given_weight, offset_noise, velocity_weight
from .recipe import TINY_DIT, Recipe
from .ti2v_cache import load_ti2v_latents
from .vae_stage import load_averaged

#: How often each canvas of the cache is used. The released model saw 0.5 first frame, 0.4 first and last, 0.1
#: continuation; here the third also holds last frames (0.1 of all) and frames anywhere (0.05), which nodes offer.
_TASKS = (0.42, 0.33, 0.25)
_MOTION_ONLY = 0.4  # captions that leave what is shown to the picture
_WRONG = 0.5  # clips whose given frames look wrong in the noisy latents
_OTHER_CLIP, _OTHER_FRAME = 0.15, 0.5  # at most how much of another clip and of the next latent frame is in them
_SOFT = 0.15  # below this noise level the wrong part is faded out, as its removal would take an ever larger eps
_POSTERIOR = 0.05  # deviation of the encoder's posterior, in normalised latents
_NOISE_OFFSET = 0.02
_WEIGHT_CAP = 1000.0


@dataclass
class ImageToVideo(TextToVideo):
    """Loss of one step: as for text to video, with some frames of each clip given.

    Attributes:
        canvases: normalised latents of the given frames ``[N, 3, 4, t, h, w]``.
        masks: ``[N, 3, 4, t]``, 0 = given.
    """

    canvases: Tensor
    masks: Tensor

    #: Fine detail of a given frame is decided at low noise, which text to video hardly needs to train.
    middle = (0.5, 250.0, 950.0)

    def write(self, attributes: Attributes, rng: np.random.Generator) -> str:
        """Return a whole caption, or one of the motion alone."""
        return (write_motion if rng.random() < _MOTION_ONLY else write_caption)(attributes, rng)

    def condition(self, indices: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw what is given of each clip: the condition ``[B, 8, t, h, w]`` and the masks ``[B, 4, t]``."""
        task = torch.multinomial(torch.tensor(_TASKS), len(indices), replacement=True, generator=generator)
        canvas, mask = self.canvases[indices, task], self.masks[indices, task]
        deviation = _POSTERIOR * torch.rand(len(indices), 1, 1, 1, 1, generator=generator)
        canvas = canvas + deviation * torch.randn(canvas.shape, generator=generator)
        return torch.cat((canvas, mask[..., None, None].expand_as(canvas)), dim=1), mask

    def wrong(self, clean: Tensor, given: Tensor, generator: torch.Generator) -> Tensor:
        """Draw errors ``[B, 4, t, h, w]`` of given frames, like those that sampling makes at high noise.

        Trained with true latents alone, the network believes at low noise what it has sampled so far. With these errors in
        the noisy latents, and not in what it shall predict, it learns to put given frames right by their condition.
        """
        def share(most: float) -> Tensor:
            return most * torch.rand(len(clean), 1, 1, 1, 1, generator=generator)

        error = share(_OTHER_CLIP) * (clean.roll(1, 0) - clean) + share(_OTHER_FRAME) * (clean.roll(-1, 2) - clean)
        return error * given * (share(1.0) < _WRONG)

    def __call__(self, step: int, generator: torch.Generator) -> Tensor:
        indices = torch.multinomial(self.frequency, self.batch, replacement=True, generator=generator)
        clean = self.latents[indices]
        noise = offset_noise(clean.shape, _NOISE_OFFSET, generator)
        timesteps = self.timesteps(generator)
        alpha_bar = self.alpha_bar[timesteps]
        captions = self.captions(indices.tolist(), generator)
        condition, mask = self.condition(indices, generator)
        given = given_frames(mask)
        sigma = ((1.0 - alpha_bar) / alpha_bar).sqrt()[:, None, None, None, None]
        # Counting the error as noise keeps it out of the clean latents that this eps belongs to.
        noise = noise + self.wrong(clean, given, generator) / (sigma + _SOFT)
        noisy = torch.cat((add_noise(clean, noise, alpha_bar), condition), dim=1)
        return eps_loss(self.predict(noisy, timesteps, captions), noise,
                        sample_weight=velocity_weight(alpha_bar, _WEIGHT_CAP),
                        cell_weight=self.weight[indices] * given_weight(given))


def train_ti2v(workers: Workers, recipe: Recipe, folder: Path) -> None:
    """Train the image-to-video transformer on the cache, from ``dit.pt``; writes ``ti2v.pt``."""
    cached, scale = load_ti2v_latents(folder), latent_scale(folder)
    tokenise, vocabulary = make_tokenise(folder / "tokenizer")
    text = build_text_model(vocabulary).requires_grad_(False)
    load_averaged(text, folder / "dit.pt", "text")
    dit = AllegroTI2V(TINY_DIT, attention=plain_attention)
    initialise_ti2v(dit, torch.load(folder / "dit.pt", map_location="cpu", weights_only=True)["ema"]["dit"])
    for layer in (dit.pos_embed.proj, dit.pos_embed_masked_video, dit.pos_embed_mask, dit.pos_embed_first_frame, dit.proj_out):
        keep_float32(layer)
    objective = ImageToVideo(dit, text, tokenise, cached.latents * scale, cached.attributes, recipe.ti2v_batch,
                             cached.canvases * scale, cached.masks)
    Loop({"dit": dit}, recipe.ti2v, workers, folder / "ti2v.pt").run(objective)
