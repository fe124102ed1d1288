"""The noise schedule Allegro was trained with: 1000 linear betas, noise levels as sigmas.

One variable, `sigmas`: the standard deviation of the noise on unit-variance latents, highest first, final
0 (k-diffusion's convention). The model's own clock, `timesteps` 0 .. 999, is real-valued; between two
training steps sigma is interpolated linearly.
Source: the defaults of diffusers' EulerAncestralDiscreteScheduler, which the official pipeline uses.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from ..errors import ScheduleError

TRAIN_STEPS = 1000
BETA_START, BETA_END = 1e-4, 2e-2
MAX_STEPS = 10_000
MAX_FULL_STEPS = 1_000_000  # of the schedule whose tail a denoise below 1 runs


@lru_cache(maxsize=1)
def _alphas_cumprod() -> Tensor:
    with torch.inference_mode(False):
        betas = torch.linspace(BETA_START, BETA_END, TRAIN_STEPS, dtype=torch.float32)
        return torch.cumprod(1.0 - betas, dim=0)  # float32, as the reference: float64 differs in the 6th digit


def alphas_cumprod() -> Tensor:
    """[1000] float32: the share of signal variance after each training step."""
    return _alphas_cumprod().clone()


def sigma_table() -> Tensor:
    """[1000] float32, ascending: sigma of every integer timestep, 0.0100 .. 157.4."""
    abar = _alphas_cumprod()
    return ((1 - abar) / abar) ** 0.5


def check_schedule(num_steps: int, denoise: float = 1.0) -> None:
    """Raises unless a schedule of this length exists.

    Raises:
        ScheduleError: num_steps or denoise outside its range.
    """
    if isinstance(num_steps, bool) or not isinstance(num_steps, int) or not 1 <= num_steps <= MAX_STEPS:
        raise ScheduleError(f"steps={num_steps!r}: must be a whole number from 1 to {MAX_STEPS}; the released "
                            "models were made for 100.")
    if not 0.0 < denoise <= 1.0:  # also refuses NaN
        raise ScheduleError(f"denoise={denoise!r}: must be above 0 and at most 1; 1 starts from pure noise.")
    if num_steps / denoise > MAX_FULL_STEPS:
        raise ScheduleError(f"denoise={denoise!r} with {num_steps} steps is the tail of {num_steps / denoise:.3g} steps: "
                            f"at most {MAX_FULL_STEPS} are possible. Use a denoise of at least "
                            f"{num_steps / MAX_FULL_STEPS:g}.")


def _full_timesteps(num_steps: int) -> np.ndarray:
    if num_steps == 1:  # the reference's spacing would give timestep 0: a step that removes no noise
        return np.array([TRAIN_STEPS - 1], dtype=np.float32)
    return np.linspace(0, TRAIN_STEPS - 1, num_steps, dtype=np.float32)[::-1].copy()


def _steps_of_full_schedule(num_steps: int, denoise: float) -> int:
    check_schedule(num_steps, denoise)
    return num_steps if denoise >= 1.0 else max(int(num_steps / denoise), num_steps)


def reference_timesteps(num_steps: int, denoise: float = 1.0) -> Tensor:
    """The model's clock at each step.

    Args:
        num_steps: model evaluations, 1 .. 10000.
        denoise: share of a longer schedule that is run, its tail; in (0, 1].
    Returns:
        [num_steps] float32, descending, fractional.
    Raises:
        ScheduleError: see `check_schedule`.
    """
    full = _full_timesteps(_steps_of_full_schedule(num_steps, denoise))
    return torch.from_numpy(full[-num_steps:].copy())


def reference_sigmas(num_steps: int, denoise: float = 1.0) -> Tensor:
    """The noise levels of a run.

    Args:
        num_steps: model evaluations, 1 .. 10000.
        denoise: share of a longer schedule that is run, its tail; in (0, 1].
    Returns:
        [num_steps + 1] float32, descending, last 0.
    Raises:
        ScheduleError: see `check_schedule`.
    """
    timesteps = reference_timesteps(num_steps, denoise).numpy()
    sigmas = np.interp(timesteps, np.arange(TRAIN_STEPS), sigma_table().numpy())
    return torch.from_numpy(np.append(sigmas, 0.0).astype(np.float32))


def timestep_to_sigma(timesteps: Tensor) -> Tensor:
    """Sigma at real-valued timesteps; float32, same shape, clamped to 0 .. 999."""
    position = timesteps.detach().cpu().double().numpy()  # cpu first: not every device has float64
    sigmas = np.interp(position, np.arange(TRAIN_STEPS), sigma_table().numpy())
    return torch.as_tensor(sigmas, dtype=torch.float32, device=timesteps.device)


def sigma_to_timestep(sigmas: Tensor) -> Tensor:
    """The inverse of `timestep_to_sigma`: real-valued timesteps, float32, same shape, clamped to 0 .. 999.

    The search runs in float64 on the CPU; in float32 the inverse would be off by some 1e-4 of a step.
    """
    values = sigmas.detach().cpu().double().numpy()  # cpu first: not every device has float64
    position = np.interp(values, sigma_table().double().numpy(), np.arange(TRAIN_STEPS))
    return torch.as_tensor(position, dtype=torch.float32, device=sigmas.device)
