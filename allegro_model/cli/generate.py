"""`allegro generate`: prompt -> clip, in stages that can be stopped and resumed."""

from __future__ import annotations

import shlex
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from ..bench.estimate import Machine
from ..bench.networks import Networks
from ..bench.quick import foretell
from ..conditioning import GivenFrames
from ..latents import pack_latents, pack_state
from ..media import check_fps
from ..pipeline import AllegroPipeline, PromptEmbeds, SampleState
from ..sampling import StepInfo
from ..sampling.cache import BUNDLED
from ..vfi import FrameTimes
from .base import Job
from .console import roughly, size
from .given import Given, given_frames, join_latents, joiner, joins_video, kept_latents
from .interpolate import Smoothing, open_smoothing
from .job import (
    check_clip_space,
    keep_latents,
    lora_options,
    model_name,
    transformer_name,
    write_bytes,
    write_clip,
)
from .plan import Plan, make_plan
from .report import UsageError
from .storyboard import draw_storyboard


def generate(job: Job) -> None:
    """Runs the command.

    Raises:
        AllegroError: see the exit codes.
    """
    if job.args.storyboard is None:
        draw(job)
    else:
        draw_storyboard(job, draw)
    job.console.say(_summary(job))


def draw(job: Job, *, write: bool = True) -> None:
    """Makes one clip.

    Args:
        write: the video, too, not only its latents.
    """
    plan = make_plan(job)
    smoothing = smoothing_of(job, plan) if write else None
    job.report.facts["settings"] = plan.metadata
    state = plan.state
    if state is None or not state.finished:
        prompts = _encode_prompt(job, plan)
        state = _sample(job, plan, prompts, _first_state(job, plan))
    try:
        if not state.finished:
            _save_unfinished(job, plan, state)
            return
        latents = join_latents(plan.given, plan.pipeline.raw_latents(state))
        if plan.latents is not None:
            write_bytes(plan.latents, pack_latents(latents, plan.metadata), force=job.force)
            job.report.facts["latents"] = str(plan.latents)
        if not write:
            return
        assert plan.output is not None
        join = joiner(plan.given)
        if smoothing is None:
            write_clip(job, plan.pipeline, latents, plan.output, fps=plan.fps, metadata=plan.metadata, through=join)
        else:
            fps = smoothing.times.output_fps(plan.fps)
            metadata = {**plan.metadata, "fps": fps, "interpolation": smoothing.settings}
            write_clip(job, plan.pipeline, latents, plan.output, fps=fps, metadata=metadata,
                       through=lambda frames: smoothing.stream(join(frames)))
    except BaseException:  # whatever it is, hours of sampling must not be lost
        _rescue(job, plan, state)
        raise


def smoothing_of(job: Job, plan: Plan) -> Smoothing | None:
    """What --interpolate asks for, loaded before the long work begins; None without it or without a clip.

    Raises:
        AllegroError: as `open_smoothing`, or there is no room for the clip.
    """
    args = job.args
    if args.interpolate is None:
        if args.interpolator is not None:
            raise UsageError("--interpolator needs to know how many frames to make: add --interpolate 2.")
        return None
    times = FrameTimes.multiplied(args.interpolate, hold_last=True)
    check_fps(times.output_fps(plan.fps))
    if plan.output is None:
        return None
    s = plan.settings
    check_clip_space(plan.output, s.width, s.height, times.count(plan.num_frames))
    return open_smoothing(job, times, s.width, s.height)


# The stages


def _encode_prompt(job: Job, plan: Plan) -> PromptEmbeds:
    text = plan.text
    with (job.report.measure("reading the prompt", plan.pipeline.device),
          job.console.progress("Reading the prompt")):
        return plan.pipeline.encode_prompt(text.prompt, text.negative, template=text.template,
                                           clean=text.clean, guidance_scale=plan.settings.guidance_scale)


