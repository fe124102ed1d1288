"""`allegro bench`: how fast the parts of a run are on this machine."""

from __future__ import annotations

import torch

from ..bench.hardware import describe_hardware
from ..bench.networks import Networks, open_networks
from ..bench.rows import SECTIONS, Row, Scope, half_types, profile, rows_of
from ..geometry import check_size, estimate_sampling_bytes, latent_shape
from ..memory import total_bytes
from ..pipeline import resolve_device, resolve_dtype
from .base import Job, check_report_output
from .console import size
from .job import check_device
from .report import UsageError

# What a CPU does in a minute or two.
_CPU_SIZE = (4, 368, 640)
HEADER = """\
| part | variant | median | spread | ratio | TFLOP/s | peak memory |
|---|---|---|---|---|---|---|"""


def bench(job: Job) -> None:
    """Runs the command.

    Raises:
        AllegroError: see the exit codes.
    """
    args = job.args
    job.report.stage = "checking"
    check_report_output(job)
    check_device(args.device)
    scope = _scope(job)
    hardware = describe_hardware(scope.device)
    job.report.facts |= {"hardware": hardware, "model": scope.networks.name, "layers": scope.layers,
                         "size": [scope.frames, scope.height, scope.width], "rows": []}
    job.say_result(f"{hardware['name']}, torch {torch.__version__}; {scope.networks.name}: {scope.frames} frames of {scope.width}x"
                   f"{scope.height}, {scope.layers} of {scope.networks.dit.num_layers} layers, medians of {scope.rounds} rounds\n\n"
                   f"{HEADER}")
    for section in args.only or SECTIONS:
        job.report.stage = f"measuring {section}"
        with job.console.progress(f"Measuring {section}"):
            rows = list(rows_of(scope, section))
        for row in rows:
            job.report.facts["rows"].append(row.to_dict())
            job.say_result(line(row))
    if args.profile:
        job.report.stage = "profiling"
        shares = job.report.facts["profile"] = profile(scope)
        job.say_result("\nof an evaluation: " + ", ".join(f"{kind} {share:.0%}" for kind, share in shares.items()))


def line(row: Row) -> str:
    """A row of the table."""
    m = row.measured
    speed = "-" if row.flops is None else f"{row.flops / 1e12:.3g}"
    memory = "-" if m.peak_bytes is None else size(m.peak_bytes)
    return f"| {row.section} | {row.name} | {m.median:.3g} s | {m.spread:.0%} | {row.ratio:.2f} | {speed} | {memory} |"


def _scope(job: Job) -> Scope:
    args, networks = job.args, open_networks(job.args.model)
    device, d = resolve_device(args.device), networks.defaults
    own = (d.num_frames, d.height, d.width)
    small = _CPU_SIZE if networks.dit.width > 1000 else own
    frames, height, width = args.size or (small if device.type == "cpu" else own)
    check_size(width, height, frames)
    chosen = resolve_dtype(args.dtype)
    dtypes = (chosen,) if chosen is not None else ((torch.float32, *half_types(device)) if device.type == "cpu" else
                                                   (torch.bfloat16,))
    layers = _layers(networks, device, frames, height, width) if args.layers is None else args.layers
    if not 1 <= layers <= networks.dit.num_layers or args.rounds < 1:
        raise UsageError(f"--layers {layers} --rounds {args.rounds}: expected 1 to {networks.dit.num_layers} layers and at least 1 "
                         "round.")
    compiled = device.type == "cuda" if args.compile is None else args.compile
    return Scope(networks, device, dtypes, frames, height, width, layers, args.rounds, compiled)


def _layers(networks: Networks, device: torch.device, frames: int, height: int, width: int) -> int:
    """All of them on a GPU with room for both prompts, or where the network is small; else one, as all are alike."""
    total = total_bytes(device) or 0
    working = estimate_sampling_bytes(networks.dit, latent_shape(width, height, frames), batch=2, dtype_bytes=2)
    # The weights, the text encoder's, and a quarter to spare.
    needed = 1.25 * (2 * networks.dit_parameters + working + 2 * networks.text_parameters)
    roomy = device.type != "cpu" and needed < total
    return networks.dit.num_layers if roomy or networks.dit.width < 1000 else 1
