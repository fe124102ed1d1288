"""`allegro convert-vfi`: a published EMA-VFI pickle -> safetensors."""

from __future__ import annotations

from safetensors.torch import save

from ..errors import OutputError
from ..loading import interpolator_metadata, read_pickled_interpolator
from ..media import check_output
from .base import Job, check_report_output
from .job import write_bytes

SUFFIX = ".safetensors"


def convert_vfi(job: Job) -> None:
    """Runs the command.

    Raises:
        AllegroError: see the exit codes.
    """
    args = job.args
    job.report.stage = "checking"
    output = check_output(args.output, force=job.force)
    if output.suffix.lower() != SUFFIX:
        raise OutputError(f"Cannot write {output}: weights are kept in {SUFFIX} files. Choose such a name.")
    check_report_output(job)
    job.report.stage = "converting"
    tensors, config = read_pickled_interpolator(args.checkpoint, arbitrary_time=args.arbitrary_time)
    metadata = interpolator_metadata(config)
    write_bytes(output, save(tensors, metadata), force=job.force)
    job.report.facts |= {"settings": config.to_dict(), "output": [str(output)]}
    kind = "any position between two frames" if config.arbitrary_time else "the middle of two frames"
    job.console.say(f"{len(tensors)} tensors, made for {kind}. If that is wrong: --arbitrary-time or --no-arbitrary-time.")
    job.say_result(str(output))