def _first_state(job: Job, plan: Plan) -> SampleState:
    """The resumed run, or a new one from noise, frames or latents."""
    if plan.state is not None:
        return plan.state
    latents = plan.start
    if latents is not None and latents.ndim == 4:
        with (job.report.measure("encoding the video", plan.pipeline.device),
              job.console.progress("Encoding the video", "tile") as bar):
            latents = plan.pipeline.encode(latents[None], progress=bar.update)
    if plan.given is None:
        return plan.pipeline.start(plan.settings, latents)
    frames = _given_frames(job, plan.given, plan.pipeline)
    with (job.report.measure("encoding the given frames", plan.pipeline.device),
          job.console.progress("Encoding the given frames", "tile") as bar):
        condition = plan.pipeline.condition(frames, progress=bar.update)
    kept, kept_start = kept_latents(plan.given)
    return plan.pipeline.start(plan.settings, latents, condition=condition, kept=kept, kept_start=kept_start)


def _given_frames(job: Job, given: Given, pipeline: AllegroPipeline) -> GivenFrames:
    """All of them; those of given latents have to be decoded."""
    if given.clip is None or given.clip.latents is None:
        return given_frames(given, pipeline)
    with (job.report.measure("decoding the given latents", pipeline.device),
          job.console.progress("Decoding the given latents", "tile") as bar):
        return given_frames(given, pipeline, progress=bar.update)


def _sample(job: Job, plan: Plan, prompts: PromptEmbeds, state: SampleState) -> SampleState:
    """Runs the steps; those of a run that is stopped, or fails, are kept."""
    s, pipeline, args = plan.settings, plan.pipeline, job.args
    kernel = pipeline.kernel(s, state.attention)
    state = replace(state, attention=kernel.name)
    job.report.facts["attention"] = {"name": kernel.name, "seconds": kernel.seconds}
    job.console.say(
        f"{' + '.join([transformer_name(job) or model_name(job), *_loras(plan)])}: {s.num_frames} frames of "
        f"{s.width}x{s.height}, {s.num_steps} steps of {s.sampler}, cfg {s.guidance_scale:g}, seed {s.seed}; "
        f"{str(pipeline.dit_dtype).removeprefix('torch.')} on {pipeline.device}, attention {kernel.describe()}, "
        f"{'compiled blocks, ' * args.compile}{_cache_name(s.cache)}, about {size(pipeline.sampling_bytes(s))} of working memory")
    _foretell(job, plan, state)
    last: StepInfo | None = None
    try:
        with (job.report.measure("sampling", pipeline.device),
              job.console.progress("Sampling", "step") as bar):

            def after_step(info: StepInfo) -> None:
                nonlocal last
                last = info
                bar.update(info.step, info.num_steps)

            state = pipeline.sample(prompts, state, stop=plan.stop, callback=after_step)
    except BaseException:
        # The callback never sees a step with NaN or Inf, so that what is kept here can be resumed.
        if last is not None:
            _rescue(job, plan, replace(state, latents=last.latents.cpu(), step=last.step, denoised=last.denoised.cpu()))
        raise
    if state.skipped:
        job.console.say(state.skipped)
        job.report.facts["skipped"] = state.skipped
    return state


def _foretell(job: Job, plan: Plan, state: SampleState) -> None:
    """Says before the first step how long a long run takes; the way of weights that are streamed is not timed."""
    pipeline, stop = plan.pipeline, plan.settings.num_steps if plan.stop is None else plan.stop
    if job.console.quiet:
        return
    networks = Networks(pipeline.root.name, pipeline.dit_config, pipeline.vae_config, {}, pipeline.defaults,
                        calibration=BUNDLED if plan.settings.cache == "off" else pipeline.cache_calibration())
    machine = Machine(pipeline.device, pipeline.dit_dtype, pipeline.kernel(plan.settings, state.attention).run, pipeline.tiling)
    found = foretell(networks, plan.settings, machine, stop - state.step)
    if found is not None:
        travels = pipeline.device.type != "cpu" and pipeline.streams(plan.settings)
        longer = " (longer if it has to wait for the weights, which are streamed)" if travels else ""
        job.console.say(f"About {roughly(found[0])} for {stop - state.step} steps{longer}, then about {roughly(found[1])} of decoding.")


