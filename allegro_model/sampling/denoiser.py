"""denoised = model(x, sigma): hides from the samplers what the network predicts and how it counts time."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..dit import AllegroDiT, AllegroTI2V
from ..dit.model import Prepared
from ..errors import GeometryError
from .cache import StepCache
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
        cache: leaves evaluations out; of this run only. None evaluates everything.
    Raises:
        GeometryError: a condition without such a network, or the reverse.
    """

    def __init__(self, dit: AllegroDiT, positive: Prompt, negative: Prompt | None, guidance_scale: float, *,
                 batched: bool, condition: Tensor | None = None, cache: StepCache | None = None) -> None:
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
            groups = [{"positive": positive}]
        else:
            pair = {"negative": negative, "positive": positive}
            groups = [pair] if batched else [{name: prompt} for name, prompt in pair.items()]
        self.condition = None if condition is None else condition.to(self.device, self.dtype)
        self.cache = cache
        self.prepared = {tuple(group): dit.prepare(*self._join(list(group.values()))) for group in groups}

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
        timestep = sigma_to_timestep(sigma)
        groups = self.prepared
        if self.cache is not None and sum(map(len, groups)) == 2 and not self.cache.guided(float(timestep)):
            groups = self._positive()
        predictions = torch.cat([self._predict(names, p, x, sigma, timestep) for names, p in groups.items()])
        if len(predictions) == len(x):
            return predictions
        negative, positive = predictions.chunk(2)
        return guide(positive, negative, self.guidance_scale)

    def _predict(self, names: tuple[str, ...], prepared: Prepared, x: Tensor, sigma: Tensor, timestep: Tensor) -> Tensor:
        """eps [len(names), 4, t, h, w] for prompts that are evaluated together."""
        sigma = sigma.to(x.device)

        def evaluate() -> Tensor:
            latents = (x / (sigma**2 + 1) ** 0.5).to(self.device, self.dtype)
            if self.condition is not None:
                latents = torch.cat((latents, self.condition), dim=1)
            latents = latents.expand(len(names), -1, -1, -1, -1)
            timesteps = timestep.to(self.device).expand(len(names))
            reuse = None if self.cache is None else self.cache.reuse(names, float(timestep))
            return self.dit.denoise(latents, timesteps, prepared, reuse=reuse).to(x.device, torch.float32)

        if self.cache is None:
            return evaluate()
        denoised = self.cache.predict(names, float(timestep), lambda: x - sigma * evaluate())
        return (x - denoised) / sigma

    def _positive(self) -> dict[tuple[str, ...], Prepared]:
        """`prepared` for the positive prompt alone, which is the last one."""
        *_, (names, prepared) = self.prepared.items()
        bias = None if prepared.bias is None else prepared.bias[-1:]
        return {names[-1:]: Prepared(tuple((k[-1:], v[-1:]) for k, v in prepared.text), bias)}

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
