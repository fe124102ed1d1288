"""Writing clips, frame by frame, so that memory does not grow with their length."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from ..atomic import atomic_file, check_output, exists_error, publish, temporary_name, writing
from ..errors import AllegroError, NonFiniteError, OutputError
from .ffmpeg import check_encoder, check_fps, encode_error, log_text, source, start, stop
from .metadata import PNG_SIGNATURE, append_gif_comment, ffmetadata, foreign_tags, png_chunk, png_comment
from .readers import probe_contents

# The reference writes H.264 at CRF 10. VP9 counts differently: 31 is its usual value, 15 much finer.
QUALITIES: dict[str, dict[str, int]] = {
    "high": {".mp4": 10, ".webm": 15},
    "small": {".mp4": 23, ".webm": 32},
}
_ENCODERS = {".mp4": "libx264", ".webm": "libvpx-vp9", ".gif": "gif"}
FORMATS = (*_ENCODERS, ".png")
# Sound that a container takes as it is, and what other sound is encoded as.
_AUDIO_KEPT = {".mp4": ("aac", "mp3", "ac3", "eac3", "alac"), ".webm": ("opus", "vorbis")}
_AUDIO_ENCODERS = {".mp4": "aac", ".webm": "libopus"}

# Colours are converted to BT.709 in limited range and labelled so: what players assume for HD video. Without
# the label many assume BT.601 and shift every colour.
_BT709 = (
    "scale=out_color_matrix=bt709:out_range=limited:flags=bicubic+accurate_rnd+full_chroma_int,"
    "format=yuv420p,setparams=range=limited:colorspace=bt709:color_primaries=bt709:color_trc=bt709"
)
# One palette per frame: a common one would need the whole clip in memory before the first frame is written.
_PALETTE = "split[a][b];[a]palettegen=stats_mode=single[p];[b][p]paletteuse=new=1"

Sink = Callable[[np.ndarray], None]


@dataclass
class ClipWriter:
    """Takes the frames of one clip; made by `open_writer`.

    Attributes:
        width, height: pixels every frame must have.
        num_frames: frames written so far.
        files: what was written, filled when the `open_writer` block has ended.
    """

    width: int
    height: int
    sink: Sink
    num_frames: int = 0
    files: list[Path] = field(default_factory=list)

    def write(self, frames: Tensor) -> None:
        """Appends frames.

        Args:
            frames: [3, n, H, W] float in [-1, 1] on any device; values outside are clamped.
        Raises:
            NonFiniteError: a frame holds NaN or Inf.
            OutputError: the disk or ffmpeg refused.
            ValueError: the shape is not that of this clip.
        """
        if frames.ndim != 4 or frames.shape[0] != 3 or tuple(frames.shape[2:]) != (self.height, self.width):
            raise ValueError(f"frames {tuple(frames.shape)}: expected [3, n, {self.height}, {self.width}]")
        for index in range(frames.shape[1]):
            try:
                pixels = to_uint8(frames[:, index])
            except NonFiniteError as error:
                raise NonFiniteError(f"Frame {self.num_frames}: {error}") from error
            self.sink(pixels)
            self.num_frames += 1


def to_uint8(frame: Tensor) -> np.ndarray:
    """One picture as bytes, rounded to the nearest level.

    Args:
        frame: [3, H, W] float in [-1, 1].
    Returns:
        [H, W, 3] uint8.
    Raises:
        NonFiniteError: NaN or Inf, which would be written as arbitrary pixels.
    """
    frame = frame.detach().float()
    if not bool(torch.isfinite(frame).all()):
        raise NonFiniteError("the decoder produced NaN or Inf. Check that the weights are intact: allegro inspect MODEL.")
    levels = (frame + 1.0).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8)
    return levels.permute(1, 2, 0).contiguous().cpu().numpy()


def check_clip_output(path: str | os.PathLike[str], *, force: bool) -> Path:
    """Raises unless a clip could be written to `path` now: extension, folder, existing file, encoder.

    Raises:
        OutputError: says what is wrong.
        MissingDependency: there is no ffmpeg.
    """
    path = Path(path)
    extension = path.suffix.lower()
    if extension not in FORMATS:
        found = f"the extension {path.suffix}" if path.suffix else "no extension"
        raise OutputError(f"Cannot write {path}: {found} is not a known format. Use one of "
                          f"{', '.join(FORMATS)}.")
    if extension != ".png":
        check_encoder(_ENCODERS[extension], extension)
        return check_output(path, force=force)
    taken = _numbered(path)
    if taken and not force:
        raise exists_error(taken[0])
    check_output(_picture(path, 0), force=force)
    return path


def parse_quality(quality: str | int, extension: str) -> int:
    """The constant rate factor for a named or numbered quality; 0 where a format has none.

    Raises:
        AllegroError: an unknown name, or a number outside 0...51 (.mp4) or 0...63 (.webm).
    """
    highest = {".mp4": 51, ".webm": 63}.get(extension)
    if highest is None:
        return 0
    if quality in QUALITIES:
        return QUALITIES[str(quality)][extension]
    if str(quality).isdecimal() and int(quality) <= highest:
        return int(quality)
    raise AllegroError(f"quality={quality}: for {extension} use {', '.join(QUALITIES)} or a rate factor from "
                       f"0 (best) to {highest} (smallest).")


def keeps_audio(path: str | os.PathLike[str]) -> bool:
    """Whether the format of a clip can have sound."""
    return Path(path).suffix.lower() in _AUDIO_KEPT


@contextmanager
def open_writer(path: str | os.PathLike[str], width: int, height: int, *, fps: float,
                metadata: Mapping[str, Any] | None = None, quality: str | int = "high",
                force: bool = False, origin: Path | None = None) -> Iterator[ClipWriter]:
    """Opens a clip for writing; it appears under its name when the block ends well, and not at all otherwise.

    Example::

        with open_writer("clip.mp4", 640, 368, fps=15, metadata={"seed": 1}) as writer:
            for frames in vae.decode_stream(latents):  # [1, 3, n, H, W]
                writer.write(frames[0])

    Args:
        path: the extension chooses the format. .mp4: H.264, 4:2:0; an odd width or height gains one repeated
            column or row. .webm: VP9, 4:2:0. .gif: 256 colours per frame, endless. .png: one lossless picture
            per frame; `clip.png` becomes `clip_00000.png`, `clip_00001.png`, ...
        width, height: pixels.
        fps: frames per second.
        metadata: JSON-able settings to keep inside the file; see `read_metadata`.
        quality: "high" (the reference's), "small", or a constant rate factor. .gif and .png have only one.
        force: an existing file may be replaced; with .png, every numbered picture of that name is.
        origin: a clip whose first sound and whose tags of other programs a .mp4 or .webm gets; sound as it is where
            the format takes it, else encoded anew.
    Raises:
        OutputError: see `check_clip_output`; or the disk or ffmpeg refused; or no frame was written.
        AllegroError: `fps` or `quality` is not a possible one.
        MissingDependency: there is no ffmpeg.
    """
    check_fps(fps)
    path = check_clip_output(path, force=force)
    writer = ClipWriter(width, height, _refuse)
    if path.suffix.lower() == ".png":
        opened = _pictures(path, metadata or {}, force=force)
    else:
        arguments = _format_arguments(path.suffix.lower(), parse_quality(quality, path.suffix.lower()))
        opened = _encoded(path, writer, fps, metadata or {}, arguments, origin, force=force)
    with opened as writer.sink:
        yield writer
        if not writer.num_frames:
            raise OutputError(f"Cannot write {path}: there is no frame to write.")
    writer.sink = _refuse
    writer.files = _numbered(path) if path.suffix.lower() == ".png" else [path]


def _refuse(pixels: np.ndarray) -> None:
    raise ValueError("this clip is not open")


# Through ffmpeg


@contextmanager
def _encoded(path: Path, clip: ClipWriter, fps: float, metadata: Mapping[str, Any], arguments: list[str],
             origin: Path | None, *, force: bool) -> Iterator[Sink]:
    """A sink that feeds ffmpeg, which writes a temporary beside `path`."""
    extension = path.suffix.lower()
    odd = (clip.height % 2, clip.width % 2) if extension == ".mp4" else (0, 0)
    with (atomic_file(path, force=force) as temporary, tempfile.TemporaryDirectory() as scratch,
          tempfile.TemporaryFile() as log):
        notes = Path(scratch, "metadata.txt")
        tags = foreign_tags(origin) if origin is not None and extension in _AUDIO_KEPT else ""
        notes.write_text(ffmetadata(metadata) + tags, encoding="utf-8")
        process = start([
            "-v", "error", "-y",
            "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{clip.width + odd[1]}x{clip.height + odd[0]}",
            "-r", str(Fraction(fps).limit_denominator(100_000)), "-i", "pipe:0",
            "-f", "ffmetadata", "-i", str(notes), *(source(origin) if origin else []), "-map", "0:v", "-map_metadata", "1",
            *(_audio_arguments(origin, extension) if origin else []), *arguments,
            *(["-movflags", "+faststart+use_metadata_tags"] if tags and extension == ".mp4" else []), f"file:{temporary}",
        ], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=log)
        try:
            yield partial(_feed, process, path, log, odd)
            _finish(process, path, log)
        finally:
            stop(process)
        if extension == ".gif":
            with writing(path):
                append_gif_comment(temporary, metadata)


def _format_arguments(extension: str, crf: int) -> list[str]:
    if extension == ".gif":
        return ["-vf", _PALETTE, "-loop", "0", "-f", "gif"]
    colours = ["-vf", _BT709, "-color_range", "tv", "-colorspace", "bt709", "-color_primaries", "bt709",
               "-color_trc", "bt709"]
    if extension == ".mp4":
        # faststart puts the index first, so that a browser can play while it loads.
        return [*colours, "-c:v", "libx264", "-crf", str(crf), "-movflags", "+faststart", "-f", "mp4"]
    if extension == ".webm":
        return [*colours, "-c:v", "libvpx-vp9", "-crf", str(crf), "-b:v", "0", "-deadline", "good",
                "-cpu-used", "4", "-row-mt", "1", "-f", "webm"]
    raise OutputError(f"{extension} is not a known format. Use one of {', '.join(FORMATS)}.")


def _audio_arguments(origin: Path, extension: str) -> list[str]:
    """Takes the first sound of the third input, if it has one and the format can have one."""
    codec = probe_contents(origin).audio
    if codec is None or extension not in _AUDIO_KEPT:
        return []
    return ["-map", "2:a:0", "-c:a", "copy" if codec in _AUDIO_KEPT[extension] else _AUDIO_ENCODERS[extension]]


def _feed(process: subprocess.Popen[bytes], path: Path, log: IO[bytes], odd: tuple[int, int],
          pixels: np.ndarray) -> None:
    """Hands one picture to ffmpeg."""
    assert process.stdin is not None
    if any(odd):
        pixels = np.pad(pixels, ((0, odd[0]), (0, odd[1]), (0, 0)), mode="edge")
    try:
        process.stdin.write(pixels.tobytes())
    except OSError as error:  # it is gone; its log says why
        raise encode_error(path, process.wait(), log_text(log)) from error


def _finish(process: subprocess.Popen[bytes], path: Path, log: IO[bytes]) -> None:
    """Ends the input and waits until the file is complete."""
    assert process.stdin is not None
    try:
        process.stdin.close()
    except OSError as error:
        raise encode_error(path, process.wait(), log_text(log)) from error
    if process.wait():
        raise encode_error(path, process.returncode, log_text(log))


# Numbered pictures


def _picture(path: Path, index: int) -> Path:
    return path.with_name(f"{path.stem}_{index:05d}{path.suffix}")


def _numbered(path: Path) -> list[Path]:
    """The numbered pictures of `path` that exist, in order."""
    if not path.parent.is_dir():
        return []
    name = re.compile(re.escape(path.stem) + r"_\d{5}" + re.escape(path.suffix))
    return sorted(file for file in path.parent.iterdir() if name.fullmatch(file.name))


@contextmanager
def _pictures(path: Path, metadata: Mapping[str, Any], *, force: bool) -> Iterator[Sink]:
    """A sink that writes pictures into a temporary folder and moves them out at the end."""
    folder = temporary_name(path)
    with writing(path):
        folder.mkdir()
    files: list[Path] = []

    def sink(pixels: np.ndarray) -> None:
        file = folder / _picture(path, len(files)).name
        with writing(path):
            file.write_bytes(encode_png(pixels, metadata))
        files.append(file)

    try:
        yield sink
        _publish_pictures(files, path, force=force)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _publish_pictures(files: list[Path], path: Path, *, force: bool) -> None:
    """Gives the pictures their names: all of them, or none that was not there before."""
    old = _numbered(path)
    if old and not force:
        raise exists_error(old[0])
    done: list[Path] = []
    try:
        for file in files:
            target = path.with_name(file.name)
            publish(file, target, force=force)
            done.append(target)
    except BaseException:
        for target in set(done).difference(old):
            target.unlink(missing_ok=True)
        raise
    for stale in set(old).difference(done):  # the end of a longer clip that was replaced
        stale.unlink()


def encode_png(pixels: np.ndarray, metadata: Mapping[str, Any]) -> bytes:
    """A PNG file: 8-bit RGB, each row stored as its difference to the row above.

    Args:
        pixels: [H, W, 3] uint8.
        metadata: settings for the text chunk.
    Source: the PNG specification (W3C, third edition), sections 5, 9.2 and 11.
    """
    height, width, _ = pixels.shape
    rows = pixels.reshape(height, width * 3)
    up = rows.copy()
    up[1:] -= rows[:-1]  # modulo 256, as the filter asks
    filtered = np.concatenate([np.full((height, 1), 2, np.uint8), up], axis=1)
    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0])
    return (PNG_SIGNATURE + png_chunk(b"IHDR", header) + png_chunk(b"sRGB", b"\0") + png_comment(metadata)
            + png_chunk(b"IDAT", zlib.compress(filtered.tobytes(), 6)) + png_chunk(b"IEND", b""))
