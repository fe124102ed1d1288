"""`allegro convert`: a transformer, a text encoder, or both of a whole model, in fewer bits."""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path

import torch

from ..atomic import check_output, writing
from ..errors import OutputError
from ..loading import bundled_model, bundled_models, component_folder, is_snapshot
from ..loading.convert import Converted, convert_checkpoint, suffix_of
from ..loading.files import WEIGHTS
from .base import Job, check_report_output
from .console import size

_WORST = 8  # tensors in the table
# Part of a model -> the name under which it is published.
_PARTS = {"transformer": "diffusion_pytorch_model", "text_encoder": "model"}
_COPIED = ("vae", "tokenizer", "scheduler")


def convert(job: Job) -> None:
    """Runs the command.

    Raises:
        AllegroError: see the exit codes.
    """
    args = job.args
    job.report.stage = "checking"
    check_report_output(job)
    source = bundled_model(args.source) if args.source in bundled_models() else Path(args.source)
    output = Path(args.output)
    if not is_snapshot(source):
        check_output(output, force=job.force)
        job.report.facts["tensors"] = _one(job, source, output, output)
    else:
        job.report.facts["tensors"] = _whole(job, source, output)
    job.report.facts |= {"format": args.format, "output": [str(output)]}
    job.say_result(str(output))


def _whole(job: Job, source: Path, output: Path) -> dict[str, object]:
    """A model folder: both large parts converted, the others copied. A new one appears when it is finished."""
    if output.suffix.lower() in WEIGHTS:
        raise OutputError(f"Cannot write {output}: {source} is a whole model, which is written as a folder. Give the name of one, or "
                          f"convert a part, such as {component_folder(source, 'transformer')}.")
    if output.exists() and not job.force:
        raise OutputError(f"{output} already exists and was left as it is. Add --force to replace its files, or choose "
                          "another name.")
    if output.resolve() in (source.resolve(), *(component_folder(source, part).resolve().parent for part in _PARTS)):
        raise OutputError(f"{output} is the model itself, or one whose parts it shares. Choose another folder.")
    if output.exists():
        return _parts(job, source, output, output)
    unfinished = output.with_name(f".{output.name}.{os.getpid()}.part")
    try:
        found = _parts(job, source, unfinished, output)
        with writing(output):
            unfinished.rename(output)
        return found
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _parts(job: Job, source: Path, output: Path, final: Path) -> dict[str, object]:
    """Writes them to `output`, which will be called `final`."""
    found: dict[str, object] = {}
    for part, stem in _PARTS.items():
        folder, suffix = component_folder(source, part), suffix_of(job.args.format)
        with writing(output):
            (output / part).mkdir(parents=True, exist_ok=True)
        name = f"{stem}{suffix}"
        found[part] = _one(job, folder, output / part / name, final / part / name)
        with writing(output):
            for other in set(WEIGHTS) - {suffix}:  # of an earlier conversion: of two files only one would be read
                (output / part / f"{stem}{other}").unlink(missing_ok=True)
            if (folder / "config.json").is_file():
                shutil.copyfile(folder / "config.json", output / part / "config.json")
    with writing(output):
        for part in _COPIED:
            if component_folder(source, part).is_dir():
                shutil.copytree(component_folder(source, part), output / part, dirs_exist_ok=True)
        if (source / "model_index.json").is_file():
            shutil.copyfile(source / "model_index.json", output / "model_index.json")
    return found


def _one(job: Job, source: Path, output: Path, final: Path) -> dict[str, object]:
    """One file, which will be called `final`, and the table of what it lost."""
    job.report.stage = "converting"
    with (job.report.measure("converting", torch.device("cpu")), job.console.progress("Converting", "tensor") as bar):
        done = convert_checkpoint(source, output, job.args.format, force=job.force, progress=bar.update)
    job.console.say(_table(done, final, output.stat().st_size))
    return {tensor.name: {"stored_as": tensor.stored_as, "bytes": tensor.num_bytes, "relative_error": tensor.relative}
            for tensor in done}


def _table(done: list[Converted], output: Path, num_bytes: int) -> str:
    kinds: dict[str, list[Converted]] = {}
    for tensor in done:
        kinds.setdefault(tensor.stored_as, []).append(tensor)
    lines = [f"{output}: {size(num_bytes)}. Relative error (root mean square), over all tensors "
             f"{_overall(done):.4f}; by type:"]
    lines += [f"  {kind:<14} {len(of):>5} tensors {size(sum(t.num_bytes for t in of)):>11}  {_overall(of):.4f}"
              for kind, of in kinds.items()]
    worst = sorted((tensor for tensor in done if tensor.error), key=lambda tensor: -tensor.relative)[:_WORST]
    if worst:
        lines += ["The largest errors:", *(f"  {t.relative:.4f}  {t.name} ({t.stored_as})" for t in worst)]
    return "\n".join(lines)


def _overall(tensors: list[Converted]) -> float:
    energy = sum(tensor.energy for tensor in tensors)
    return math.sqrt(sum(tensor.error for tensor in tensors) / energy) if energy else 0.0
