"""What to say when memory ran out: how much was asked for, how much there is, and which options need less."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import NamedTuple

from ..memory import free_bytes
from .console import size

_ASKED = re.compile(r"(?:tried to allocate|unable to allocate) ([\d.]+) ?(bytes|[KMGT]iB)", re.IGNORECASE)
_UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_VAE = "encoding the|encoding$|decoding|calibrating"
_NETWORKS = "sampling|calibrating"
_WEIGHTS = f"{_NETWORKS}|prompt"
_MEASURING = "measuring|profiling"
_CLIP = f"{_NETWORKS}|{_VAE}|{_MEASURING}|video|interpolating"


class _Remedy(NamedTuple):
    """Something to try.

    Attributes:
        option: the command has it, or else this is no remedy.
        stages: a pattern of those it helps in.
        left: whether there is something left to change.
        text: for the message.
    """

    option: str
    stages: str
    left: Callable[[argparse.Namespace], bool]
    text: str


def _always(args: argparse.Namespace) -> bool:
    return True


def _in_float32(args: argparse.Namespace) -> bool:
    """Whether networks run in it: "auto" takes 16 bits on a GPU."""
    from ..pipeline import resolve_device
    return args.dtype == "fp32" or (args.dtype == "auto" and args.device in ("auto", "cpu")
                                    and resolve_device(args.device).type == "cpu")


# The most likely cure first.
_REMEDIES = [
    _Remedy("offload", _WEIGHTS, lambda args: args.offload != "stream", "--offload stream"),
    _Remedy("dtype", _NETWORKS, _in_float32, "--dtype bf16"),
    _Remedy("dtype", "interpol", lambda args: args.command == "interpolate" and _in_float32(args), "--dtype bf16"),
    _Remedy("transformer", _WEIGHTS, _always, "weights that `allegro convert` made smaller"),
    _Remedy("tile", _VAE, _always, "a smaller --tile"),
    _Remedy("layers", _MEASURING, _always, "fewer --layers"),
    _Remedy("size", _MEASURING, _always, "a smaller --size"),
    _Remedy("frames", _CLIP, _always, "fewer --frames"),
    _Remedy("width", _CLIP, _always, "a smaller --width and --height"),
]


def explain_shortage(args: argparse.Namespace, stage: str, error: BaseException) -> str:
    """The message for an allocation that failed.

    Args:
        args: of the command, which has only the options that may be named.
        stage: in which it happened.
        error: see `is_out_of_memory`.
    """
    remedies = [remedy.text for remedy in _REMEDIES
                if hasattr(args, remedy.option) and re.search(remedy.stages, stage) and remedy.left(args)]
    if getattr(args, "resume", None):  # a run that goes on keeps its size
        remedies = [text for text in remedies if "--frames" not in text and "--width" not in text]
    if args.command == "interpolate":
        remedies.append("a smaller video")
    known = ", ".join(_numbers(args, error))
    return (f"memory ran out during: {stage}.{f' {known[0].upper()}{known[1:]}.' if known else ''} Try, in this order: "
            f"{'; '.join([*remedies, 'closing other programs'])}.")


def _numbers(args: argparse.Namespace, error: BaseException) -> Iterator[str]:
    """What is known of how much there was to be, and how much there is."""
    if found := _ASKED.search(str(error)):
        unit = next(factor for name, factor in _UNITS.items() if name.lower() == found.group(2).lower())
        yield f"{size(int(float(found.group(1)) * unit))} more were needed"
    torch = sys.modules.get("torch")  # what does not need it is run without it
    if torch is None:
        return
    from ..pipeline import resolve_device
    in_main_memory = isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error)
    device = resolve_device("cpu" if in_main_memory else getattr(args, "device", "cpu"))
    with suppress(RuntimeError):  # a device that is in trouble may not even tell this
        if (free := free_bytes(device)) is not None:
            yield f"{size(free)} are free {'in main memory' if device.type == 'cpu' else f'on {device}'}"
