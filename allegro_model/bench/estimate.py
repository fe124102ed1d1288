"""What a run will take, before it begins: time and memory of each stage."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from ..attention import Attention, sdpa
from ..costs import DiTFlops, dit_flops
from ..geometry import (
    LatentShape,
    estimate_sampling_bytes,
    latent_shape,
    token_count,
)
from ..memory import both_prompts_fit
from ..pipeline import SampleSettings, dit_dtype, must_stream, text_dtype
from ..sampling import count_work, reference_timesteps
from ..sampling.cache import BUNDLED, CacheCalibration
from ..vae import Tiling, decoding_bytes
from ..vfi import EMAInterpolator, pairs_per_batch
from .networks import Networks
from .speed import (
    TEXT_TOKENS,
    EvaluationSeconds,
    decode_seconds,
    evaluation_seconds,
    pair_seconds,
    text_seconds,
)

# Of a block's linear operations, those that are left out together with its self-attention: 8 of 28 N D^2.
_PROJECTIONS = 8 / 28


@dataclass(frozen=True)
class Machine:
    """Where and how a run computes.

    Attributes:
        device: of the networks.
        dtype: of the transformer; None for what the pipeline would choose.
        attention: the kernel.
        tiling: of the VAE; None for the checkpoint's.
        offload: one of `OFFLOADS`: whether transformer and text encoder are streamed.
    """

    device: torch.device
    dtype: torch.dtype | None
    attention: Attention = sdpa
    tiling: Tiling | None = None
    offload: str = "auto"

    def dit_dtype(self, networks: Networks) -> torch.dtype:
        """Type of the transformer."""
        return dit_dtype(networks.dit_parameters, self.device, self.dtype)

    def text_dtype(self, networks: Networks) -> torch.dtype:
        """Type of the text encoder."""
        return text_dtype(networks.text_parameters, self.dtype)


@dataclass(frozen=True)
class StageEstimate:
    """One stage.

    Attributes:
        name: as the report of a run calls it.
        seconds: without reading files, and without bringing streamed layers to the device.
        weights_bytes, working_bytes: peak of the device's memory.
        streamed: whether the weights come to the device, or on a CPU to the type of the run, layer by layer.
    """

    name: str
    seconds: float
    weights_bytes: int
    working_bytes: int
    streamed: bool = False


@dataclass(frozen=True)
class Estimate:
    """A run that has not begun.

    Attributes:
        tokens: the transformer attends over.
        flops: of one evaluation for one prompt.
        evaluations: of the transformer, each for one prompt.
        step_seconds: of a step at which nothing is left out.
        stages: in their order.
    """

    tokens: int
    flops: DiTFlops
    evaluations: int
    step_seconds: float
    stages: list[StageEstimate] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """All stages."""
        return sum(stage.seconds for stage in self.stages)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return {"tokens": self.tokens, "flops_per_evaluation": self.flops.total, "evaluations": self.evaluations,
                "seconds_per_step": self.step_seconds, "seconds": self.seconds,
                "stages": [vars(stage) for stage in self.stages]}


def sampling_seconds(once: EvaluationSeconds, settings: SampleSettings,
                     calibration: CacheCalibration = BUNDLED) -> tuple[int, float]:
    """(evaluations, seconds) of all steps; a step cache, calibrated on the model, leaves some of them out."""
    timesteps = reference_timesteps(settings.num_steps, settings.denoise).tolist()
    work = count_work(settings.cache, timesteps, guided=settings.guidance_scale != 1.0, calibration=calibration)
    without = work.predictions - work.attended
    return work.predictions, (work.attended * once.total + without * once.linear * (1 - _PROJECTIONS))


def tiles_of(tiling: Tiling, shape: LatentShape) -> tuple[int, tuple[int, int, int]]:
    """(number of tiles, cells of each in time, height and width)."""
    times, rows, columns = tiling.plan(shape)
    return len(times.starts) * len(rows.starts) * len(columns.starts), (times.tile, rows.tile, columns.tile)


def estimate_run(networks: Networks, settings: SampleSettings, machine: Machine, *,
                 interpolator: EMAInterpolator | None = None, multiplier: int = 1) -> Estimate:
    """Measures for a few seconds and says what a run takes.

    Args:
        networks: of the model.
        settings: of the run, checked.
        machine: where it runs.
        interpolator, multiplier: of the frames that are made in between; 1 for none.
    """
    shape = latent_shape(settings.width, settings.height, settings.num_frames)
    estimate = _sampling(networks, settings, machine, shape)
    estimate.stages.insert(0, _reading(networks, settings, machine))
    estimate.stages.append(_decoding(networks, settings, machine, estimate.stages[-1]))
    if interpolator is not None and multiplier > 1:
        estimate.stages.append(_interpolating(interpolator, multiplier, settings, machine))
    return estimate


def _reading(networks: Networks, settings: SampleSettings, machine: Machine) -> StageEstimate:
    dtype = machine.text_dtype(networks)
    seconds = text_seconds(networks.text, device=machine.device, dtype=dtype) * (1 if settings.guidance_scale == 1.0 else 2)
    working = 4 * TEXT_TOKENS * networks.text["d_ff"] * dtype.itemsize
    weights, streamed = _placed(networks.text_parameters, dtype, networks.text_stored, working, machine)
    weights = networks.streamed_text_bytes(dtype) if streamed else weights
    return StageEstimate("reading the prompt", seconds, weights, working, streamed)


def _placed(parameters: int, dtype: torch.dtype, stored: torch.dtype, working: int, machine: Machine) -> tuple[int, bool]:
    """(bytes of a network's weights as a whole, whether it is streamed), as the pipeline places it."""
    weights = parameters * dtype.itemsize
    mapped = machine.device.type == "cpu" and stored == dtype
    return weights, must_stream(machine.offload, machine.device, parameters=parameters, missing=0 if mapped else weights, working=working)


def _sampling(networks: Networks, settings: SampleSettings, machine: Machine, shape: LatentShape) -> Estimate:
    dtype, prompts = machine.dit_dtype(networks), 1 if settings.guidance_scale == 1.0 else 2

    def working(batch: int) -> int:
        return estimate_sampling_bytes(networks.dit, shape, batch=batch, dtype_bytes=dtype.itemsize)

    batch = prompts if both_prompts_fit(working(prompts), machine.device) else 1
    once = evaluation_seconds(networks, shape, device=machine.device, dtype=dtype, attention=machine.attention, batch=batch)
    evaluations, seconds = sampling_seconds(once, settings, networks.calibration)
    weights, streamed = _placed(networks.dit_parameters, dtype, networks.dit_stored, working(batch), machine)
    weights = networks.streamed_dit_bytes(dtype) if streamed else weights
    stage = StageEstimate("sampling", seconds, weights, working(batch), streamed)
    return Estimate(token_count(shape, networks.dit.patch_size), dit_flops(networks.dit, shape, TEXT_TOKENS), evaluations,
                    prompts * once.total, [stage])


def _decoding(networks: Networks, settings: SampleSettings, machine: Machine, sampling: StageEstimate) -> StageEstimate:
    shape = latent_shape(settings.width, settings.height, settings.num_frames)
    tiling = machine.tiling or Tiling.from_config(networks.vae)
    tiles, cells = tiles_of(tiling, shape)
    seconds = tiles * decode_seconds(networks, cells, device=machine.device)  # one by one: several at once are at least as fast
    working = decoding_bytes(networks.vae, tiling, shape, device=machine.device, dtype_bytes=4)
    weights = networks.vae_parameters * 4
    if machine.device.type == "cpu" and not sampling.streamed:  # the transformer stays where it is
        weights += sampling.weights_bytes
    return StageEstimate("decoding", seconds, weights, working)


def _interpolating(interpolator: EMAInterpolator, multiplier: int, settings: SampleSettings, machine: Machine) -> StageEstimate:
    seconds = pair_seconds(interpolator, settings.width, settings.height, multiplier, device=machine.device)
    model = interpolator.model
    pairs = pairs_per_batch(settings.width, settings.height, machine.device)
    working = pairs * model.memory_used_forward((1, settings.height, settings.width, 3), model.dtype)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return StageEstimate("interpolating", seconds * (settings.num_frames - 1), weights, working)
