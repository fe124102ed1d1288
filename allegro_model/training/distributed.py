"""Data parallel over processes of one machine: one thread each, gradients averaged with gloo."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

#: Faster allocation and kernel reuse for the many small shapes of a training step.
WORKER_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "8192",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "4000000000",
    "TOKENIZERS_PARALLELISM": "false",
}


class Workers:
    """The group of processes that train together; a group of one needs no communication.

    Attributes:
        rank: number of this process, 0 writes files and logs.
        world: number of processes.
    """

    def __init__(self, rank: int = 0, world: int = 1) -> None:
        self.rank, self.world = rank, world

    def broadcast(self, modules: Iterable[nn.Module]) -> None:
        """Give every process the parameters of rank 0."""
        if self.world > 1:
            for module in modules:
                for parameter in module.parameters():
                    dist.broadcast(parameter.data, 0)

    def average_gradients(self, parameters: Iterable[torch.Tensor]) -> None:
        """Replace each gradient by its mean over the processes."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        if self.world == 1 or not gradients:
            return
        flat = torch.cat([g.reshape(-1) for g in gradients])
        dist.all_reduce(flat)
        flat /= self.world
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def barrier(self) -> None:
        """Wait for every process."""
        if self.world > 1:
            dist.barrier()


def _enter(rank: int, world: int, meeting: str, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
    try:
        function(Workers(rank, world), *arguments)
    finally:
        if world > 1:
            dist.destroy_process_group()


def launch(function: Callable[..., None], world: int, *arguments: Any) -> None:
    """Run ``function(workers, *arguments)`` in ``world`` processes and wait for them.

    Args:
        function: a module-level function (it is pickled by name).
        world: number of processes; 1 also starts a process, so that the settings below take effect.
        arguments: picklable.

    Raises:
        torch.multiprocessing.ProcessRaisedException: a process failed; its traceback is in the message.
    """
    kept = {name: os.environ.get(name) for name in WORKER_ENVIRONMENT}
    os.environ.update(WORKER_ENVIRONMENT)
    try:
        with tempfile.TemporaryDirectory() as folder:
            meeting = str(Path(folder) / "meeting")
            torch.multiprocessing.spawn(_enter, (world, meeting, function, arguments), nprocs=world, join=True)
    finally:
        for name, value in kept.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
