"""Progress, cancelling and the report of time and memory, for every loop of ours."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import comfy.model_management
import comfy.utils
import torch
from server import PromptServer
from torch import nn

from ...allegro_model.memory import peak_ram, reset_peak

logger = logging.getLogger(__name__)
GIB = 1024**3


def check_cancelled() -> None:
    """Raises ComfyUI's own exception once the user has pressed cancel."""
    comfy.model_management.throw_exception_if_processing_interrupted()


def cancel_before(module: nn.Module, args: tuple[object, ...]) -> None:
    """Forward pre-hook for the parts of a network that alone can take seconds."""
    if not torch.compiler.is_compiling():
        check_cancelled()


def tile_progress() -> Callable[[int, int], None]:
    """A progress callback (done, total) that moves the node's bar and cancels."""
    bar: comfy.utils.ProgressBar | None = None

    def report(done: int, total: int) -> None:
        nonlocal bar
        check_cancelled()
        if bar is None:
            bar = comfy.utils.ProgressBar(total)
        bar.update_absolute(done, total)

    return report


def say(node_id: str | None, text: str) -> None:
    """Shows a line on a node in the browser; without a server or a node, nothing."""
    server = getattr(PromptServer, "instance", None)
    if server is not None and node_id is not None:
        server.send_progress_text(text, node_id)


@contextmanager
def stage(name: str, device: torch.device) -> Iterator[None]:
    """Logs and records seconds and peak memory of a stage that finished."""
    backend = getattr(torch, device.type, None)
    measures = backend is not None and hasattr(backend, "max_memory_reserved")
    reset_peak(device)
    if measures:
        backend.reset_peak_memory_stats(device)
    start = time.perf_counter()
    yield
    done = Stage(_run_id(), name, time.perf_counter() - start, peak_ram(),
                 backend.max_memory_allocated(device) if measures else None,
                 backend.max_memory_reserved(device) if measures else None)
    _stages.append(done)
    memory = "" if not measures else (f", peak {(done.allocated or 0) / GIB:.2f} GiB allocated, "
                                      f"{(done.reserved or 0) / GIB:.2f} GiB reserved")
    logger.info("Allegro %s: %.1f s%s", name, done.seconds, memory)


@dataclass(frozen=True)
class Stage:
    """What a stage took; bytes are None where the device does not tell.

    Attributes:
        run: ComfyUI's id of the run.
        name: of the stage.
        seconds: of it.
        ram: highest resident memory of the process.
        allocated, reserved: highest memory of the accelerator.
    """

    run: str
    name: str
    seconds: float
    ram: int | None
    allocated: int | None
    reserved: int | None


# A few numbers each, no tensors: what AllegroReport shows must outlast the nodes that it comes from.
_stages: deque[Stage] = deque(maxlen=100)


def last_run() -> tuple[list[Stage], bool]:
    """(stages of the run that goes on, True), or of the newest one before it that had any, False."""
    run = _run_id()
    if found := [s for s in _stages if s.run == run]:
        return found, True
    return ([s for s in _stages if s.run == _stages[-1].run], False) if _stages else ([], False)


def _run_id() -> str:
    server = getattr(PromptServer, "instance", None)
    return str(getattr(server, "last_prompt_id", ""))
