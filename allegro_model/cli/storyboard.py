"""`allegro generate --storyboard`: one clip per prompt, each going on from the one before, as one video."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..errors import TextError
from ..text import read_storyboard
from .job import LATENTS_SUFFIX, Job, check_clip, check_latents_output, open_model
from .plan import DEFAULT_SEED
from .report import UsageError

# What would mean something else for each clip.
_SINGLE = ("prompt", "last_frame", "loop", "prepend_to", "init_video", "stop_at_step", "resume", "new_part")
# What only the first clip starts from.
_FIRST: dict[str, Any] = {"first_frame": None, "keyframe": [], "fit": None}


def draw_storyboard(job: Job, draw: Callable[..., None]) -> None:
    """Draws clip after clip. The latents of all so far are on disk after each, and at the end only those.

    Args:
        draw: makes the clip that `job.args` asks for; with write=False its latents only.
    Raises:
        AllegroError: see the exit codes.
    """
    args = job.args
    job.report.stage = "checking"
    given = [name for name in _SINGLE if getattr(args, name) not in (None, False)]
    if given:
        options = ", ".join("PROMPT" if name == "prompt" else "--" + name.replace("_", "-") for name in given)
        raise UsageError(f"--storyboard does not go together with {options}: leave out one of them.")
    prompts = _read(args.storyboard)
    output = check_clip(job)
    parts = [output.with_name(f"{output.stem}.part{i + 1}{LATENTS_SUFFIX}") for i in range(len(prompts) - 1)]
    for path in [*map(str, parts), args.save_latents]:
        if path is not None:
            check_latents_output(job, path)
    open_model(job).check_given(True)
    for i, prompt in enumerate(prompts):
        job.console.say(f"Clip {i + 1} of {len(prompts)}: {prompt}")
        last = i == len(prompts) - 1
        job.args = _clip_args(args, prompts, i, parts)
        try:
            draw(job, write=last)
        except BaseException:
            if i:
                job.remarks.append(_how_to_go_on(job, i, parts[i - 1]))
            raise
        if 0 < i < len(parts):
            _remove(parts[i - 1])
    if parts:
        _remove(parts[-1])
    job.args = args


def _read(file: str) -> list[str]:
    try:
        return read_storyboard(Path(file).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not text in UTF-8"
        raise TextError(f"{file} cannot be read: {why}. Give a text file with one prompt per line.") from error


def _clip_args(args: argparse.Namespace, prompts: list[str], i: int, parts: list[Path]) -> argparse.Namespace:
    """The command line of one clip."""
    changes = {"storyboard": None, "prompt": prompts[i], "prompts": prompts, "seed": i + (DEFAULT_SEED if args.seed is None else args.seed)}
    if i:
        changes |= {**_FIRST, "continue_from": str(parts[i - 1])}
    elif args.continue_from is None:
        changes["keep_frames"] = None  # the others share so many
    if i < len(parts):
        changes["save_latents"] = str(parts[i])
    return argparse.Namespace(**{**vars(args), **changes})


def _how_to_go_on(job: Job, done: int, path: Path) -> str:
    return (f"The first {done} clips are in {path}. Go on with the other lines in a file of their own: allegro generate "
            f"--storyboard FILE --continue-from {shlex.quote(str(path))} --seed {job.args.seed} and the other options as before.")


def _remove(path: Path) -> None:
    with suppress(OSError):  # it is only in the way
        path.unlink()
