"""Seconds and memory of a call."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from ..memory import peak_ram, release_heap, reset_peak, resident_bytes

Run = Callable[[], object]


@dataclass
class Measured:
    """What rounds of one call took.

    Attributes:
        seconds: of each round.
        peak_bytes: highest memory above what was there before, weights included only if the call loads them; None where
            the system does not tell.
    """

    seconds: list[float] = field(default_factory=list)
    peak_bytes: int | None = None

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Half the range of the rounds, as a share of the median."""
        return (max(self.seconds) - min(self.seconds)) / 2 / self.median


def synchronise(device: torch.device) -> None:
    """Waits until the device has done what it was asked for."""
    if device.type != "cpu" and hasattr(torch, "accelerator"):  # PyTorch 2.6
        torch.accelerator.synchronize(device)
    elif device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(run: Run, device: torch.device) -> float:
    """Seconds of one call on an idle device."""
    synchronise(device)
    start = time.perf_counter()
    run()
    synchronise(device)
    return time.perf_counter() - start


def peak_of(run: Run, device: torch.device) -> int | None:
    """Bytes that one call needs above what is there: of the device's memory, or of this process's on a CPU."""
    if device.type == "cuda":
        before: int | None = torch.cuda.memory_allocated(device)
        reset_peak(device)
        run()
        return int(torch.cuda.max_memory_allocated(device)) - (before or 0)
    release_heap()
    before = resident_bytes()
    reset_peak(device)
    run()
    after = peak_ram()
    return None if device.type != "cpu" or before is None or after is None else max(0, after - before)


def in_turn(runs: Mapping[str, Run], device: torch.device, rounds: int) -> dict[str, Measured]:
    """Measures calls in turn, so that whatever else the machine does hits all of them alike.

    Args:
        runs: name -> call. Each is called once more beforehand, which warms up and tells its memory.
        device: where they run.
        rounds: timed calls of each.
    """
    found = {name: Measured(peak_bytes=peak_of(run, device)) for name, run in runs.items()}
    for _ in range(rounds):
        for name, run in runs.items():
            found[name].seconds.append(seconds_of(run, device))
    return found


def at_largest(make: Callable[[int], Run], sizes: Iterable[int], budget: float, device: torch.device) -> tuple[int, float]:
    """Times a call at the largest size that fits a budget.

    Args:
        make: gives the call of a size.
        sizes: ascending, at least one.
        budget: seconds for the last size, about. The first size is called even if it takes longer.
    Returns:
        the size, and the median seconds of a call.
    """
    run: Run | None = None
    size, seconds = 0, 0.0
    for following in sizes:
        if run is not None and seconds * following / size * 3 > budget:
            break
        size, run = following, make(following)
        seconds_of(run, device)  # warms up: kernels are chosen, memory is found
        seconds = seconds_of(run, device)
    assert run is not None
    more = 4 if seconds * 6 < budget else 2  # one alone may have been disturbed
    return size, statistics.median([seconds, *(seconds_of(run, device) for _ in range(more))])


def randomise(module: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A module on the meta device -> one with arbitrary weights, made at the speed of copying.

    The weights are noise, since zeros would flatter: processors need less power for them.
    """
    module = module.to_empty(device=device).to(dtype)
    generator = torch.Generator().manual_seed(0)
    block = (torch.randn(2**20, generator=generator) * 0.02).to(device, dtype)
    with torch.no_grad():
        for tensor in module.state_dict().values():
            flat = tensor.view(-1)
            whole = len(flat) // len(block)
            flat[: whole * len(block)].view(whole, len(block)).copy_(block.expand(whole, -1))
            flat[whole * len(block) :].copy_(block[: len(flat) - whole * len(block)])
    return module.eval().requires_grad_(False)
