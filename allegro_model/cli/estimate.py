"""`allegro estimate`: what a run would take on this machine, before it begins."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

from ..attention import AttentionShape, choose_attention
from ..bench.estimate import Estimate, Machine, estimate_run
from ..bench.hardware import describe_hardware
from ..bench.networks import Networks, open_networks
from ..geometry import LATENT_CHANNELS, latent_shape, token_count
from ..loading import bundled_interpolator, load_interpolator
from ..pipeline import SampleSettings, read_calibration, resolve_device, resolve_dtype
from ..vfi import EMAInterpolator, FrameTimes, best_dtype
from .base import Job, check_report_output
from .console import duration, size
from .job import check_device, clip_bytes


def estimate(job: Job) -> None:
    """Runs the command.

    Raises:
        AllegroError: see the exit codes.
    """
    args = job.args
    job.report.stage = "checking"
    check_report_output(job)
    check_device(args.device)
    networks = open_networks(args.model)
    settings = _settings(job, networks)
    if settings.cache != "off" and networks.root is not None:
        networks = replace(networks, calibration=read_calibration(networks.root))
    machine = _machine(job, networks, settings)
    job.report.stage = "measuring"
    start = time.monotonic()
    with job.console.progress("Measuring"):
        found = estimate_run(networks, settings, machine, interpolator=_interpolator(job, machine),
                             multiplier=args.interpolate or 1)
    job.report.facts |= {"model": networks.name, "hardware": describe_hardware(machine.device), "settings": settings.to_dict(),
                         "estimate": found.to_dict()}
    job.say_result("\n".join(_lines(job, networks, settings, machine, found)))
    job.console.say(f"From measurements of {duration(time.monotonic() - start)}; another program that runs beside it slows a run "
                    "down. Reading files comes on top.")


def _settings(job: Job, networks: Networks) -> SampleSettings:
    args, d = job.args, networks.defaults
    own = {"width": d.width, "height": d.height, "num_frames": d.num_frames, "num_steps": d.num_steps,
           "guidance_scale": d.guidance_scale, "sampler": d.sampler}
    given = {"width": args.width, "height": args.height, "num_frames": args.frames, "num_steps": args.steps,
             "guidance_scale": args.cfg, "cache": args.cache}
    settings = SampleSettings(**{**own, **{name: value for name, value in given.items() if value is not None}})
    settings.check()
    return settings


def _machine(job: Job, networks: Networks, settings: SampleSettings) -> Machine:
    """With the kernel that the run would take, which may be measured."""
    device = resolve_device(job.args.device)
    machine = Machine(device, resolve_dtype(job.args.dtype), offload=job.args.offload)
    shape = latent_shape(settings.width, settings.height, settings.num_frames)
    heads = AttentionShape(token_count(shape, networks.dit.patch_size), networks.dit.num_attention_heads,
                           networks.dit.attention_head_dim)
    kernel = choose_attention(job.args.attention, device, machine.dit_dtype(networks), heads)
    job.report.facts["attention"] = kernel.name
    return replace(machine, attention=kernel.run)


def _interpolator(job: Job, machine: Machine) -> EMAInterpolator | None:
    if job.args.interpolate is None:
        return None
    FrameTimes.multiplied(job.args.interpolate)  # raises unless it is possible
    path = job.args.interpolator or bundled_interpolator()
    return EMAInterpolator(load_interpolator(path, device=machine.device, dtype=best_dtype(machine.device)))


def _lines(job: Job, networks: Networks, settings: SampleSettings, machine: Machine, found: Estimate) -> Iterator[str]:
    s, flops = settings, found.flops
    dtype = str(machine.dit_dtype(networks)).removeprefix("torch.")
    yield (f"{networks.name}: {s.num_frames} frames of {s.width}x{s.height}, {s.num_steps} steps, cfg {s.guidance_scale:g}, "
           f"step cache {s.cache}")
    yield f"{describe_hardware(machine.device)['name']}, {dtype} on {machine.device}, attention {job.report.facts['attention']}"
    yield (f"{found.tokens:,} tokens, {flops.total:.2g} operations per evaluation, {flops.self_attention / flops.total:.0%} of them "
           f"in self-attention; {found.evaluations} evaluations, {duration(found.step_seconds)} per step")
    yield ""
    yield f"{'stage':<20}{'time':>10}  peak {'main' if machine.device.type == 'cpu' else 'GPU'} memory"
    for stage in found.stages:
        yield (f"{stage.name:<20}{duration(stage.seconds):>10}  {size(stage.weights_bytes + stage.working_bytes)} "
               f"({size(stage.weights_bytes)} of weights{', streamed' * stage.streamed})")
    yield f"{'in all':<20}{duration(found.seconds):>10}"
    if any(stage.streamed for stage in found.stages):
        yield (f"streamed: the weights {'are converted' if machine.device.type == 'cpu' else 'come to the device'} layer by layer, "
               "which may take longer than this")
    yield ""
    frames = s.num_frames * (job.args.interpolate or 1)
    files = "" if networks.file_bytes is None else f"{size(networks.file_bytes)} of weights, "
    latents = 4 * LATENT_CHANNELS * s.num_frames // 4 * s.width * s.height // 64
    yield f"disk: {files}up to {size(clip_bytes('.mp4', s.width, s.height, frames))} for the video, {size(latents)} for its latents"
