"""`allegro decode` and `allegro encode`: latents <-> clips."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import GeometryError, NotEnoughMemory
from ..geometry import PIXEL_MULTIPLE, TEMPORAL_FACTOR, check_memory, check_size, frames_bytes
from ..latents import pack_latents
from ..media import probe_clip, read_frames
from ..memory import free_bytes
from ..pipeline import check_finite
from .base import Job, check_report_output
from .job import (
    base_metadata,
    check_clip,
    check_clip_space,
    check_latents_output,
    check_model_of,
    choose_fps,
    describe_model,
    load_latents,
    open_model,
    write_bytes,
    write_clip,
)


def decode(job: Job) -> None:
    """Runs `allegro decode`.

    Raises:
        AllegroError: see the exit codes.
    """
    args = job.args
    job.report.stage = "checking"
    output = check_clip(job)
    check_report_output(job)
    latents, saved = load_latents(args.latents)
    pipeline = open_model(job)
    check_model_of(job, pipeline, args.latents, saved)
    t, h, w = (int(cells) for cells in latents.shape[2:])
    pipeline.check_tile_memory(TEMPORAL_FACTOR * t, 8 * h, 8 * w)
    check_clip_space(output, 8 * w, 8 * h, TEMPORAL_FACTOR * t)
    fps = choose_fps(args.fps, saved, pipeline)
    metadata = {**saved, "fps": fps, **base_metadata()}
    job.report.facts["settings"] = metadata
    write_clip(job, pipeline, latents, output, fps=fps, metadata=metadata)


def encode(job: Job) -> None:
    """Runs `allegro encode`.

    Raises:
        AllegroError: see the exit codes.
    """
    args = job.args
    job.report.stage = "checking"
    output = check_latents_output(job, args.output)
    check_report_output(job)
    found = probe_clip(args.clip)
    width = args.width if args.width is not None else _round_down(found.width)
    height = args.height if args.height is not None else _round_down(found.height)
    check_size(width, height, TEMPORAL_FACTOR if args.frames is None else args.frames)
    pipeline = open_model(job)
    frames, fps = _read(job, width, height)
    pipeline.check_tile_memory(frames.shape[1], height, width)
    metadata: dict[str, Any] = {"source": Path(args.clip).name, "fps": fps, **base_metadata(),
                                **describe_model(job, pipeline, transformer=False)}
    job.report.facts["settings"] = {**metadata, "width": width, "height": height,
                                    "num_frames": frames.shape[1]}
    with (job.report.measure("encoding", pipeline.device),
          job.console.progress("Encoding", "tile") as bar):
        latents = pipeline.encode(frames[None], progress=bar.update)
    check_finite(latents, "the latents")
    write_bytes(output, pack_latents(latents, metadata), force=job.force)
    job.report.facts["output"] = [str(output)]
    job.report.facts["frames"] = frames.shape[1]
    job.say_result(str(output))


def _round_down(pixels: int) -> int:
    return max(PIXEL_MULTIPLE, pixels // PIXEL_MULTIPLE * PIXEL_MULTIPLE)


def _read(job: Job, width: int, height: int) -> tuple[Tensor, float]:
    """(frames [3, T, H, W], frames per second), T a multiple of 4; stops before memory runs out."""
    args = job.args
    free = free_bytes(torch.device("cpu"))
    # Twice: the pieces that were read, and the clip they are joined to.
    limit = None if free is None else free // (2 * frames_bytes(width, height, 1))
    if limit is not None and args.frames is not None:
        check_memory("The clip", 2 * frames_bytes(width, height, args.frames), free or 0,
                     "fewer --frames; a smaller --width and --height")
    wanted = args.frames if args.frames is not None else None if limit is None else limit + 1
    with (job.report.measure("reading the video", torch.device("cpu")),
          job.console.progress("Reading the video")):
        frames, fps = read_frames(args.clip, width=width, height=height, fps=args.fps, max_frames=wanted)
    available = int(frames.shape[1])
    if args.frames is None and limit is not None and available > limit:
        raise NotEnoughMemory(f"{args.clip} has more than the {limit} frames of {width}x{height} that fit "
                              "into memory. Take fewer with --frames, or a smaller --width and --height.")
    if args.frames is not None and available < args.frames:
        usable = max(TEMPORAL_FACTOR, available // TEMPORAL_FACTOR * TEMPORAL_FACTOR)
        raise GeometryError(f"num_frames={args.frames}: {args.clip} has only {available} frames at {fps:g} "
                            f"per second. Use --frames {usable}.")
    kept = max(available // TEMPORAL_FACTOR * TEMPORAL_FACTOR, min(available, TEMPORAL_FACTOR))
    if kept != available:
        job.console.say(f"The last {available - kept} of {available} frames are left out: the model takes "
                        f"multiples of {TEMPORAL_FACTOR}.")
    return frames[:, :kept], fps
