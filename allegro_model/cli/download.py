"""`allegro download`: the released weights, into ComfyUI's folders or a model folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..download import (
    Plan,
    Target,
    by_hand,
    comfyui_folders,
    comfyui_targets,
    fetch,
    make_plan,
    snapshot_targets,
    unasked,
)
from ..download.transfer import Progress
from ..errors import DownloadError, MissingDependency
from ..loading.released import INTERPOLATOR_SOURCE, released_files
from .base import Job, check_report_output
from .report import UsageError

_MIB = 2**20


def download(job: Job) -> None:
    """Runs the command.

    Raises:
        AllegroError: see the exit codes.
    """
    args = job.args
    job.report.stage = "checking"
    check_report_output(job)
    if args.model == "vfi":
        folder = f"{args.comfyui}/models/frame_interpolation/" if args.comfyui else ""
        job.say_result(INTERPOLATOR_SOURCE.format(target=f"{folder}ours_small_t.safetensors"))
        return
    targets = _targets(job)
    plan = _plan(job, targets)
    job.report.facts["files"] = [{"path": str(item.present or item.target.path), "present": item.present is not None,
                                  "bytes": item.num_bytes} for item in plan.items]
    if args.dry_run:
        job.say_result(plan.describe())
        return
    job.console.say(plan.describe())
    plan.check_space()
    try:
        _fetch_all(job, plan)
    except KeyboardInterrupt:
        job.remarks.append("What was fetched is kept: run the same again to go on.")
        raise


def _targets(job: Job) -> list[Target]:
    args = job.args
    if args.comfyui is None and args.to is None:
        raise UsageError("Say where the files go: --comfyui DIR for a ComfyUI, or --to DIR for a model folder.")
    files = [file for file in released_files(args.model, args.text_encoder) if not args.only or file.part in args.only]
    targets = (snapshot_targets(files, args.to) if args.to is not None else
               comfyui_targets(files, comfyui_folders(args.comfyui)))
    if not targets:
        raise UsageError("ComfyUI brings its own tokenizer: leave --only tokenizer out, or give --to DIR.")
    return targets


def _plan(job: Job, targets: list[Target]) -> Plan:
    """What there is to do; when nobody can be asked, a list of what to fetch by hand goes with the error."""
    try:
        with job.console.progress("Looking what is missing"):  # without a network, half a minute
            return make_plan(targets, force=job.force)
    except (DownloadError, MissingDependency) as error:
        known = unasked(targets, force=job.force)
        if job.args.dry_run:
            job.console.say(f"The hub could not be asked, sizes are rounded. {error}")
            return known
        job.remarks.append(by_hand(known))
        raise


def _fetch_all(job: Job, plan: Plan) -> None:
    @contextmanager
    def watch(title: str) -> Iterator[Progress]:
        with job.report.measure(title, torch.device("cpu")), job.console.progress(title, "MiB") as bar:
            yield lambda done, total: bar.update(done // _MIB, max(total // _MIB, 1))

    for item in plan.missing:
        checked = fetch(item, watch, force=job.force)
        job.console.say(f"{item.target.path.name}: {checked}")
        job.say_result(str(item.target.path))
