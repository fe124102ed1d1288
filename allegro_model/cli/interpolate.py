"""`allegro interpolate`: a clip -> the same clip with more frames; and `generate --interpolate`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..geometry import check_memory
from ..loading import bundled_interpolator, load_interpolator
from ..media import (
    ClipInfo,
    check_fps,
    keeps_audio,
    open_writer,
    probe_clip,
    probe_contents,
    read_metadata,
    stream_frames,
)
from ..memory import free_bytes
from ..pipeline import resolve_device, resolve_dtype
from ..vfi import (
    DEFAULT_THRESHOLD,
    EMAVFI,
    EMAInterpolator,
    FrameTimes,
    Progress,
    best_dtype,
    interpolate_stream,
    pairs_per_batch,
)
from .base import Job, check_report_output
from .job import base_metadata, check_clip, check_device
from .report import UsageError

BUNDLED = "tiny-vfi"


@dataclass(frozen=True)
class Smoothing:
    """Makes more frames of a stream; checked, with the weights loaded.

    Attributes:
        interpolator: the model.
        times: of the frames of the result.
        scene_threshold, pairs: see `interpolate_stream`.
        settings: what is kept in the files that are written.
    """

    interpolator: EMAInterpolator
    times: FrameTimes
    scene_threshold: float
    pairs: int
    settings: dict[str, Any]

    def stream(self, chunks: Iterable[Tensor], *, num_frames: int = 0, progress: Progress | None = None) -> Iterator[Tensor]:
        """[3, n, H, W] in [-1, 1] each -> [3, 1, H, W] each.

        Args:
            chunks: the clip, a few frames at a time.
            num_frames: how many there are, 0 if that is not known.
            progress: see `interpolate_stream`.
        """
        frames = (((frame.float() + 1) / 2).clamp(0, 1) for chunk in chunks for frame in chunk.unbind(1))
        for frame in interpolate_stream(frames, self.interpolator, self.times, scene_threshold=self.scene_threshold,
                                        pairs_per_batch=self.pairs, num_frames=num_frames, progress=progress):
            yield frame[:, None] * 2 - 1


def interpolate(job: Job) -> None:
    """Runs the command.

    Raises:
        AllegroError: see the exit codes.
    """
    args = job.args
    job.report.stage = "checking"
    if (args.factor is None) == (args.fps is None):
        raise UsageError("Say how many frames: --factor 2 for twice as many, or --fps 60 for so many per second.")
    output = check_clip(job)
    check_report_output(job)
    found = probe_clip(args.clip)
    times = (FrameTimes.multiplied(args.factor, hold_last=args.hold_last) if args.factor is not None
             else FrameTimes.between_rates(found.fps, args.fps, hold_last=args.hold_last))
    fps = times.output_fps(found.fps)
    check_fps(fps)
    smoothing = open_smoothing(job, times, found.width, found.height)
    metadata = {**read_metadata(args.clip), "fps": fps, "interpolation": smoothing.settings, **base_metadata()}
    job.report.facts["device"] = str(resolve_device(args.device))
    job.report.facts["settings"] = {"width": found.width, "height": found.height, "source_fps": found.fps,
                                    "fps": fps, **smoothing.settings}
    job.say_result(_write(job, output, found, smoothing, metadata))


def open_smoothing(job: Job, times: FrameTimes, width: int, height: int) -> Smoothing:
    """Loads the interpolator and checks the memory.

    Args:
        job: with the options of `interpolate`, or those of `generate`.
        times: of the frames of the result.
        width, height: of the clip, pixels.
    Raises:
        CheckpointError, UnsupportedCheckpoint, CheckpointMismatch: see `load_interpolator`.
        NotEnoughMemory: for a single pair of frames.
        AllegroError: the device cannot be used, or an option has an illegal value.
    """
    args = job.args
    check_device(args.device)
    device = resolve_device(args.device)
    alone = job.report.command == "interpolate"  # the dtype of `generate` is that of its transformer
    dtype = (resolve_dtype(args.dtype) if alone else None) or best_dtype(device)
    model = (args.model if alone else args.interpolator) or BUNDLED
    path = bundled_interpolator() if model == BUNDLED else Path(model)
    with job.report.measure("loading the interpolator", device):
        network = load_interpolator(path, device=device, dtype=dtype)
    options = {"flow_scale": args.flow_scale, "tta": args.tta} if alone else {}
    threshold = args.scene_threshold if alone else DEFAULT_THRESHOLD
    pairs = _pairs_that_fit(network, width, height, device, dtype)
    name = Path(model).name
    type_name = str(dtype).removeprefix("torch.")
    job.report.facts["interpolator"] = name
    job.console.say(f"{name}: interpolates {'at any position' if network.config.arbitrary_time else 'the middle of two frames'}, "
                    f"{type_name} on {device}")
    settings = {"model": name, "step": str(times.step), "hold_last": times.hold_last, "scene_threshold": threshold,
                "dtype": type_name, **options}
    return Smoothing(EMAInterpolator(network, **options), times, threshold, pairs, settings)


def _pairs_that_fit(network: EMAVFI, width: int, height: int, device: torch.device, dtype: torch.dtype) -> int:
    """Pairs of frames at once."""
    pairs, free = pairs_per_batch(width, height, device), free_bytes(device)
    needed = network.memory_used_forward((1, height, width, 3), dtype)
    if free is None:
        return pairs
    check_memory(f"Interpolating {width}x{height}", needed, free, "a smaller video; --device cpu; closing other programs")
    return max(1, min(pairs, free // needed))


def _write(job: Job, output: Path, found: ClipInfo, smoothing: Smoothing, metadata: dict[str, Any]) -> str:
    """Writes the clip; returns what to say on standard output."""
    args, contents = job.args, probe_contents(job.args.clip)
    if contents.audio and not keeps_audio(output):
        job.console.say(f"{output.suffix} has no sound: that of {args.clip} is left out.")
    num_frames = round((contents.seconds or 0) * found.fps)
    with (job.report.measure("interpolating", resolve_device(args.device)),
          job.console.progress("Interpolating", "pair") as bar,
          open_writer(output, found.width, found.height, fps=metadata["fps"], metadata=metadata, quality=args.quality,
                      force=job.force, origin=Path(args.clip)) as writer):

        def after_pair(done: int, pairs: int) -> None:
            bar.update(done, max(done, pairs))  # the duration that a file states is not always true

        for frame in smoothing.stream(stream_frames(args.clip, found), num_frames=num_frames, progress=after_pair):
            writer.write(frame)
    job.report.facts["output"] = [str(file) for file in writer.files]
    job.report.facts["frames"] = writer.num_frames
    last = f" ... {writer.files[-1].name}" if len(writer.files) > 1 else ""
    return f"{writer.files[0]}{last}"
