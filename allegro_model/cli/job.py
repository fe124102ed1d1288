"""What all commands share: checks before the work starts, opening the model, writing clips and latents."""

from __future__ import annotations

import argparse
import hashlib
import shlex
import signal
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import __version__
from ..atomic import writing
from ..config import fingerprint
from ..errors import AllegroError, CheckpointError, GeometryError, OutputError
from ..latents import read_latents
from ..loading import bundled_models, lora_file, read_header
from ..loading.released import how_to_get_folder
from ..media import (
    atomic_file,
    check_clip_output,
    check_fps,
    check_free_space,
    check_output,
    open_writer,
    parse_quality,
)
from ..pipeline import AllegroPipeline, check_finite
from ..vae import Tiling
from .base import Job
from .parser import BUNDLED
from .report import UsageError

LATENTS_SUFFIX = ".safetensors"
# For each pixel: an unfinished run holds two tensors of 4 channels, float32, for every 4 x 8 x 8 pixels.
_LATENT_BYTES = 2 * 4 * 4 / 256

Through = Callable[[Iterable[Tensor]], Iterable[Tensor]]


# Before the work


def load_latents(path: str) -> tuple[Tensor, dict[str, Any]]:
    """Raw latents [1, 4, t, h, w] of one video, and the metadata beside them.

    Raises:
        UnsupportedCheckpoint: see `read_latents`.
        GeometryError: a batch, or nothing.
        NonFiniteError: NaN or Inf.
    """
    latents, saved = read_latents(path)
    if latents.shape[0] != 1 or 0 in latents.shape:
        raise GeometryError(f"{path} holds latents of shape {list(latents.shape)}: expected one video, "
                            "[1, 4, frames, height, width]. Save each video of a batch in its own file.")
    check_finite(latents, path)
    return latents, saved


def check_latents_output(job: Job, path: str) -> Path:
    """Raises unless latents could be written to `path`.

    Raises:
        OutputError: another extension; or see `check_output`.
    """
    if Path(path).suffix.lower() != LATENTS_SUFFIX:
        raise OutputError(f"Cannot write {path}: latents are kept in {LATENTS_SUFFIX} files. Choose such a "
                          "name.")
    return check_output(path, force=job.force)


def check_clip(job: Job) -> Path:
    """Raises unless a clip could be written to --output.

    Raises:
        UsageError: there is no --output.
        OutputError, MissingDependency: see `check_clip_output`.
        AllegroError: --fps or --quality is not a possible one.
    """
    if job.args.output is None:
        raise UsageError("Say where the video goes: --output clip.mp4.")
    path = check_clip_output(job.args.output, force=job.force)
    parse_quality(job.args.quality, path.suffix.lower())
    if job.args.fps is not None:
        check_fps(job.args.fps)
    return path


def check_clip_space(path: Path, width: int, height: int, num_frames: int) -> None:
    """Raises when the disk has no room for a clip of this size and its latents.

    Raises:
        OutputError: names what is needed and what is left.
    """
    check_free_space(path, clip_bytes(path.suffix, width, height, num_frames) + int(width * height * num_frames * _LATENT_BYTES))


def clip_bytes(suffix: str, width: int, height: int, num_frames: int) -> int:
    """What a clip takes on a disk: a generous guess at compressed bytes per pixel."""
    return int(width * height * num_frames * (1.5 if suffix.lower() == ".png" else 0.3))


def check_latents_space(path: Path, width: int, height: int, num_frames: int) -> None:
    """Raises when the disk has no room for a run of this size.

    Raises:
        OutputError: names what is needed and what is left.
    """
    check_free_space(path, int(width * height * num_frames * _LATENT_BYTES))


def check_device(name: str) -> None:
    """Raises unless PyTorch can use the device.

    Raises:
        AllegroError: names devices that work.
    """
    if name == "auto":
        return
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
        usable = device.type != "meta"
    except (RuntimeError, AssertionError):  # an unknown name; a build without it, or no such hardware
        usable = False
    if not usable:
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        choices = f"auto, cpu or {found.type}" if found else "auto or cpu"
        raise AllegroError(f"--device {name}: PyTorch {torch.__version__} cannot use it here. Use {choices}, "
                           "or install a PyTorch built for it.")


