"""Frame interpolation: more frames per second, with EMA-VFI or any other model of ComfyUI's type INTERP_MODEL."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..allegro_model.errors import AllegroError, InterpolationError, UnsupportedCheckpoint
from ..allegro_model.vfi import DEFAULT_THRESHOLD, MAX_MULTIPLIER, FrameTimes
from .bridge import paths
from .bridge.interpolation import FLOW_SCALE_CHOICES, interpolate
from .bridge.vfi import DTYPES, load_interpolator
from .schema import io, schema

paths.register_folders()

InterpModel = io.Custom("INTERP_MODEL")  # the name that newer versions of ComfyUI use themselves
MAX_FPS = 1000.0
_WHERE = ("Files go to models/frame_interpolation, as .safetensors; a published .pkl is converted once with: "
          "python -m allegro_model convert-vfi. The bundled model needs no download.")


class LoadAllegroFrameInterpolator(io.ComfyNode):
    """An EMA-VFI model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LoadAllegroFrameInterpolator",
            display_name="Load Frame Interpolator (Allegro)",
            category="loaders",
            description=("Loads EMA-VFI, the model that Allegro's authors recommend for turning 15 frames per second into 30. "
                         + _WHERE),
            search_aliases=["ema-vfi", "vfi", "frame interpolation"],
            inputs=[
                io.Combo.Input("model_name", options=paths.interpolator_choices(), tooltip=(
                    "ours is best, ours_small four times as fast. Names that end in _t make frames at every position, the "
                    "others at the middle and its middles (multiplier 2, 4, 8, ...). " + _WHERE)),
                io.Combo.Input("dtype", options=list(DTYPES), default="auto", tooltip=(
                    "What the network computes in; frames are always moved in fp32. auto = fp16 on GPUs, bf16 on CPUs that "
                    "multiply it, else fp32. fp32 is the reference and the slowest.")),
            ],
            outputs=[InterpModel.Output(display_name="INTERP_MODEL", tooltip=(
                "The model, for Frame Interpolate (Allegro), or for ComfyUI's own node where there is one."))],
        )

    @classmethod
    def validate_inputs(cls, model_name: str | None = None, dtype: str | None = None) -> bool | str:
        """Before anything is loaded. An input that is linked is None here and checked in `execute`."""
        return _problem(lambda: _check_file(model_name, dtype))

    @classmethod
    def execute(cls, model_name: str, dtype: str) -> io.NodeOutput:
        _check_file(model_name, dtype)
        return io.NodeOutput(load_interpolator(paths.resolve_interpolator(model_name), dtype))


