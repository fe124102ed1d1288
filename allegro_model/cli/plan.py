"""Everything `allegro generate` knows and checks before the first weight is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import GeometryError, TextError
from ..geometry import LATENT_CHANNELS, TEMPORAL_FACTOR, latent_shape
from ..latents import read_state
from ..loading import open_source
from ..media import probe_clip, probe_contents, read_frames
from ..pipeline import AllegroPipeline, SampleSettings, SampleState, check_finite
from ..text import format_negative, format_prompt
from . import given as giving
from .base import Job, check_report_output
from .given import Given, GivenClip
from .job import (
    LATENTS_SUFFIX,
    base_metadata,
    check_clip,
    check_clip_space,
    check_latents_output,
    check_latents_space,
    check_loras_of,
    check_model_of,
    choose_fps,
    describe_loras,
    describe_model,
    load_latents,
    open_model,
    transformer_name,
)
from .report import UsageError

DEFAULT_SEED = 42  # the reference script's
DEFAULT_DENOISE = 0.6
# Options a saved run brings with it.
_FIXED_BY_RESUME = ("prompt", "storyboard", "negative", "template", "no_clean", "seed", "init_video", "denoise", "frames",
                    "width", "height", "steps", "cfg", "sampler", "cache", "first_frame", "last_frame", "loop", "keyframe",
                    "keep_frames", "fit")


@dataclass(frozen=True)
class Text:
    """What the text encoder is given, and how; see `format_prompt`."""

    prompt: str
    negative: str
    template: bool
    clean: bool


@dataclass(frozen=True)
class Plan:
    """A run that was checked.

    Attributes:
        pipeline: of the model.
        settings: of the run.
        text: the prompts.
        fps: frames per second of the clip.
        output: the clip; None when the run stops before there is one.
        latents: --save-latents.
        stop: step to stop at; None for all.
        state: the run that is resumed.
        start: frames [3, T, H, W], or raw latents [1, 4, t, h, w], to start from.
        given: frames for the image-to-video model, and what the clip is joined to; None for text to video.
        metadata: kept in every file that is written.
    """

    pipeline: AllegroPipeline
    settings: SampleSettings
    text: Text
    fps: float
    output: Path | None
    latents: Path | None
    stop: int | None
    state: SampleState | None
    start: Tensor | None
    given: Given | None
    metadata: dict[str, Any]

    @property
    def num_frames(self) -> int:
        """Frames of the video that is written."""
        return self.settings.num_frames if self.given is None else self.given.num_frames


def make_plan(job: Job) -> Plan:
    """Checks everything that can be checked.

    Raises:
        AllegroError: the first thing that is wrong.
    """
    args = job.args
    job.report.stage = "checking"
    _check_options(job)
    output = None if args.stop_at_step is not None else check_clip(job)
    latents = None if args.save_latents is None else check_latents_output(job, args.save_latents)
    check_report_output(job)
    state, saved = read_state(args.resume) if args.resume else (None, {})
    loras = describe_loras(job)
    pipeline, clip = _open(job, saved, loras)
    text = _text(job, pipeline, saved)
    if state is not None:
        _check_kind(job, pipeline, state, saved)
        settings, start = _settings_of(args.resume, state), None
        given = giving.resume_given(job, pipeline, settings, saved=saved, kept=state.kept)
    else:
        settings, start, saved = _settings_and_start(job, pipeline, clip)
        given = giving.read_given(job, settings, clip) if pipeline.image_to_video else None
    _check_stop(args.stop_at_step, settings, state)
    pipeline.check_memory(settings)
    open_source(pipeline.root, "t5-encoder", subfolder="text_encoder")
    _ = pipeline.vae_config  # it is needed last: what is wrong with it must not wait until the steps are done
    fps = choose_fps(args.fps, saved, pipeline)
    # Of a resumed run, what was given when it began.
    about_given = saved.get("given") if state is not None else given.metadata if given is not None else None
    optional = {"transformer": transformer_name(job), "loras": loras, "given": about_given,
                "storyboard": saved.get("storyboard") if state is not None else args.prompts}
    metadata = {**asdict(text), **describe_model(job, pipeline), "fps": fps, "settings": settings.to_dict(),
                **{name: value for name, value in optional.items() if value}, **base_metadata()}
    plan = Plan(pipeline, settings, text, fps, output, latents, args.stop_at_step, state, start, given, metadata)
    _check_space(plan)
    return plan


def _open(job: Job, saved: Mapping[str, Any], loras: list[dict[str, Any]]) -> tuple[AllegroPipeline, GivenClip | None]:
    """The model, checked against the run that is resumed, and the clip that a new run goes on from."""
    args = job.args
    if args.resume:
        check_loras_of(args.resume, saved, loras)
    pipeline = open_model(job)
    if args.resume:
        check_model_of(job, pipeline, args.resume, saved, transformer=True)
    clip = None if args.resume else giving.open_clip(job, pipeline)
    pipeline.check_given(clip or giving.wanted(args))
    if loras:
        _ = pipeline.dit_config  # merges them: what is wrong with one must not wait until the prompt is read
    return pipeline, clip


def _check_space(plan: Plan) -> None:
    s = plan.settings
    if plan.output is not None:
        check_clip_space(plan.output, s.width, s.height, plan.num_frames)
    if plan.latents is not None:
        check_latents_space(plan.latents, s.width, s.height, max(plan.num_frames, s.num_frames))


def _check_options(job: Job) -> None:
    args = job.args
    if args.resume:
        given = [name for name in _FIXED_BY_RESUME if getattr(args, name) not in (None, [])]
        if given:
            options = ["PROMPT" if name == "prompt" else "--" + name.replace("_", "-") for name in given]
            raise UsageError(f"A resumed run keeps its prompt and settings: leave out {', '.join(options)}.")
    elif args.prompt is None:
        raise UsageError('Say what the video shows: allegro generate "a red circle moves right" -o clip.mp4.')
    if args.stop_at_step is not None and args.save_latents is None:
        raise UsageError("--stop-at-step needs a file to save the run in: --save-latents half.safetensors.")
    if args.stop_at_step is not None and args.output is not None:
        raise UsageError("--stop-at-step ends before there is a video: leave out --output, and give it with "
                         "--resume.")
    if args.denoise is not None and args.init_video is None:
        raise UsageError("--denoise needs something to start from: add --init-video FILE.")
    giving.check_options(args)


def _text(job: Job, pipeline: AllegroPipeline, saved: Mapping[str, Any]) -> Text:
    """The prompts, checked for length and emptiness."""
    args, defaults = job.args, pipeline.defaults
    if args.resume:
        text = Text(saved.get("prompt", ""), saved.get("negative", ""), saved.get("template", True),
                    saved.get("clean", True))
        if [type(value) for value in asdict(text).values()] != [str, str, bool, bool]:
            raise TextError(f"{args.resume} holds no usable prompts. Start the run again.")
    else:
        text = Text(args.prompt, defaults.negative_prompt if args.negative is None else args.negative,
                    defaults.prompt_template if args.template is None else args.template, not args.no_clean)
    if not text.prompt.strip():
        raise TextError('The prompt is empty. Say what the video shows, e.g. "a red circle moves right".')
    if not format_prompt(text.prompt, template=False, clean=text.clean):
        raise TextError(f"The official cleaning deletes the whole prompt {text.prompt[:60]!r}. Use other "
                        "words, or keep them as they are with --no-clean.")
    format_negative(text.negative, clean=text.clean)  # raises when it is too long
    return text


def _settings_of(path: str, state: SampleState) -> SampleSettings:
    """The settings of a saved run, checked against its latents: a file can be edited."""
    s = state.settings
    s.check()
    t, h, w = latent_shape(s.width, s.height, s.num_frames)
    expected = [1, LATENT_CHANNELS, t, h, w]
    end = 0 if state.kept is None else state.kept_start + state.kept.shape[2]
    sound = (all(list(x.shape) == expected for x in (state.latents, state.denoised) if x is not None)
             and (state.condition is None or list(state.condition.shape) == [1, 2 * LATENT_CHANNELS, t, h, w])
             and (state.kept is None or list(state.kept.shape) == [1, LATENT_CHANNELS, end - state.kept_start, h, w])
             and 0 <= state.kept_start <= end <= t)
    if not sound or not 0 <= state.step <= s.num_steps:
        raise GeometryError(f"{path} holds latents of shape {list(state.latents.shape)} after step "
                            f"{state.step}: expected {expected} and a step from 0 to {s.num_steps}. The file is "
                            "damaged; start the run again.")
    check_finite(state.latents, path)
    return s


def _check_stop(stop: int | None, settings: SampleSettings, state: SampleState | None) -> None:
    done = 0 if state is None else state.step
    if stop is not None and done >= settings.num_steps:
        raise UsageError(f"--stop-at-step {stop}: all {settings.num_steps} steps of this run are done. Leave the "
                         "option out, and give --output.")
    if stop is not None and not done < stop < settings.num_steps:
        raise UsageError(f"--stop-at-step {stop}: must be from {done + 1} to {settings.num_steps - 1}; this "
                         f"run has {settings.num_steps} steps" + (f", {done} of them done." if done else "."))


def _check_kind(job: Job, pipeline: AllegroPipeline, state: SampleState, saved: Mapping[str, Any]) -> None:
    """Raises when a run was begun with another transformer."""
    before, now = saved.get("transformer"), transformer_name(job)
    if before != now:
        hint = "leave out --transformer" if before is None else f"give --transformer {before}"
        raise UsageError(f"{job.args.resume} was made with {before or 'the transformer of the model'}, not with "
                         f"{now or 'that of the model'}: {hint}.")
    if pipeline.image_to_video != (state.condition is not None):
        raise UsageError(f"{job.args.resume} {'lacks' if pipeline.image_to_video else 'has'} the condition of the image-to-video "
                         "model: it was made with another model. Give that one with --model.")


def _settings_and_start(job: Job, pipeline: AllegroPipeline, clip: GivenClip | None) -> tuple[
        SampleSettings, Tensor | None, dict[str, Any]]:
    """The settings of a new run, what it starts from (frames, latents or nothing), and the metadata of that."""
    args = job.args
    values = {"width": args.width, "height": args.height, "num_frames": args.frames, "num_steps": args.steps,
              "guidance_scale": args.cfg, "sampler": args.sampler, "cache": args.cache,
              "seed": DEFAULT_SEED if args.seed is None else args.seed}
    if clip is not None:
        _remark_on(job, pipeline, clip)
        if clip.latents is not None:  # another length is fine
            own = _size_of(clip.path, clip.latents, {**values, "num_frames": None})
            values |= {"width": own["width"], "height": own["height"]}
        return pipeline.settings(**values), None, {"fps": clip.fps}
    if args.init_video is None:
        return pipeline.settings(**values), None, {}
    values["denoise"] = DEFAULT_DENOISE if args.denoise is None else args.denoise
    if Path(args.init_video).suffix.lower() == LATENTS_SUFFIX:
        latents, saved = load_latents(args.init_video)
        check_model_of(job, pipeline, args.init_video, saved)
        own = _size_of(args.init_video, latents, values)
        return pipeline.settings(**{**values, **own}), latents, saved
    settings = pipeline.settings(**values)
    fps = choose_fps(args.fps, {}, pipeline)
    probe_clip(args.init_video)
    giving.check_host_memory(settings)
    with (job.report.measure("reading the video", torch.device("cpu")),
          job.console.progress("Reading the video")):
        frames, _ = read_frames(args.init_video, width=settings.width, height=settings.height, fps=fps,
                                max_frames=settings.num_frames)
    usable = frames.shape[1] // TEMPORAL_FACTOR * TEMPORAL_FACTOR
    if usable < settings.num_frames and (args.frames is not None or usable == 0):
        raise GeometryError(f"num_frames={settings.num_frames}: {args.init_video} has only {frames.shape[1]} "
                            f"frames at {fps:g} per second. Use --frames {max(usable, TEMPORAL_FACTOR)}, or "
                            "a longer video.")
    values["num_frames"] = usable
    return pipeline.settings(**values), frames[:, :usable], {}


def _size_of(path: str, latents: Tensor, values: Mapping[str, Any]) -> dict[str, int]:
    """Width, height and number of frames of latents [1, 4, t, h, w].

    Raises:
        GeometryError: `values` asks for others.
    """
    t, h, w = (int(n) for n in latents.shape[2:])
    own = {"width": 8 * w, "height": 8 * h, "num_frames": TEMPORAL_FACTOR * t}
    for name, value in own.items():
        if values[name] not in (None, value):
            raise GeometryError(f"{name}={values[name]}: {path} is for {value}. Leave the option out.")
    return own


def _remark_on(job: Job, pipeline: AllegroPipeline, clip: GivenClip) -> None:
    """Says what of a clip will be otherwise in the result."""
    if clip.info is not None and not job.args.new_part and probe_contents(clip.path).audio is not None:
        job.console.say(f"{clip.path} has sound, which is left out of the result.")
    fps, own = clip.fps, pipeline.defaults.fps
    if fps is not None and abs(fps - own) > 0.05 * own:
        job.console.say(f"{clip.path} has {fps:g} frames per second, and the model draws {own:g}: motion may change its pace "
                        "where the new part begins.")
