"""From noise to latents: the schedule, the noise, guidance and the samplers."""

from .cache import CACHE_LEVELS, StepCache, count_work
from .denoiser import Denoiser, Prompt, keep_latents
from .noise import NoiseSource
from .samplers import SAMPLERS, StepInfo
from .schedule import reference_sigmas, reference_timesteps, sigma_table, sigma_to_timestep, timestep_to_sigma

__all__ = ["CACHE_LEVELS", "SAMPLERS", "Denoiser", "NoiseSource", "Prompt", "StepCache", "StepInfo", "count_work",
           "keep_latents", "reference_sigmas", "reference_timesteps", "sigma_table", "sigma_to_timestep",
           "timestep_to_sigma"]
