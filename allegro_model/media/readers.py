"""Frames out of any video ffmpeg can play."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from os import PathLike
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from ..errors import AllegroError
from .ffmpeg import check_fps, log_text, run, source, start, stop


@dataclass(frozen=True)
class ClipInfo:
    """What a video delivers, or should be turned into: pixels and frames per second."""

    width: int
    height: int
    fps: float


def probe_clip(path: str | PathLike[str]) -> ClipInfo:
    """Size and frame rate of a video.

    Raises:
        AllegroError: the file is missing or ffmpeg cannot play it.
        MissingDependency: there is no ffmpeg.
    """
    return _probe(Path(path), "video")


def _probe(path: Path, what: str) -> ClipInfo:
    if not path.is_file():
        raise AllegroError(f"There is no {what} {path}. Check the path.")
    # The first line of a yuv4mpegpipe stream states size and exact rate: "YUV4MPEG2 W640 H368 F15:1 ...".
    status, output, log = run(["-v", "error", *source(path), "-map", "0:v:0", "-frames:v", "1",
                               "-pix_fmt", "yuv420p", "-f", "yuv4mpegpipe", "-"])
    if status or not output.startswith(b"YUV4MPEG2 "):
        raise _read_error(path, log, what)
    fields = {word[0]: word[1:] for word in output.split(b"\n", 1)[0].decode("ascii").split()[1:]}
    rate = Fraction(fields["F"].replace(":", "/"))
    return ClipInfo(int(fields["W"]), int(fields["H"]), float(rate))


@dataclass(frozen=True)
class ClipContents:
    """What a video says of itself, which may be wrong or missing.

    Attributes:
        seconds: its duration, None if unknown.
        audio: the codec of its first sound, e.g. "aac"; None if there is none.
    """

    seconds: float | None
    audio: str | None


def probe_contents(path: str | PathLike[str]) -> ClipContents:
    """Duration and sound of a video.

    Raises:
        MissingDependency: there is no ffmpeg.
    """
    _, _, log = run(source(Path(path)))  # ends with the complaint that there is no output, after a description
    duration = re.search(r"^ *Duration: (\d+):(\d+):(\d+\.?\d*)", log, re.MULTILINE)
    audio = re.search(r"^ *Stream #0:\d+.*?: Audio: (\w+)", log, re.MULTILINE)
    seconds = sum(float(n) * unit for n, unit in zip(duration.groups(), (3600, 60, 1), strict=True)) if duration else None
    return ClipContents(seconds, audio[1] if audio else None)


def stream_frames(path: str | PathLike[str], target: ClipInfo, *, max_frames: int | None = None,
                  chunk_frames: int = 8) -> Iterator[Tensor]:
    """Frames of a video in order, a few at a time.

    Args:
        target: wanted size and rate. A video of another shape is scaled to cover the size and cropped to its
            centre; one of another rate has frames dropped or repeated.
        max_frames: stop after so many.
        chunk_frames: frames per piece.
    Yields:
        [3, n, H, W] float32 in [-1, 1], n at most `chunk_frames`.
    Raises:
        AllegroError: the file cannot be played, or ends within a frame.
    """
    path = Path(path)
    limit = [] if max_frames is None else ["-frames:v", str(max_frames)]
    with tempfile.TemporaryFile() as log:
        process = start(["-v", "error", *source(path), "-map", "0:v:0", "-vf", _filters(target), *limit,
                         "-pix_fmt", "rgb24", "-f", "rawvideo", "-"],
                        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log)
        assert process.stdout is not None
        try:
            yield from _chunks(process.stdout, target, chunk_frames, path)
            process.stdout.close()
            if process.wait():
                raise _read_error(path, log_text(log))
        finally:
            stop(process)
            process.stdout.close()


def _filters(target: ClipInfo) -> str:
    size = f"{target.width}:{target.height}"
    rate = Fraction(target.fps).limit_denominator(100_000)
    return (f"fps={rate},scale={size}:force_original_aspect_ratio=increase"
            f":flags=bicubic+accurate_rnd+full_chroma_int,crop={size}")


def _chunks(stream: IO[bytes], target: ClipInfo, chunk_frames: int, path: Path) -> Iterator[Tensor]:
    frame_bytes = target.width * target.height * 3
    while data := stream.read(frame_bytes * chunk_frames):
        count, rest = divmod(len(data), frame_bytes)
        if rest:
            raise AllegroError(f"The video {path} ends within a frame. The file is damaged; use another one.")
        # A copy, since bytes are read-only and torch would warn about sharing them.
        pixels = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        pixels = pixels.view(count, target.height, target.width, 3)
        yield pixels.permute(3, 0, 1, 2).float().div_(127.5).sub_(1.0)


def read_frames(path: str | PathLike[str], *, width: int | None = None, height: int | None = None,
                fps: float | None = None, max_frames: int | None = None) -> tuple[Tensor, float]:
    """A whole video, or its beginning, as one tensor.

    Args:
        width, height: wanted pixels; see `stream_frames`. None: as in the file.
        fps: wanted frames per second. None: as in the file.
        max_frames: read at most so many.
    Returns:
        (frames [3, T, H, W] float32 in [-1, 1], frames per second).
    Raises:
        AllegroError: the file is missing, cannot be played or holds no frame; or `fps` is no possible rate.
        MissingDependency: there is no ffmpeg.
    """
    found = probe_clip(path)
    target = ClipInfo(width or found.width, height or found.height, found.fps if fps is None else fps)
    check_fps(target.fps)
    chunks = list(stream_frames(path, target, max_frames=max_frames))
    if not chunks:
        raise AllegroError(f"The video {path} holds no frame. Use another one.")
    return torch.cat(chunks, dim=1), target.fps


def read_image(path: str | PathLike[str]) -> Tensor:
    """One picture; of a video, its first frame.

    Args:
        path: .png, .jpg, .webp, ... of any size; grey, with a palette or with alpha. It is turned upright when
            the camera noted how it was held.
    Returns:
        [4, h, w] float32 in [0, 1], red, green, blue and alpha.
    Raises:
        AllegroError: the file is missing or ffmpeg cannot read it.
        MissingDependency: there is no ffmpeg.
    """
    path = Path(path)
    found = _probe(path, "picture")
    status, output, log = run(["-v", "error", *source(path), "-map", "0:v:0", "-frames:v", "1", "-vf",
                               "scale=iw:ih:flags=bicubic+accurate_rnd+full_chroma_int,format=rgba", "-f", "rawvideo", "-"])
    if status or len(output) != found.width * found.height * 4:
        raise _read_error(path, log, "picture")
    pixels = torch.frombuffer(bytearray(output), dtype=torch.uint8).view(found.height, found.width, 4)
    return pixels.permute(2, 0, 1).float().div_(255)


def _read_error(path: Path, log: str, what: str = "video") -> AllegroError:
    lines = [line for line in log.splitlines() if line.strip()]
    said = f" (ffmpeg: {lines[-1]})" if lines else ""
    remedy = {"video": "plays in a video player", "picture": "opens in a picture viewer"}[what]
    return AllegroError(f"Cannot read {path} as a {what}{said}. Use a file that {remedy}.")
