"""A guess at a run that is about to begin, for less than a hundredth of its time."""

from __future__ import annotations

import torch

from ..costs import dit_flops, vae_decode_flops
from ..geometry import latent_shape
from ..pipeline import SampleSettings
from ..vae import Tiling
from .estimate import Machine, sampling_seconds, tiles_of
from .measure import Run, seconds_of
from .networks import Networks
from .roofline import convolution_run, matmul_run
from .speed import TEXT_TOKENS, EvaluationSeconds, attention_seconds

# Fewer operations than this are over in seconds on a processor of two cores, so that not even its speed is asked for.
_FEW_OPERATIONS = 2e12
_SECONDS = 120.0  # of a run
# What norms, activations and copies add. Measured on a processor: 1.2 to 1.4 for both networks.
_BETWEEN = 1.3


@torch.no_grad()
def foretell(networks: Networks, settings: SampleSettings, machine: Machine, steps: int) -> tuple[float, float] | None:
    """(seconds of sampling, of decoding), or None for a run that is too short to measure anything for it.

    A product of matrices, a convolution and attention are timed, no networks: making them would take longer.

    Args:
        networks: of the model; the text encoder is not asked for.
        settings: of the run.
        machine: where it runs.
        steps: that are left of `settings.num_steps`.
    """
    device, dtype, share = machine.device, machine.dit_dtype(networks), steps / settings.num_steps
    shape = latent_shape(settings.width, settings.height, settings.num_frames)
    evaluations, _ = sampling_seconds(EvaluationSeconds(0, 0), settings, networks.calibration)
    tiles, cells = tiles_of(machine.tiling or Tiling.from_config(networks.vae), shape)
    flops, decoding = dit_flops(networks.dit, shape, TEXT_TOKENS), tiles * vae_decode_flops(networks.vae, cells)
    if share * evaluations * flops.total + decoding < _FEW_OPERATIONS:
        return None
    product = _seconds_each(matmul_run(device, dtype), device)
    if product * (share * evaluations * flops.total + decoding) < _SECONDS:
        return None
    attention = attention_seconds(networks.dit, shape, device=device, dtype=dtype, attention=machine.attention, budget=0)
    once = EvaluationSeconds(_BETWEEN * product * (flops.linear + flops.cross_attention), attention)
    convolution = _seconds_each(convolution_run(device, torch.float32), device)
    return share * sampling_seconds(once, settings, networks.calibration)[1], _BETWEEN * decoding * convolution


def _seconds_each(measured: tuple[Run, int], device: torch.device) -> float:
    """Of one operation; the first call warms up."""
    run, operations = measured
    run()
    return seconds_of(run, device) / operations
