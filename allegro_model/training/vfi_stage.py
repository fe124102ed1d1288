"""Trains the frame interpolator on triplets: EMA-VFI at every position between two frames."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..vfi import EMAVFI
from .distributed import Workers
from .loop import Loop
from .losses import vfi_loss
from .recipe import TINY_VFI, Recipe
from .vfi_data import CLIP_SHARE, Triplet, clip_triplet, layers_triplet
from .vfi_initialise import initialise_vfi

#: (width, height) and share of the sizes trained on.
SIZES = {(96, 64): 0.5, (64, 64): 0.4, (64, 96): 0.1}
#: Of the error of the flow in pixels, beside the error of the pictures.
FLOW_WEIGHT = 0.02


def _batch(arrays: Sequence[np.ndarray]) -> Tensor:
    """``[H, W, C]`` each -> float32 ``[B, C, H, W]``."""
    return torch.from_numpy(np.stack(arrays).astype(np.float32)).permute(0, 3, 1, 2).contiguous()


def stack(triplets: Sequence[Triplet]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return first frames, frames between, second frames, each ``[B, 3, H, W]``, and positions ``[B, 1, 1, 1]``."""
    first, between, second = (_batch([t.frames[k] for t in triplets]) for k in range(3))
    return first, between, second, torch.tensor([t.position for t in triplets]).view(-1, 1, 1, 1)


def flow_error(flow: Tensor, triplets: Sequence[Triplet]) -> Tensor:
    """Return the mean absolute error, in pixels, of ``flow [B, 4, H, W]`` where the true motion is known."""
    known = [index for index, triplet in enumerate(triplets) if triplet.flow is not None]
    if not known:
        return flow.new_zeros(())
    return (flow[known] - _batch([t.flow for t in triplets if t.flow is not None])).abs().mean()


class _Interpolator:
    """Loss of one step."""

    def __init__(self, model: EMAVFI, recipe: Recipe) -> None:
        self.model, self.batch = model, recipe.vfi_batch

    def _draw(self, rng: np.random.Generator) -> list[Triplet]:
        sizes = list(SIZES)
        size = sizes[int(rng.choice(len(sizes), p=list(SIZES.values())))]
        return [(clip_triplet if rng.random() < CLIP_SHARE else layers_triplet)(size, rng) for _ in range(self.batch)]

    def __call__(self, step: int, generator: torch.Generator) -> Tensor:
        rng = np.random.default_rng(int(torch.randint(2**62, (1,), generator=generator)))
        triplets = self._draw(rng)
        first, between, second, position = stack(triplets)
        before, after = (self.model.features(frame, 1.0, torch.float32) for frame in (first, second))
        found = next(self.model.predict(before, after, [position]))
        return vfi_loss(found.frame, found.merged, between) + FLOW_WEIGHT * flow_error(found.flow, triplets)


def train_vfi(workers: Workers, recipe: Recipe, folder: Path) -> None:
    """Train the frame interpolator; writes ``vfi.pt``."""
    torch.manual_seed(recipe.seed)
    model = EMAVFI(TINY_VFI)
    initialise_vfi(model)
    Loop({"vfi": model}, recipe.vfi, workers, folder / "vfi.pt").run(_Interpolator(model, recipe))
