"""All randomness of a run, from CPU generators, so that every device draws the same numbers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

MAX_SEED = 2**64 - 1


class NoiseSource:
    """Standard normal noise, one generator per item of the batch.

    Item i depends on its own seed only, never on its neighbours. The order of draws is the reference's: the
    initial noise, then one draw per step, also for the last one.

    Args:
        seeds: one per item, 0 .. 2**64 - 1.
        shape: [C, t, h, w] of an item.
        skip: draws already used, for continuing a run.
    """

    def __init__(self, seeds: Sequence[int], shape: Sequence[int], *, skip: int = 0) -> None:
        self.shape = tuple(shape)
        self.generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        for _ in range(skip):
            self.draw()

    def draw(self) -> Tensor:
        """The next [B, C, t, h, w] float32 noise, on the CPU."""
        return torch.cat([torch.randn((1, *self.shape), generator=g) for g in self.generators])
