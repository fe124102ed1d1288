"""Progress, cancelling and the report of time and memory, for every loop of ours."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import comfy.model_management
import comfy.utils
import torch
from server import PromptServer
from torch import nn

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
    """Logs seconds, and on accelerators the peak memory, of a stage that finished."""
    backend = getattr(torch, device.type, None)
    measures = backend is not None and hasattr(backend, "max_memory_reserved")
    if measures:
        backend.reset_peak_memory_stats(device)
    start = time.perf_counter()
    yield
    seconds = time.perf_counter() - start
    if measures:
        logger.info("Allegro %s: %.1f s, peak %.2f GiB allocated, %.2f GiB reserved", name, seconds,
                    backend.max_memory_allocated(device) / GIB, backend.max_memory_reserved(device) / GIB)
    else:
        logger.info("Allegro %s: %.1f s", name, seconds)
