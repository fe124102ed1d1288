"""Samplers as plain functions over `sigmas`, one signature, one line in `SAMPLERS` each.

Every sampler can stop after any step and go on later with the same result: pass the whole schedule, the
range of steps, and the last prediction (`previous`), which two-step methods look back on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

Denoise = Callable[[Tensor, Tensor], Tensor]
Draw = Callable[[], Tensor]


# The reference spacing ends with steps several times as long (in log sigma) as the ones before. Extrapolating
# that far overshoots; below this ratio of step lengths the second-order samplers take a first-order step.
MIN_STEP_RATIO = 0.5


class StepInfo(NamedTuple):
    """What the callback learns after each step; raising in the callback cancels the run."""

    step: int  # steps done, counted from the start of the schedule
    num_steps: int
    sigma: float
    latents: Tensor  # x after the step
    denoised: Tensor  # the prediction made in it


Callback = Callable[[StepInfo], None]


class Sampler(Protocol):
    """The signature of every sampler."""

    def __call__(self, denoise: Denoise, x: Tensor, sigmas: Tensor, draw: Draw, *, start: int = 0,
                 stop: int | None = None, previous: Tensor | None = None,
                 callback: Callback | None = None) -> Tensor:
        """Runs steps start .. stop - 1.

        Args:
            denoise: (x, sigma) -> denoised, both [B, 4, t, h, w] float32.
            x: [B, 4, t, h, w] float32, noise level sigmas[start].
            sigmas: [num_steps + 1] float32, descending, last 0.
            draw: standard normal noise shaped like x, any device.
            start, stop: range of steps; stop None runs to the end.
            previous: the prediction of step start - 1.
            callback: called after each step.
        Returns:
            x at noise level sigmas[stop].
        """
        ...


def _run(step: Callable[[int, Tensor, Tensor, Tensor | None], Tensor], denoise: Denoise, x: Tensor,
         sigmas: Tensor, *, start: int, stop: int | None, previous: Tensor | None,
         callback: Callback | None) -> Tensor:
    """The loop all samplers share: predict, step, report."""
    num_steps = len(sigmas) - 1
    for i in range(start, num_steps if stop is None else stop):
        denoised = denoise(x, sigmas[i])
        x = step(i, x, denoised, previous)
        previous = denoised
        if callback is not None:
            callback(StepInfo(i + 1, num_steps, float(sigmas[i]), x, denoised))
    return x


def ancestral_step(sigma: Tensor, sigma_next: Tensor) -> tuple[Tensor, Tensor]:
    """(down, up): step to noise level `down`, then add noise of standard deviation `up`; both float32."""
    up = (sigma_next**2 * (sigma**2 - sigma_next**2) / sigma**2) ** 0.5
    return (sigma_next**2 - up**2) ** 0.5, up


def sample_euler(denoise: Denoise, x: Tensor, sigmas: Tensor, draw: Draw, *, start: int = 0,
                 stop: int | None = None, previous: Tensor | None = None,
                 callback: Callback | None = None) -> Tensor:
    """Euler's method on the probability-flow ODE. Source: Algorithm 2 of arXiv 2206.00364 without churn."""

    def step(i: int, x: Tensor, denoised: Tensor, previous: Tensor | None) -> Tensor:
        return x + (x - denoised) / sigmas[i] * (sigmas[i + 1] - sigmas[i])

    return _run(step, denoise, x, sigmas, start=start, stop=stop, previous=previous, callback=callback)


def sample_euler_ancestral(denoise: Denoise, x: Tensor, sigmas: Tensor, draw: Draw, *, start: int = 0,
                           stop: int | None = None, previous: Tensor | None = None,
                           callback: Callback | None = None) -> Tensor:
    """Euler steps with fresh noise: the reference sampler. Arithmetic and draws as in diffusers'
    EulerAncestralDiscreteScheduler, in its order."""

    def step(i: int, x: Tensor, denoised: Tensor, previous: Tensor | None) -> Tensor:
        down, up = ancestral_step(sigmas[i], sigmas[i + 1])
        x = x + (x - denoised) / sigmas[i] * (down - sigmas[i])
        return x + draw().to(x) * up

    return _run(step, denoise, x, sigmas, start=start, stop=stop, previous=previous, callback=callback)


def sample_dpmpp_2m(denoise: Denoise, x: Tensor, sigmas: Tensor, draw: Draw, *, start: int = 0,
                    stop: int | None = None, previous: Tensor | None = None,
                    callback: Callback | None = None) -> Tensor:
    """DPM-Solver++(2M): second order, one evaluation per step. Source: arXiv 2211.01095."""

    def step(i: int, x: Tensor, denoised: Tensor, previous: Tensor | None) -> Tensor:
        if sigmas[i + 1] == 0:
            return denoised
        h = sigmas[i].log() - sigmas[i + 1].log()  # step in lambda = -log(sigma)
        estimate = denoised
        if previous is not None and i > 0:
            r = (sigmas[i - 1].log() - sigmas[i].log()) / h
            if r > MIN_STEP_RATIO:
                estimate = denoised + (denoised - previous) / (2 * r)
        return sigmas[i + 1] / sigmas[i] * x - torch.expm1(-h) * estimate

    return _run(step, denoise, x, sigmas, start=start, stop=stop, previous=previous, callback=callback)


def sample_dpmpp_2m_sde(denoise: Denoise, x: Tensor, sigmas: Tensor, draw: Draw, *, start: int = 0,
                        stop: int | None = None, previous: Tensor | None = None,
                        callback: Callback | None = None) -> Tensor:
    """SDE-DPM-Solver++(2M), midpoint form, full noise (eta 1). Source: arXiv 2211.01095."""

    def step(i: int, x: Tensor, denoised: Tensor, previous: Tensor | None) -> Tensor:
        noise = draw().to(x)  # one draw per step, also the last, so that every step is at a known draw
        if sigmas[i + 1] == 0:
            return denoised
        h = sigmas[i].log() - sigmas[i + 1].log()
        share = -torch.expm1(-2 * h)
        new = sigmas[i + 1] / sigmas[i] * torch.exp(-h) * x + share * denoised
        if previous is not None and i > 0:
            r = (sigmas[i - 1].log() - sigmas[i].log()) / h
            if r > MIN_STEP_RATIO:
                new = new + 0.5 * share * (denoised - previous) / r
        return new + noise * sigmas[i + 1] * share.sqrt()

    return _run(step, denoise, x, sigmas, start=start, stop=stop, previous=previous, callback=callback)


SAMPLERS: dict[str, Sampler] = {
    "euler_ancestral": sample_euler_ancestral,
    "euler": sample_euler,
    "dpmpp_2m": sample_dpmpp_2m,
    "dpmpp_2m_sde": sample_dpmpp_2m_sde,
}
