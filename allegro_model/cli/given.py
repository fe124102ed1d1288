"""What `allegro generate` is given to start from, end at or go on with: pictures, a video, or latents."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..conditioning import GivenFrames, fit_images, resolve_positions
from ..errors import GeometryError
from ..geometry import TEMPORAL_FACTOR, check_memory, frames_bytes
from ..joining import join_streams
from ..media import ClipInfo, probe_clip, read_image, stream_frames
from ..memory import free_bytes
from ..pipeline import AllegroPipeline, SampleSettings
from ..vae import normalise
from ..vae.tiling import Progress
from .base import Job
from .job import LATENTS_SUFFIX, Through, check_model_of, load_latents
from .report import UsageError

DEFAULT_KEEP = 8  # two latent frames: enough to show how everything moves; at most half of a short clip
# Decoded beside the latent frames that are wanted, so that these look as in the whole clip: one tile of the VAE.
_CONTEXT = 6


class GivenClip(NamedTuple):
    """The clip that is gone on from, or that something is put in front of.

    Attributes:
        path: of the file.
        keep: frames that the new clip shares with it; 0 until the length of the new clip is known.
        before: whether the new clip goes in front of it.
        num_frames: of the file.
        fps: frames per second; None if the file does not say.
        info: of a video.
        latents: raw latents [1, 4, t, h, w], where the file holds them.
    """

    path: str
    keep: int
    before: bool
    num_frames: int
    fps: float | None
    info: ClipInfo | None
    latents: Tensor | None


@dataclass(frozen=True)
class Given:
    """Everything that is given, read and checked.

    Attributes:
        frames: position -> frame [3, H, W] in [-1, 1]; without those that are still to be decoded.
        clip: what the new clip is joined to.
        settings: of the run.
        fit: how pictures of another shape are fitted.
        new_part: write the new frames only.
        metadata: kept in the files that are written.
    """

    frames: dict[int, Tensor]
    clip: GivenClip | None
    settings: SampleSettings
    fit: str
    new_part: bool
    metadata: dict[str, Any]

    @property
    def num_frames(self) -> int:
        """Frames of the video that is written."""
        n = self.settings.num_frames
        if self.clip is None:
            return n
        return n - self.clip.keep + (0 if self.new_part else self.clip.num_frames)


def wanted(args: argparse.Namespace) -> list[tuple[int, str]]:
    """(position, file) of every picture of a command line."""
    single = ((0, args.first_frame), (-1, args.last_frame), (0, args.loop), (-1, args.loop))
    return [(position, file) for position, file in single if file is not None] + args.keyframe


def clip_path(args: argparse.Namespace) -> str | None:
    """The file of --continue-from or --prepend-to."""
    path: str | None = args.prepend_to if args.continue_from is None else args.continue_from
    return path


def check_options(args: argparse.Namespace) -> None:
    """Raises when options do not go together.

    Raises:
        UsageError: names what is missing or too much.
    """
    path = clip_path(args)
    if path is None:
        for name in ("keep_frames", "new_part"):
            if getattr(args, name):
                raise UsageError(f"--{name.replace('_', '-')} needs a clip: add --continue-from CLIP or --prepend-to CLIP.")
        if args.fit is not None and not wanted(args):
            raise UsageError(f"--fit {args.fit} needs a picture: add --first-frame FILE, for example.")
    elif args.init_video is not None:
        raise UsageError("--init-video and a clip to join to both say what the new frames are drawn from: leave out one "
                         "of them.")


def open_clip(job: Job, pipeline: AllegroPipeline) -> GivenClip | None:
    """Looks at the file of --continue-from or --prepend-to.

    Raises:
        AllegroError: it cannot be read, or holds latents of another kind of model.
    """
    args = job.args
    path = clip_path(args)
    if path is None:
        return None
    before = args.prepend_to is not None
    if Path(path).suffix.lower() == LATENTS_SUFFIX:
        latents, saved = load_latents(path)
        check_model_of(job, pipeline, path, saved)
        fps = saved.get("fps")
        return GivenClip(path, 0, before, TEMPORAL_FACTOR * int(latents.shape[2]),
                         float(fps) if isinstance(fps, int | float) else None, None, latents)
    info = probe_clip(path)
    return GivenClip(path, 0, before, 0, info.fps, info, None)


def read_given(job: Job, settings: SampleSettings, clip: GivenClip | None) -> Given:
    """Reads and fits everything that is given.

    Raises:
        AllegroError: a file cannot be read, or positions or the number of frames to keep are impossible.
    """
    args = job.args
    fit = args.fit or "crop"
    pictures = wanted(args)
    positions = [position for position, _ in pictures]
    metadata: dict[str, Any] = {}
    if pictures:
        metadata["images"] = [{"file": Path(file).name, "position": position} for position, file in pictures]
    if clip is not None:
        half = settings.num_frames // 2 // TEMPORAL_FACTOR * TEMPORAL_FACTOR
        keep = min(DEFAULT_KEEP, half) if args.keep_frames is None else args.keep_frames
        clip, ends = _read_clip(job, clip._replace(keep=keep), settings, fit)
        positions += _positions(clip, settings.num_frames)
        metadata["clip"] = {"file": Path(clip.path).name, "keep_frames": clip.keep,
                            "mode": "prepend" if clip.before else "continue"}
    else:
        ends = None
    resolved = resolve_positions(positions, settings.num_frames)
    frames = {position: fit_images(read_image(file)[None], settings.width, settings.height, fit)[0]
              for position, (_, file) in zip(resolved, pictures, strict=False)}
    if clip is not None and ends is not None:
        frames |= {position: ends[:, i] for i, position in enumerate(_positions(clip, settings.num_frames))}
    GivenFrames.at(torch.zeros(len(frames), 0), list(frames), settings.num_frames)  # a length the model can make
    if metadata:
        metadata["fit"] = fit
    return Given(frames, clip, settings, fit, args.new_part, metadata)


def _positions(clip: GivenClip, num_frames: int) -> list[int]:
    """Of the kept frames in the new clip."""
    return list(range(num_frames - clip.keep, num_frames) if clip.before else range(clip.keep))


def _read_clip(job: Job, clip: GivenClip, settings: SampleSettings, fit: str) -> tuple[GivenClip, Tensor | None]:
    """(the clip with its number of frames, the kept frames [3, keep, H, W] of a video)."""
    most = settings.num_frames - 1
    if not 1 <= clip.keep <= most:
        raise GeometryError(f"--keep-frames {clip.keep}: must be from 1 to {most}, one less than the new clip has.")
    if clip.latents is not None:
        if clip.keep % TEMPORAL_FACTOR:
            raise GeometryError(f"--keep-frames {clip.keep}: each latent frame of {clip.path} is {TEMPORAL_FACTOR} frames, so it "
                                f"must be a multiple of {TEMPORAL_FACTOR}.")
        _check_length(clip)
        return clip, None
    check_host_memory(settings)
    with (job.report.measure("reading the video", torch.device("cpu")), job.console.progress("Reading the video")):
        ends, count = _ends(clip)
    clip = clip._replace(num_frames=count)
    _check_length(clip)
    return clip, _fit(ends, settings, fit)


def _check_length(clip: GivenClip) -> None:
    if clip.keep > clip.num_frames:
        raise GeometryError(f"--keep-frames {clip.keep}: {clip.path} has only {clip.num_frames} frames. Use "
                            f"--keep-frames {clip.num_frames}, or a longer clip.")


def check_host_memory(settings: SampleSettings) -> None:
    """Raises when two clips of float32 frames do not fit into main memory.

    Raises:
        NotEnoughMemory: with what to try.
    """
    free = free_bytes(torch.device("cpu"))
    if free is not None:
        needed = 2 * frames_bytes(settings.width, settings.height, settings.num_frames)
        check_memory("Reading the video", needed, free, "fewer --frames; a smaller --width and --height")


def _ends(clip: GivenClip) -> tuple[Tensor, int]:
    """(the kept frames at the file's own size, all its frames)."""
    assert clip.info is not None
    count, held = 0, torch.empty(3, 0, clip.info.height, clip.info.width)
    for chunk in stream_frames(clip.path, clip.info):
        count += chunk.shape[1]
        if clip.before:
            held = torch.cat((held, chunk[:, : clip.keep - held.shape[1]]), dim=1)
        else:
            held = torch.cat((held, chunk), dim=1)[:, -clip.keep :]
    return held, count


def _fit(frames: Tensor, settings: SampleSettings, fit: str) -> Tensor:
    """[3, n, h, w] -> [3, n, H, W]; those of the right size stay as they are."""
    if tuple(frames.shape[2:]) == (settings.height, settings.width):
        return frames
    return fit_images((frames.transpose(0, 1) + 1) / 2, settings.width, settings.height, fit).transpose(0, 1)


def resume_given(job: Job, pipeline: AllegroPipeline, settings: SampleSettings, *, saved: Mapping[str, Any],
                 kept: Tensor | None) -> Given | None:
    """What the clip of a resumed run is joined to: --continue-from or --prepend-to, as when it was begun.

    The run itself brings everything else; without the option, the new clip is written alone.

    Args:
        job, pipeline, settings: of the run.
        saved: its metadata.
        kept: the latents it keeps, normalised; None for none.
    Raises:
        UsageError: it was not begun with such a clip, or with other latents.
        AllegroError: the clip cannot be read.
    """
    args = job.args
    before: Any = saved.get("given")
    known: Any = before.get("clip") if isinstance(before, dict) else None
    clip = open_clip(job, pipeline)
    if not isinstance(known, dict):
        if clip is not None:
            raise UsageError(f"{args.resume} was not begun with --continue-from or --prepend-to: leave that out.")
        return None
    option = "--prepend-to" if known.get("mode") == "prepend" else "--continue-from"
    if clip is None:
        if args.output is not None:
            job.console.say(f"The new part is written alone. To join it, add {option} {known.get('file')}.")
        return None
    keep = known.get("keep_frames")
    if clip.before != (option == "--prepend-to") or (clip.latents is None) != (kept is None) or type(keep) is not int:
        raise UsageError(f"{args.resume} was begun with {option} {known.get('file')}: give that again, or leave it out.")
    fit = str(before.get("fit", "crop"))
    clip, ends = _read_clip(job, clip._replace(keep=keep), settings, fit)
    frames = {} if ends is None else {p: ends[:, i] for i, p in enumerate(_positions(clip, settings.num_frames))}
    given = Given(frames, clip, settings, fit, args.new_part, {})
    now, _ = kept_latents(given)
    if kept is not None and now is not None and not torch.equal(normalise(now, pipeline.vae_config.scale_factor), kept):
        raise UsageError(f"{clip.path} does not hold the latents that {args.resume} was begun with: give {option} "
                         f"{known.get('file')} as it was then, or leave it out.")
    return given


# In the run


def given_frames(given: Given, pipeline: AllegroPipeline, *, progress: Progress | None = None) -> GivenFrames:
    """All given frames; those of latents are decoded for it."""
    s, frames = given.settings, dict(given.frames)
    if given.clip is not None and given.clip.latents is not None:
        ends = _decoded_ends(given.clip, given.clip.latents, pipeline, progress)
        frames |= {position: ends[:, i] for i, position in enumerate(_positions(given.clip, s.num_frames))}
    stacked = torch.stack(list(frames.values())) if frames else torch.zeros(0, 3, s.height, s.width)
    return GivenFrames.at(stacked, list(frames), s.num_frames)


def _decoded_ends(clip: GivenClip, latents: Tensor, pipeline: AllegroPipeline, progress: Progress | None) -> Tensor:
    """The kept frames [3, keep, H, W] of latents."""
    count = clip.keep // TEMPORAL_FACTOR + _CONTEXT
    part = latents[:, :, :count] if clip.before else latents[:, :, -count:]
    frames = torch.cat([piece[0] for piece in pipeline.decode_stream(part, progress=progress)], dim=1)
    return frames[:, : clip.keep] if clip.before else frames[:, -clip.keep :]


def kept_latents(given: Given) -> tuple[Tensor | None, int]:
    """(raw latents [1, 4, k, h, w] that the new clip shares with given ones, the latent frame where they begin)."""
    clip = given.clip
    if clip is None or clip.latents is None:
        return None, 0
    count = clip.keep // TEMPORAL_FACTOR
    if clip.before:
        return clip.latents[:, :, :count], given.settings.num_frames // TEMPORAL_FACTOR - count
    return clip.latents[:, :, -count:], 0


def join_latents(given: Given | None, latents: Tensor) -> Tensor:
    """The latents to save and decode: where latents were given, both together, the shared ones once."""
    clip = None if given is None else given.clip
    if given is None or clip is None or clip.latents is None or given.new_part:
        return latents
    count = clip.keep // TEMPORAL_FACTOR
    both = (latents[:, :, :-count], clip.latents) if clip.before else (clip.latents, latents[:, :, count:])
    return torch.cat(both, dim=2)


def joins_video(given: Given | None) -> bool:
    """Whether the new frames are joined to those of a video, which no file of latents can hold."""
    return given is not None and given.clip is not None and given.clip.latents is None


def joiner(given: Given | None) -> Through:
    """What makes the video out of the decoded pieces [3, n, H, W]."""
    clip = None if given is None else given.clip
    if given is None or clip is None:
        return iter
    if clip.latents is not None:
        return (lambda pieces: _cut(pieces, given, clip)) if given.new_part else iter
    return lambda pieces: _joined(pieces, given, clip)


def _joined(pieces: Iterable[Tensor], given: Given, clip: GivenClip) -> Iterator[Tensor]:
    """The new frames and those of a video, or the new ones alone as they would be in the joined clip."""
    old: Iterable[Tensor]
    if given.new_part:
        positions = _positions(clip, given.settings.num_frames)
        old = [torch.stack([given.frames[position] for position in positions], dim=1)]
    else:
        assert clip.info is not None
        old = (_fit(chunk, given.settings, given.fit) for chunk in stream_frames(clip.path, clip.info))
    if clip.before:
        both = join_streams(pieces, old, clip.keep, adjust="first")
    else:
        both = join_streams(old, pieces, clip.keep)
    return _cut(both, given, clip) if given.new_part else both


def _cut(pieces: Iterable[Tensor], given: Given, clip: GivenClip) -> Iterator[Tensor]:
    """A new clip without the frames it shares with the given one."""
    first = 0 if clip.before else clip.keep
    last = given.settings.num_frames - (clip.keep if clip.before else 0)
    position = 0
    for piece in pieces:
        part = piece[:, max(0, first - position) : max(0, last - position)]
        position += piece.shape[1]
        if part.shape[1]:
            yield part