def open_model(job: Job) -> AllegroPipeline:
    """Opens --model; reads no weights.

    Raises:
        CheckpointError: there is no such model folder.
        AllegroError: the device cannot be used, or the tile settings are illegal.
    """
    args = job.args
    check_device(args.device)
    model = args.model or BUNDLED
    if model not in bundled_models() and not Path(model).is_dir():
        raise CheckpointError(f"--model {model}: there is no such folder. Give a model folder, with transformer/, vae/, "
                              f"text_encoder/ and tokenizer/ in it, or a bundled model: {', '.join(bundled_models())}. "
                              f"{how_to_get_folder()}")
    dtype = getattr(args, "dtype", "auto")
    pipeline = AllegroPipeline.from_pretrained(model, device=args.device, dtype=dtype,
                                               loras=getattr(args, "lora", ()),
                                               transformer=getattr(args, "transformer", None),
                                               attention=getattr(args, "attention", "auto"),
                                               compile_blocks=getattr(args, "compile", False),
                                               offload=getattr(args, "offload", "auto"),
                                               prompt_cache=getattr(args, "prompt_cache", None))
    pipeline.tiling = _tiling(args, pipeline)
    job.report.facts["model"] = model_name(job)
    job.report.facts["device"] = str(pipeline.device)
    return pipeline


def model_name(job: Job) -> str:
    """Name of the model, to be kept in files: the folder's own, since its path is nobody else's business."""
    model = job.args.model or BUNDLED
    return model if model in bundled_models() else Path(model).resolve().name


def transformer_name(job: Job) -> str | None:
    """Name of --transformer, to be kept in files, or None: that of the file, or of the model's folder."""
    if getattr(job.args, "transformer", None) is None:
        return None
    path = Path(job.args.transformer).resolve()
    return path.parent.name if path.name == "transformer" else path.name


def describe_model(job: Job, pipeline: AllegroPipeline, *, transformer: bool = True) -> dict[str, Any]:
    """The model, to be kept in files: its name, and hashes by which `check_model_of` knows it.

    Args:
        transformer: the file depends on that, too, not on the VAE alone.
    """
    hashes = {"vae": fingerprint(pipeline.vae_config)}
    if transformer:
        hashes["transformer"] = fingerprint(pipeline.dit_config)
    return {"model": model_name(job), "model_hash": hashes}


def check_model_of(job: Job, pipeline: AllegroPipeline, path: str, saved: Mapping[str, Any], *,
                   transformer: bool = False) -> None:
    """Raises when a file was made with another kind of model, whose latents mean something else.

    Args:
        path: of the file.
        saved: its metadata; a file that names no model (ComfyUI's) is taken as it is, one without hashes (of an
            earlier version) is judged by the name.
        transformer: the transformer must be the same, too, not only the VAE.
    Raises:
        UsageError: names both models.
    """
    name, known = saved.get("model"), saved.get("model_hash")
    if isinstance(known, dict):
        found = describe_model(job, pipeline, transformer=transformer)["model_hash"]
        fits = all(known.get(part) in (None, value) for part, value in found.items())
    else:
        fits = name in (None, model_name(job))
    if not fits:
        hint = ("leave out --model" if name == BUNDLED else f"give --model {name}" if name in bundled_models() else
                f"give the folder of {name} with --model")
        raise UsageError(f"{path} was made with the model {name}, not {model_name(job)}: {hint}.")


def describe_loras(job: Job) -> list[dict[str, Any]]:
    """The LoRAs of the run, to be kept in files: name, strength, and a hash of the content (the first digits of
    SHA-256), since a name says nothing about that.

    Raises:
        CheckpointError: a file is missing, or cannot be read.
    """
    described = []
    for path, strength in job.args.lora:
        digest = hashlib.sha256()
        for part in read_header(lora_file(path)).files:
            with part.open("rb") as file:
                while block := file.read(2**20):
                    digest.update(block)
        described.append({"name": lora_file(path).name, "strength": strength, "hash": digest.hexdigest()[:10]})
    return described


def lora_options(loras: Iterable[tuple[str, float]]) -> str:
    """As they are written on a command line, each with a space in front."""
    return "".join(f" --lora {shlex.quote(f'{name}:{strength}')}" for name, strength in loras)


def check_loras_of(path: str, saved: Mapping[str, Any], loras: list[dict[str, Any]]) -> None:
    """Raises when a run was begun with other LoRAs.

    Args:
        path: of the file.
        saved: its metadata.
        loras: those of this run, from `describe_loras`.
    Raises:
        UsageError: names both.
    """
    before = saved.get("loras", [])
    keys = {"name": str, "strength": float, "hash": str}
    if not isinstance(before, list) or not all(
            isinstance(lora, dict) and {key: type(lora.get(key)) for key in keys} == keys for lora in before):
        raise UsageError(f"{path} holds no usable list of LoRAs: {before!r}. The file is damaged; start the run again.")
    if [(lora["hash"], lora["strength"]) for lora in before] == [(lora["hash"], lora["strength"]) for lora in loras]:
        return
    wanted, given = (", ".join(f"{lora['name']}:{lora['strength']} ({lora['hash']})" for lora in which) or "no LoRA"
                     for which in (before, loras))
    hint = f"give{lora_options((lora['name'], lora['strength']) for lora in before)}" if before else "leave out --lora"
    raise UsageError(f"{path} was made with {wanted}, not with {given}: {hint}. In brackets, a hash of the file.")


