"""The training loop both stages share: data parallel, resumable to the bit, seeded by step.

Randomness of step ``n`` comes from (seed, n, rank) alone, so a resumed run repeats the uninterrupted one.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..ops import half_is_slow
from .distributed import Workers
from .ema import EMA

logger = logging.getLogger(__name__)


def mixed_precision(device_type: str = "cpu") -> torch.autocast:
    """bfloat16 for the layers that bear it; float32 on a processor that would be many times slower in bfloat16."""
    slow = device_type == "cpu" and half_is_slow(torch.bfloat16)
    return torch.autocast(device_type, torch.bfloat16, enabled=not slow)


@dataclass(frozen=True)
class LoopSettings:
    """How long and how fast to train.

    Attributes:
        steps: optimiser steps in total.
        learning_rate: peak rate, reached after ``warmup`` steps.
        warmup: steps of linear rise.
        drop: (step, factor); from this step on the rate is multiplied by the factor.
        decay: last steps over which the rate falls linearly to 2 %; before them it is constant.
        weight_decay: AdamW.
        ema_decay: of the averaged weights.
        seed: of the data and noise of every step.
        save_every: steps between checkpoints.
        log_every: steps between log lines.
    """

    steps: int
    learning_rate: float
    warmup: int = 100
    drop: tuple[int, float] = (0, 1.0)
    decay: int = 0
    weight_decay: float = 0.01
    ema_decay: float = 0.999
    seed: int = 0
    save_every: int = 250
    log_every: int = 50

    def rate(self, step: int) -> float:
        """Return the learning rate of ``step`` (counted from 0)."""
        rise = min(1.0, (step + 1) / max(1, self.warmup))
        left = (self.steps - step) / self.decay if self.decay else 1.0
        dropped = self.drop[1] if step >= self.drop[0] else 1.0
        return self.learning_rate * dropped * rise * min(1.0, max(0.02, left))


def step_generator(seed: int, step: int, rank: int) -> torch.Generator:
    """Return the generator that all randomness of one step of one process comes from."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) * 64 + rank)


def save_state(path: Path, state: Mapping[str, object]) -> None:
    """Write a checkpoint under a temporary name and rename it, so that a crash leaves the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    torch.save(dict(state), temporary)
    os.replace(temporary, path)


class Loop:
    """Trains named modules together.

    Args:
        modules: what is optimised, by name; all parameters that require a gradient.
        settings: length and rates.
        workers: the processes.
        path: checkpoint file; training continues from it when it exists.
    """

    def __init__(self, modules: Mapping[str, nn.Module], settings: LoopSettings, workers: Workers, path: Path) -> None:
        self.modules, self.settings, self.workers, self.path = dict(modules), settings, workers, path
        self.parameters = [p for m in self.modules.values() for p in m.parameters() if p.requires_grad]
        self.optimiser = torch.optim.AdamW(self.parameters, lr=settings.learning_rate, betas=(0.9, 0.99),
                                           weight_decay=settings.weight_decay)
        workers.broadcast(self.modules.values())
        self.ema = EMA(self.modules, settings.ema_decay)
        self.step = 0
        if path.exists():
            self._restore(torch.load(path, map_location="cpu", weights_only=True))

    def _restore(self, state: Mapping[str, object]) -> None:
        for name, module in self.modules.items():
            module.load_state_dict(state["modules"][name])  # type: ignore[index]
        self.optimiser.load_state_dict(state["optimiser"])  # type: ignore[arg-type]
        self.ema.load_state_dict(state["ema"])  # type: ignore[arg-type]
        self.step = int(state["step"])  # type: ignore[call-overload]
        logger.info("going on at step %d of %d, from %s; remove that file to begin anew", self.step, self.settings.steps, self.path)

    def save(self) -> None:
        """Write the checkpoint (rank 0 only)."""
        if self.workers.rank == 0:
            modules = {name: module.state_dict() for name, module in self.modules.items()}
            save_state(self.path, {"modules": modules, "optimiser": self.optimiser.state_dict(),
                                   "ema": self.ema.state_dict(), "step": self.step})

    def run(self, loss_of: Callable[[int, torch.Generator], Tensor]) -> None:
        """Train until ``settings.steps``.

        Args:
            loss_of: computes the loss of a step from its number and its generator.
        """
        settings, start, first, total = self.settings, time.monotonic(), self.step, 0.0
        while self.step < settings.steps:
            for group in self.optimiser.param_groups:
                group["lr"] = settings.rate(self.step)
            loss = loss_of(self.step, step_generator(settings.seed, self.step, self.workers.rank))
            self.optimiser.zero_grad(set_to_none=True)
            loss.backward()
            self._update()
            total += float(loss.detach())
            self.step += 1
            if self.step % settings.log_every == 0 and self.workers.rank == 0:
                pace = (time.monotonic() - start) / (self.step - first)
                logger.info("step %d/%d loss %.5f, %.3f s per step", self.step, settings.steps,
                            total / settings.log_every, pace)
                total = 0.0
            if self.step % settings.save_every == 0:
                self.save()
        self.save()

    def _update(self) -> None:
        """Average the gradients, clip, step; a step with a non-finite gradient is skipped by every process."""
        self.workers.average_gradients(self.parameters)
        norm = float(nn.utils.clip_grad_norm_(self.parameters, 1.0))
        if not math.isfinite(norm):
            logger.warning("step %d skipped: gradient norm %s", self.step, norm)
            return
        self.optimiser.step()
        self.ema.update(self.modules, self.step)