def _cache_name(level: str) -> str:
    return "no step cache" if level == "off" else f"step cache {level}"


def _loras(plan: Plan) -> list[str]:
    return [f"{lora['name']} at {lora['strength']:g}" for lora in plan.metadata.get("loras", [])]


def _save_unfinished(job: Job, plan: Plan, state: SampleState) -> None:
    """Saves a run that is to be resumed."""
    assert plan.latents is not None
    write_bytes(plan.latents, pack_state(state, plan.metadata), force=job.force)
    job.report.facts["latents"] = str(plan.latents)
    job.report.facts["step"] = state.step
    job.console.say(_how_to_resume(job, plan, state, plan.latents))
    job.say_result(str(plan.latents))


def _rescue(job: Job, plan: Plan, state: SampleState) -> None:
    """Keeps what was sampled, finished or not, unless it lies already where the user wanted it."""
    if "latents" in job.report.facts and not joins_video(plan.given):
        path: Path | None = Path(job.report.facts["latents"])
        finished = state.finished
    else:
        data, finished = _pack(plan, state)
        beside = plan.output or plan.latents
        assert beside is not None
        wanted = None if "latents" in job.report.facts else plan.latents
        path = keep_latents(job, data, wanted=wanted, beside=beside)
    if path is None:
        return
    job.report.facts["latents"] = str(path)
    if finished:
        then = "" if job.args.interpolate is None else ", and interpolate the video with: allegro interpolate"
        job.remarks.append(f"The finished latents are in {path}. Decode them with: allegro decode "
                           f"{shlex.quote(str(path))}{_options(job, plan)}{then}")
    else:
        job.report.facts["step"] = state.step
        job.remarks.append(_how_to_resume(job, plan, state, path))


def _pack(plan: Plan, state: SampleState) -> tuple[bytes, bool]:
    """(a file of the state, whether it is one of finished latents)."""
    if state.finished and not joins_video(plan.given):
        # Whatever is wrong with the VAE, whose scale this needs: the state itself can always be kept.
        with suppress(Exception):
            return pack_latents(join_latents(plan.given, plan.pipeline.raw_latents(state)), plan.metadata), True
    return pack_state(state, plan.metadata), False


def _how_to_resume(job: Job, plan: Plan, state: SampleState, path: Path) -> str:
    return (f"{state.step} of {plan.settings.num_steps} steps are saved. Go on with: allegro generate --resume "
            f"{shlex.quote(str(path))}{_options(job, plan, 'transformer', 'continue_from', 'prepend_to')}"
            f"{' --new-part' * job.args.new_part}{lora_options(job.args.lora)}{_interpolate_options(job)}")


def _options(job: Job, plan: Plan, *names: str) -> str:
    """The end of a command line that goes on with this run: output, model and others as they were given."""
    given = {name: getattr(job.args, name) for name in ("model", *names)}
    words = "".join(f" --{name.replace('_', '-')} {shlex.quote(value)}" for name, value in given.items() if value)
    return f" -o {shlex.quote(str(plan.output or 'clip.mp4'))}{words}"


def _interpolate_options(job: Job) -> str:
    """As they are written on a command line, each with a space in front."""
    if job.args.interpolate is None:
        return ""
    model = f" --interpolator {shlex.quote(job.args.interpolator)}" if job.args.interpolator else ""
    return f" --interpolate {job.args.interpolate}{model}"


def _summary(job: Job) -> str:
    """One line: time and peak memory."""
    stages = job.report.stages
    peaks = [max((s[key] or 0 for s in stages), default=0) for key in ("peak_ram_bytes", "peak_gpu_bytes")]
    memory = " and ".join(f"{size(peak)} of {where} memory"
                          for peak, where in zip(peaks, ("main", "GPU"), strict=True) if peak)
    times = ", ".join(f"{s['name']} {s['seconds']:.1f} s" for s in stages)
    return f"{times}; at most {memory}" if memory else times