class FrameInterpolate(io.ComfyNode):
    """Frames between frames."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="AllegroFrameInterpolate",
            display_name="Frame Interpolate (Allegro)",
            category="video",
            description=("Makes the frames between the frames of any clip: twice as many, or any rate. The given frames come "
                         "out unchanged, scene cuts are kept sharp. Runs EMA-VFI, and the RIFE and FILM models of ComfyUI."),
            search_aliases=["ema-vfi", "vfi", "slow motion", "30 fps", "rife", "film"],
            inputs=[
                InterpModel.Input("interp_model", tooltip="The model from Load Frame Interpolator (Allegro), or of ComfyUI's own loader."),
                io.Image.Input("images", tooltip=(
                    "The frames of the clip, in order. An alpha channel is left out. One frame alone is returned as it is.")),
                io.Int.Input("multiplier", default=2, min=2, max=MAX_MULTIPLIER, step=1, tooltip=(
                    "How many frames for each: N frames become (N - 1) x multiplier + 1, or N x multiplier with hold_last. Not "
                    "used when target_fps is set.")),
                io.Float.Input("source_fps", default=15.0, min=0.01, max=MAX_FPS, step=0.01, round=False, tooltip=(
                    "The rate of the images: 15 for the released Allegro models, 8 for the bundled one. Connect the fps of Get "
                    "Video Components for other clips.")),
                io.Float.Input("target_fps", default=0.0, min=0.0, max=MAX_FPS, step=0.01, round=False, tooltip=(
                    "The rate you want, also fractional: each frame is made exactly where it belongs, nothing drifts. 0 = "
                    "source_fps times multiplier.")),
                io.Boolean.Input("hold_last", default=False, tooltip=(
                    "Shows the last frame as long as the others, so that the clip keeps its duration: 88 frames become 176, not "
                    "175. Turn it on when there is sound.")),
                io.Float.Input("scene_threshold", default=DEFAULT_THRESHOLD, min=0.0, max=1.0, step=0.01, tooltip=(
                    "Where the scene changes nothing is blended, the nearer frame is shown: pairs of frames with less in common "
                    "than this, from 0 for nothing to 1 for the same. 0 = off, 0.2 finds hard cuts.")),
                io.Combo.Input("flow_scale", options=list(FLOW_SCALE_CHOICES), default="auto", tooltip=(
                    "The size at which motion is estimated, a share of the frames'. Smaller finds larger motion in large frames. "
                    "auto = 1 up to 1920 pixels, 0.5 for 2K, 0.25 for 4K. EMA-VFI only.")),
                io.Boolean.Input("tta", default=False, tooltip=(
                    "Test-time augmentation: also interpolates the clip upside down and takes the mean. Slightly better, twice "
                    "the time. EMA-VFI only.")),
            ],
            outputs=[
                io.Image.Output(display_name="IMAGE", tooltip="The frames, for Create Video. The given ones are among them, bit for bit."),
                io.Float.Output(display_name="fps", tooltip="The new rate, for Create Video."),
            ],
        )

    @classmethod
    def validate_inputs(cls, multiplier: int | None = None, source_fps: float | None = None, target_fps: float | None = None,
                        scene_threshold: float | None = None, flow_scale: str | None = None) -> bool | str:
        """Before anything is loaded. An input that is linked is None here and checked in `execute`."""
        return _problem(lambda: _check_options(multiplier, source_fps, target_fps, scene_threshold, flow_scale))

    @classmethod
    def execute(cls, interp_model: Any, images: Any, multiplier: int, source_fps: float, target_fps: float, hold_last: bool,
                scene_threshold: float, flow_scale: str, tta: bool) -> io.NodeOutput:
        _check_options(multiplier, source_fps, target_fps, scene_threshold, flow_scale)
        times = _times(multiplier, source_fps, target_fps, hold_last)
        frames = interpolate(interp_model, images, times, scene_threshold=scene_threshold, flow_scale=flow_scale, tta=tta)
        return io.NodeOutput(frames, times.output_fps(source_fps))


def _times(multiplier: int, source_fps: float, target_fps: float, hold_last: bool = False) -> FrameTimes:
    if target_fps:
        return FrameTimes.between_rates(source_fps, target_fps, hold_last=hold_last)
    return FrameTimes.multiplied(multiplier, hold_last=hold_last)


def _check_options(multiplier: int | None, source_fps: float | None, target_fps: float | None,
                   scene_threshold: float | None, flow_scale: str | None) -> None:
    """Raises on values that fit no clip; None stands for what is not known yet."""
    for name, fps, lowest in (("source_fps", source_fps, 0.01), ("target_fps", target_fps, 0.0)):
        if fps is not None and not lowest <= fps <= MAX_FPS:
            raise InterpolationError(f"{name}={fps}: must be from {lowest:g} to {MAX_FPS:g} frames per second.")
    if None not in (multiplier, source_fps, target_fps):
        _times(multiplier, source_fps, target_fps)
    if scene_threshold is not None and not 0 <= scene_threshold <= 1:
        raise InterpolationError(f"scene_threshold={scene_threshold}: must be from 0 (off) to 1.")
    if flow_scale is not None and flow_scale not in FLOW_SCALE_CHOICES:
        raise InterpolationError(f"flow_scale={flow_scale!r}: must be one of {', '.join(FLOW_SCALE_CHOICES)}.")


def _check_file(choice: str | None, dtype: str | None) -> None:
    """The browser offers only what is there, scripts can send anything."""
    if choice is not None:
        paths.resolve_interpolator(choice)
    if dtype is not None and dtype not in DTYPES:
        raise UnsupportedCheckpoint(f"{dtype!r} is not one of: {', '.join(DTYPES)}. Choose one of these.")


def _problem(check: Callable[[], None]) -> bool | str:
    """True, or what is wrong."""
    try:
        check()
    except AllegroError as error:
        return str(error)
    return True