def _tiling(args: argparse.Namespace, pipeline: AllegroPipeline) -> Tiling | None:
    """--tile, --overlap and --tiles-per-batch; None when none is given, which means the model's own."""
    if args.tile is None and args.overlap is None and args.tiles_per_batch is None:
        return None
    own = Tiling.from_config(pipeline.vae_config)
    tile = args.tile or (own.tile_frames, own.tile_height, own.tile_width)
    overlap = args.overlap or (own.overlap_frames, own.overlap_height, own.overlap_width)
    if args.tile is not None and args.overlap is None:
        # The model's overlap may be nearly all of a smaller tile, which would need thousands of them.
        overlap = tuple(min(most, size // 2 // multiple * multiple)
                        for most, size, multiple in zip(overlap, tile, (4, 8, 8), strict=True))
    return Tiling(tile[0], tile[1], tile[2], overlap[0], overlap[1], overlap[2], args.tiles_per_batch)


def choose_fps(given: float | None, saved: Mapping[str, Any], pipeline: AllegroPipeline) -> float:
    """Frames per second: --fps, else what the latents were saved with, else what the model was made for.

    Raises:
        AllegroError: not a possible rate.
    """
    stored = saved.get("fps")
    if given is None and isinstance(stored, int | float):
        given = float(stored)
    fps = pipeline.defaults.fps if given is None else given
    check_fps(fps)
    return fps


def base_metadata() -> dict[str, Any]:
    """What every file we write says about its origin."""
    return {"version": __version__}


# The results


def write_bytes(path: Path, data: bytes, *, force: bool) -> None:
    """Writes a file, completely or not at all.

    Raises:
        OutputError: see `atomic_file`.
    """
    with atomic_file(path, force=force) as temporary, writing(path):
        temporary.write_bytes(data)


def write_clip(job: Job, pipeline: AllegroPipeline, latents: Tensor, path: Path, *, fps: float,
               metadata: Mapping[str, Any], through: Through = iter) -> None:
    """Decodes raw latents [1, 4, t, h, w] straight into a clip.

    Args:
        fps: frames per second of the clip.
        metadata: kept in it.
        through: what the frames, [3, n, H, W] a few at a time, go through on their way.
    Raises:
        OutputError: the clip cannot be written.
        NonFiniteError: NaN or Inf in the frames.
    """
    height, width = (8 * int(cells) for cells in latents.shape[3:])
    with (job.report.measure("decoding", pipeline.device), job.console.progress("Decoding", "tile") as bar,
          open_writer(path, width, height, fps=fps, metadata=metadata, quality=job.args.quality,
                      force=job.force) as writer):
        for frames in through(frames[0] for frames in pipeline.decode_stream(latents, progress=bar.update)):
            writer.write(frames)
    job.report.facts["output"] = [str(file) for file in writer.files]
    job.report.facts["frames"] = writer.num_frames
    last = f" ... {writer.files[-1].name}" if len(writer.files) > 1 else ""
    job.say_result(f"{writer.files[0]}{last}")


def keep_latents(job: Job, data: bytes, *, wanted: Path | None, beside: Path) -> Path | None:
    """Saves latents, or an unfinished run, when something went wrong: a second Ctrl-C does not stop it.

    Never raises because of a disk: the error that led here is the one to show.

    Args:
        data: the file.
        wanted: where the user asked for it.
        beside: what the file is put beside if it cannot be there, as NAME.latents.safetensors; if this disk
            refuses too, it goes to the folder of temporary files.
    Returns:
        where it is; None if nobody took it, which a remark then says.
    """
    name = f"{beside.stem}.latents{LATENTS_SUFFIX}"
    # In this order, each only looked at when those before it have failed.
    places: list[tuple[Callable[[], Path], bool]] = [
        (lambda: _free_name(beside.parent / name), False),
        (lambda: _free_name(Path(tempfile.gettempdir()) / name), False)]
    if wanted is not None:
        places.insert(0, (lambda: wanted, job.force))
    failures = []
    with _uninterrupted():
        for find, force in places:
            try:
                path = find()
                write_bytes(path, data, force=force)
            except (OutputError, OSError) as error:
                failures.append(f"The latents could not be kept: {error}")
            else:
                return path
    job.remarks.extend(failures)
    return None


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ignores Ctrl-C and requests to end for the moment."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            # None: a handler that Python did not install and cannot put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _free_name(path: Path) -> Path:
    """`path`, or the first of `name-1`, `name-2`, ... that is free."""
    candidates = (path if n == 0 else path.with_name(f"{path.stem}-{n}{path.suffix}") for n in count())
    return next(candidate for candidate in candidates if not candidate.exists())
