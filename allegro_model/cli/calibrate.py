"""`allegro calibrate`: the step caches of a model, measured."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..atomic import check_output
from ..calibration import MIN_STEPS, PROMPTS, Calibrator, cost, describe, to_json
from ..errors import TextError
from ..loading.files import cache_file
from .base import Job, check_report_output
from .job import model_name, open_model, transformer_name, write_bytes
from .report import UsageError


def calibrate(job: Job) -> None:
    """Runs the command.

    Raises:
        AllegroError: see the exit codes.
    """
    args = job.args
    job.report.stage = "checking"
    check_report_output(job)
    pipeline = open_model(job)
    if args.output is None and args.model in (None, "tiny", "tiny-ti2v"):
        raise UsageError("A bundled model is calibrated already. Give a model folder with --model, or a file with --output.")
    output = cache_file(pipeline.transformer) if args.output is None else Path(args.output)
    check_output(output, force=args.force)  # now, not after a night
    prompts = PROMPTS if args.prompts is None else _read_prompts(args.prompts)
    settings = pipeline.settings(num_steps=args.steps, width=args.width, height=args.height, num_frames=args.frames)
    if settings.num_steps < MIN_STEPS:
        raise UsageError(f"--steps {settings.num_steps}: with so few each one is needed. Calibrate with what the model is used with, at least {MIN_STEPS}.")
    pipeline.check_memory(settings)
    least, most = cost(len(prompts))
    name = transformer_name(job) or model_name(job)
    folder = output.with_name(output.name + ".parts")
    job.console.say(f"{name}: {len(prompts)} prompts, {settings.num_frames} frames of {settings.width}x{settings.height}, {settings.num_steps} steps "
                    f"of {settings.sampler}: as long as {least:.1f} to {most:.1f} clips without a cache. Finished runs are kept in {folder}; "
                    "the same command goes on from there.")

    @contextmanager
    def watch(title: str) -> Iterator[Callable[[int, int], None]]:
        with job.console.progress(title, "step") as bar:
            yield bar.update

    with job.report.measure("calibrating", pipeline.device):
        calibration, speeds = Calibrator(pipeline, settings, prompts, folder, watch).run(name)
    write_bytes(output, to_json(calibration, speeds, {"settings": settings.to_dict(), "prompts": list(prompts)}), force=args.force)
    shutil.rmtree(folder, ignore_errors=True)
    for line in describe(calibration, speeds):
        job.console.say(line)
    job.report.facts["calibration"] = calibration.to_dict()
    job.say_result(str(output))


def _read_prompts(path: str) -> list[str]:
    """The lines of a text file that are not empty."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise TextError(f"{path} cannot be read: {error}. Give a text file with one prompt a line.") from error
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    if not prompts:
        raise TextError(f"{path} holds no prompt. Write one a line.")
    return prompts
