"""Finding and running ffmpeg."""

from __future__ import annotations

import errno
import subprocess
import tempfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import IO

from ..atomic import write_error
from ..errors import AllegroError, MissingDependency, OutputError

# Phrases ffmpeg prints for a refused write, and the error number that means the same.
_REFUSALS = {
    "no space left on device": errno.ENOSPC,
    "disk quota exceeded": errno.EDQUOT,
    "file too large": errno.EFBIG,
    "read-only file system": errno.EROFS,
    "permission denied": errno.EACCES,
}
_SIGXFSZ = 25  # how Linux and macOS end a program whose file grew over the account's limit


def check_fps(fps: float) -> None:
    """Raises unless `fps` frames per second can be written and read.

    Raises:
        AllegroError: NaN, 0, negative or above 1000.
    """
    if not 0 < fps <= 1000:
        raise AllegroError(f"fps={fps}: must be above 0 and at most 1000 frames per second; the released "
                           "models were made for 15.")


def ffmpeg_exe() -> str:
    """Path of the ffmpeg program that imageio-ffmpeg brings or finds.

    Raises:
        MissingDependency: imageio-ffmpeg is not installed, or there is no ffmpeg for this machine.
    """
    try:
        import imageio_ffmpeg
    except ImportError as error:
        raise MissingDependency(
            "Reading and writing videos needs the package imageio-ffmpeg, which is not installed. Install it "
            'with: pip install "allegro-video[standalone]". Numbered .png pictures work without it.'
        ) from error
    try:
        return str(imageio_ffmpeg.get_ffmpeg_exe())
    except RuntimeError as error:
        raise MissingDependency(
            "imageio-ffmpeg found no ffmpeg program for this machine. Install ffmpeg, or set "
            "IMAGEIO_FFMPEG_EXE to its path. Numbered .png pictures work without it."
        ) from error


def start(arguments: Sequence[str], *, stdin: int, stdout: int, stderr: IO[bytes]) -> subprocess.Popen[bytes]:
    """Starts ffmpeg with fixed arguments, no shell, and out of reach of the terminal's Ctrl-C.

    Ctrl-C must reach Python alone: it decides what happens to the half-written file.

    Raises:
        MissingDependency: the program is missing or cannot be started.
    """
    exe = ffmpeg_exe()
    flags = getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)
    try:
        return subprocess.Popen([exe, "-hide_banner", "-nostats", *arguments], stdin=stdin, stdout=stdout,
                                stderr=stderr, start_new_session=True, creationflags=flags)
    except OSError as error:
        raise MissingDependency(
            f"The ffmpeg program {exe} cannot be started ({error.strerror}). Reinstall imageio-ffmpeg, or "
            "set IMAGEIO_FFMPEG_EXE to a working ffmpeg."
        ) from error


def source(path: Path) -> list[str]:
    """Arguments that open `path` as a local file, whatever its name looks like, and follow no link in it."""
    return ["-protocol_whitelist", "file", "-i", f"file:{path}"]


def run(arguments: Sequence[str]) -> tuple[int, bytes, str]:
    """Runs ffmpeg to its end.

    Returns:
        (exit status, standard output, standard error as text).
    """
    with tempfile.TemporaryFile() as log:
        process = start(arguments, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log)
        try:
            output, _ = process.communicate()
        finally:
            stop(process)
        return process.returncode, output, log_text(log)


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ends a process that may still run; harmless when it has ended."""
    if process.poll() is None:
        process.kill()
        process.wait()


def log_text(log: IO[bytes]) -> str:
    """What ffmpeg has written into its log file so far."""
    log.seek(0)
    return log.read().decode("utf-8", "replace").strip()


@lru_cache(maxsize=4)
def _encoders(exe: str) -> frozenset[str]:
    """Names of the encoders of one ffmpeg program."""
    _, output, _ = run(["-encoders"])
    rows = (line.split() for line in output.decode("utf-8", "replace").splitlines())
    return frozenset(row[1] for row in rows if len(row) > 1)


def check_encoder(encoder: str, extension: str) -> None:
    """Raises when the ffmpeg in use cannot encode with `encoder`.

    Raises:
        OutputError: names the encoder and formats that may work.
        MissingDependency: there is no ffmpeg.
    """
    exe = ffmpeg_exe()
    if encoder not in _encoders(exe):
        raise OutputError(f"Cannot write {extension}: the ffmpeg at {exe} has no encoder {encoder}. Choose "
                          ".gif or .png, or use the ffmpeg that imageio-ffmpeg brings (unset "
                          "IMAGEIO_FFMPEG_EXE).")


def encode_error(path: Path, status: int, log: str) -> OutputError:
    """The error to raise when ffmpeg stopped while writing `path`.

    Args:
        status: its exit status, negative for a signal.
        log: what it wrote to standard error.
    """
    if status == -_SIGXFSZ:
        return write_error(path, OSError(errno.EFBIG, ""))
    for phrase, number in _REFUSALS.items():
        if phrase in log.lower():
            return write_error(path, OSError(number, phrase))
    lines = [line for line in log.splitlines() if line.strip()]
    said = lines[0] if lines else f"it ended with status {status}"
    return OutputError(f"Cannot write {path}: ffmpeg failed: {said}. Try another format (.mp4, .webm, .gif, "
                       ".png).")
