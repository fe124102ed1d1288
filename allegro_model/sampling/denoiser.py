"""denoised = model(x, sigma): hides from the samplers what the network predicts and how it counts time."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..dit import AllegroDiT, AllegroTI2V
from ..errors import GeometryError
from .guidance import check_guidance, guide
from .schedule import sigma_to_timestep


class Prompt(NamedTuple):
    """An encoded text: embeds [1, L, C], mask [1, L], True = attend."""

    embeds: Tensor
    mask: Tensor


class Denoiser:
    """Predicts the clean latents from noisy ones, with classifier-free guidance.

    What depends on the prompt alone is computed here, once. Guidance 1 never evaluates the negative prompt.

    Args:
        dit: the network; runs where and in what dtype its weights are.
        positive, negative: prompts; `negative` may be None when guidance_scale is 1.
        guidance_scale: weight of guidance; 1 = off.
        batched: evaluate both prompts in one pass: faster on a GPU, twice the activations.
        condition: [1, 8, t, h, w] of `build_condition`, for an image-to-video network and only for one. It joins
            the latents after they are scaled, in both halves of guidance.
    Raises:
        GeometryError: a condition without such a network, or the reverse.
    """

    def __init__(self, dit: AllegroDiT, positive: Prompt, negative: Prompt | None, guidance_scale: float, *,
                 batched: bool, condition: Tensor | None = None) -> None:
        check_guidance(guidance_scale)
        if isinstance(dit, AllegroTI2V) != (condition is not None):
            raise GeometryError("given frames need the image-to-video transformer (Allegro-TI2V), and it needs the "
                                "condition made from them; this is " +
                                ("that transformer, without a condition." if condition is None else "another one."))
        self.dit = dit
        self.guidance_scale = guidance_scale
        weight = dit.proj_out.weight
        self.dtype, self.device = weight.dtype, weight.device
        if guidance_scale == 1.0 or negative is None:
            groups = [[positive]]
        else:
            groups = [[negative, positive]] if batched else [[negative], [positive]]
        self.condition = None if condition is None else condition.to(self.device, self.dtype)
        self.prepared = [dit.prepare(*self._join(group)) for group in groups]
        self.copies = len(groups[0])

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Denoises.

        Args:
            x: [1, 4, t, h, w] float32, noise of standard deviation `sigma` on unit-variance latents.
            sigma: 0-d float32, above 0.
        Returns:
            [1, 4, t, h, w] float32.
        """
        return x - sigma.to(x.device) * self.eps(x, sigma)

    @torch.no_grad()
    def eps(self, x: Tensor, sigma: Tensor) -> Tensor:
        """The guided noise prediction, float32; arguments as in `__call__`."""
        latents = (x / (sigma.to(x.device) ** 2 + 1) ** 0.5).to(self.device, self.dtype)
        if self.condition is not None:
            latents = torch.cat((latents, self.condition), dim=1)
        latents = latents.expand(self.copies, -1, -1, -1, -1)
        timesteps = sigma_to_timestep(sigma).to(self.device).expand(self.copies)
        outputs = [self.dit.denoise(latents, timesteps, p).to(x.device, torch.float32) for p in self.prepared]
        predictions = torch.cat(outputs).chunk(self.copies * len(outputs))
        if len(predictions) == 1:
            return predictions[0]
        negative, positive = predictions
        return guide(positive, negative, self.guidance_scale)

    def _join(self, prompts: list[Prompt]) -> tuple[Tensor, Tensor]:
        embeds = torch.cat([p.embeds for p in prompts]).to(self.device, self.dtype)
        return embeds, torch.cat([p.mask for p in prompts]).to(self.device)


def keep_latents(denoise: Callable[[Tensor, Tensor], Tensor], kept: Tensor, start: int) -> Callable[[Tensor, Tensor], Tensor]:
    """A denoiser that knows some latent frames already.

    A sampler moves along the line from x to the prediction. Where that is always the same, x is that plus the
    noise of its step, so that the other frames see the known ones with the noise they expect.

    Args:
        denoise: predicts all frames.
        kept: [1, 4, k, h, w], normalised, on the device of the latents.
        start: the latent frame that the first of them is.
    """

    def predict(x: Tensor, sigma: Tensor) -> Tensor:
        denoised = denoise(x, sigma)
        return torch.cat((denoised[:, :, :start], kept, denoised[:, :, start + kept.shape[2] :]), dim=2)

    return predict
