"""Sampling inside ComfyUI that equals the reference: its schedule, its clock, its noise."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import comfy.ldm.modules.attention
import comfy.model_management
import comfy.model_sampling
import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ...allegro_model.config import DiTConfig
from ...allegro_model.costs import dit_flops
from ...allegro_model.errors import GeometryError, NonFiniteError, TextError
from ...allegro_model.geometry import LatentShape, check_memory, estimate_sampling_bytes, token_count
from ...allegro_model.sampling import NoiseSource, StepInfo, reference_sigmas
from ...allegro_model.sampling.samplers import SAMPLERS
from ...allegro_model.sampling.schedule import sigma_table, sigma_to_timestep, timestep_to_sigma
from .cache import CACHE
from .compat import fix_empty_latent, intermediate_dtype
from .progress import GIB, stage
from .speed import attention_override

logger = logging.getLogger(__name__)
Latent = dict[str, Any]
_TEXT_TOKENS = 128  # of a usual prompt; they hardly count
# The model, its type, device, attention and step cache.
Pace = tuple[DiTConfig, str, str, str, str]
_WORTH_SAYING = 10  # seconds; below that nobody reads the estimate in time
_MOST_PACES = 32

# Seconds per operation of the last run of each model and way to run it. Numbers only: what a run is told must outlast nodes.
_speeds: dict[Pace, float] = {}

# What ComfyUI needs for its own schedulers and for the ModelSamplingDiscrete node. Its name for plain linear
# betas is "sqrt_linear".
SAMPLING_SETTINGS = {"beta_schedule": "sqrt_linear", "linear_start": 1e-4, "linear_end": 2e-2, "timesteps": 1000}


class AllegroSampling(comfy.model_sampling.ModelSamplingDiscrete, comfy.model_sampling.EPS):
    """The noise levels and the clock of the model: float32 tables, real-valued timesteps."""

    def __init__(self, model_config: Any = None) -> None:
        super().__init__(model_config)
        self.set_sigmas(sigma_table())

    def timestep(self, sigma: Tensor) -> Tensor:
        """Not rounded to whole steps as ComfyUI does; the reference feeds fractions."""
        return sigma_to_timestep(sigma)

    def sigma(self, timestep: Tensor) -> Tensor:
        """Interpolated linearly, as the reference, not in the logarithm."""
        return timestep_to_sigma(timestep)

    def noise_scaling(self, sigma: Tensor, noise: Tensor, latent_image: Tensor, max_denoise: bool = False) -> Tensor:
        """latent + sigma * noise also at the first step, where ComfyUI would use sqrt(1 + sigma^2)."""
        return latent_image + noise * comfy.model_sampling.reshape_sigma(sigma, noise.ndim)


@dataclass(frozen=True)
class RunSettings:
    """The widgets of the sampler node."""

    seed: int
    steps: int
    cfg: float
    denoise: float
    noise_source: str


def run(model: Any, positive: list[Any], negative: list[Any], latent: Latent, settings: RunSettings) -> Latent:
    """Samples.

    Args:
        model: MODEL; not changed.
        positive, negative: CONDITIONING; not changed.
        latent: LATENT; not changed.
        settings: values that were checked.
    Returns:
        a new LATENT.
    """
    samples = fix_empty_latent(model, latent)
    config = getattr(model.model.diffusion_model, "config", None)
    _check_inputs(config, samples, positive + negative)
    shape = LatentShape(*samples.shape[2:])
    sigmas = reference_sigmas(settings.steps, settings.denoise)
    if settings.noise_source == "reference":
        seeds = [(settings.seed + i) % 2**64 for i in latent.get("batch_index") or range(len(samples))]
        source = NoiseSource(seeds, samples.shape[1:])
        noise, sampler = source.draw(), comfy.samplers.KSAMPLER(reference_sampler(source.draw))
    else:
        noise = comfy.sample.prepare_noise(samples, settings.seed, latent.get("batch_index"))
        sampler = comfy.samplers.ksampler("euler_ancestral")
    pace, operations = None, 0
    if config is not None:
        _announce(model, config, shape, samples.shape[0], settings)
        pace, operations = _pace(model, config), _step_operations(config, shape, len(samples), settings)
        _foretell(pace, operations, settings.steps)
    watch = _Watch(model, pace, operations, _moving_preview(model, latent_preview.prepare_callback(model, settings.steps)))
    disable = not comfy.utils.PROGRESS_BAR_ENABLED
    result = comfy.sample.sample_custom(
        model, noise, settings.cfg, sampler, sigmas, positive, negative, samples,
        noise_mask=latent.get("noise_mask"), callback=watch, disable_pbar=disable, seed=settings.seed)
    kept = {name: value for name, value in latent.items() if not name.startswith("downscale_ratio_")}
    return {**kept, "samples": result.to(intermediate_dtype())}


def reference_sampler(draw: Callable[[], Tensor]) -> Callable[..., Tensor]:
    """The reference's Euler ancestral steps in ComfyUI's calling convention; `draw` gives the noise of a step."""

    def sample(model: Any, x: Tensor, sigmas: Tensor, extra_args: dict[str, Any] | None = None,
               callback: Callable[[dict[str, Any]], None] | None = None, disable: bool | None = None) -> Tensor:
        ones = x.new_ones([x.shape[0]])
        with tqdm(total=len(sigmas) - 1, disable=disable) as bar:

            def report(info: StepInfo) -> None:
                bar.update()
                if callback is not None:
                    callback({"x": info.latents, "i": info.step - 1, "sigma": info.sigma,
                              "sigma_hat": info.sigma, "denoised": info.denoised})

            return SAMPLERS["euler_ancestral"](
                lambda x, sigma: model(x, sigma * ones, **(extra_args or {})), x, sigmas, draw, callback=report)

    return sample


class _Watch:
    """Callback of a run: previews and progress, the check after the first step, the estimate after two, and what the
    next run is told."""

    def __init__(self, model: Any, pace: Pace | None, operations: int, preview: Callable[..., None]) -> None:
        self.model = model
        self.pace = pace
        self.operations = operations
        self.preview = preview
        self.first: float | None = None

    def __call__(self, step: int, denoised: Tensor, x: Tensor, total: int) -> None:
        if step == 0:
            self.first = time.perf_counter()
            if not bool(torch.isfinite(denoised).all()):
                raise NonFiniteError(
                    f"The first step gave NaN or Inf. The weights are {_dtype_name(self.model)}, the attention is "
                    f"{attention_name(self.model)}. Try, in this order: weight_dtype bf16 or fp32 in the loader; attention sdpa in "
                    "Allegro Attention, or ComfyUI without --use-sage-attention; the model without LoRA or patches.")
        elif self.first is not None:
            each = (time.perf_counter() - self.first) / step
            if step == 1 and each * (total - 2) > _WORTH_SAYING:
                logger.info("Allegro sampling: about %s left", _duration(each * (total - 2)))
            if self.pace is not None:
                _remember(self.pace, each / self.operations)
        self.preview(step, denoised, x, total)


def _moving_preview(model: Any, preview: Callable[..., None]) -> Callable[..., None]:
    """ComfyUI's previews by a matrix show the first frame of a clip at every step; this shows one after the other.
    Other previewers, and those of packs that play all frames, get the whole clip."""
    if type(latent_preview.get_previewer(model.load_device, model.model.latent_format)) is not latent_preview.Latent2RGBPreviewer:
        return preview

    def show(step: int, denoised: Tensor, x: Tensor, total: int) -> None:
        frame = step % denoised.shape[2]
        preview(step, denoised[:, :, frame : frame + 1], x, total)

    return show


def timed(executor: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """Round the sampling of a model, by whichever node: time and memory are logged and kept for AllegroReport."""
    with stage("sampling", executor.class_obj.model_patcher.load_device):
        return executor(*args, **kwargs)


def attention_name(model: Any) -> str:
    """The attention that a node has put on a model, or that ComfyUI has chosen."""
    chosen = attention_override(model.model_options.get("transformer_options", {}))
    return chosen or comfy.ldm.modules.attention.optimized_attention.__name__.removeprefix("attention_")


def check_latents(samples: Tensor, channels: int = 4) -> None:
    """Raises unless `samples` are video latents.

    Raises:
        GeometryError: another number of channels or dimensions.
    """
    if samples.ndim != 5 or samples.shape[1] != channels:
        raise GeometryError(f"latents of shape {list(samples.shape)}: expected [batch, {channels}, frames / 4, height / 8, width / 8]. "
                            "Make them with Empty Allegro Latent or Video VAE Encode (Allegro).")


def _check_inputs(config: Any, samples: Tensor, conditioning: list[Any]) -> None:
    check_latents(samples)
    for entry in conditioning if config is not None else []:
        if entry[0].shape[-1] != config.caption_channels:
            raise TextError(f"the text embeddings are {entry[0].shape[-1]} wide, this model reads {config.caption_channels}. Load the "
                            "text encoder that belongs to the model: T5 v1.1 XXL for the released one, the bundled one "
                            "for allegro-tiny.")


def _announce(model: Any, config: Any, shape: LatentShape, batch: int, settings: RunSettings) -> None:
    """One line about the run, a warning about unusual sizes, a refusal of what no device could hold."""
    dtype = model.model.manual_cast_dtype or model.model.get_dtype()
    needed = estimate_sampling_bytes(config, shape, batch=1, dtype_bytes=dtype.itemsize)
    device = model.load_device
    check_memory("Allegro sampling", needed, comfy.model_management.get_total_memory(device),
                 "fewer frames; a smaller width and height; a device with more memory")
    trained = LatentShape(config.sample_size_t, *config.sample_size)
    if shape != trained:
        logger.warning("Allegro: this model was trained for %d frames of %dx%d and draws less well at other sizes.",
                       trained.frames * 4, trained.width * 8, trained.height * 8)
    halves = 1 if settings.cfg == 1.0 else 2
    logger.info(
        "Allegro: %d layers of width %d, weights %s, %d x %d frames of %dx%d (%d tokens), %d steps, cfg %g, seed %d, "
        "attention %s, %s, about %.1f GiB of activations on %s",
        config.num_layers, config.width, _dtype_name(model), batch, shape.frames * 4, shape.width * 8, shape.height * 8,
        token_count(shape, config.patch_size), settings.steps, settings.cfg, settings.seed, attention_name(model), _cache_name(model),
        batch * halves * needed / GIB, device)


def _pace(model: Any, config: Any) -> Pace:
    return config, _dtype_name(model), str(model.load_device), attention_name(model), _cache_name(model)


def _step_operations(config: Any, shape: LatentShape, batch: int, settings: RunSettings) -> int:
    """Of a step at which nothing is left out."""
    return batch * (1 if settings.cfg == 1.0 else 2) * dit_flops(config, shape, _TEXT_TOKENS).total


def _remember(pace: Pace, speed: float) -> None:
    """Keeps the speeds of the last models and ways to run them."""
    _speeds.pop(pace, None)
    _speeds[pace] = speed
    if len(_speeds) > _MOST_PACES:
        del _speeds[next(iter(_speeds))]


def _foretell(pace: Pace, operations: int, steps: int) -> None:
    """What earlier runs of this process let one expect; nothing before the first."""
    seconds = _speeds.get(pace, 0.0) * operations * steps
    if seconds > _WORTH_SAYING:
        logger.info("Allegro sampling: about %s for %d steps, by the last run of this model", _duration(seconds), steps)


def _cache_name(model: Any) -> str:
    """What our cache node, or ComfyUI's EasyCache and LazyCache, have put on the model, if anything."""
    options = model.model_options.get("transformer_options", {})
    cache = options.get("easycache")
    names = [] if cache is None else [str(getattr(cache, "name", "a cache"))]
    if CACHE in options:
        names.append(f"step cache {options[CACHE]}")
    return " and ".join(names) or "no cache"


def _dtype_name(model: Any) -> str:
    return str(model.model.get_dtype()).removeprefix("torch.")


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {seconds} s"
