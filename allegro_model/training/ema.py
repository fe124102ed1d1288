"""Exponential moving average of parameters."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class EMA:
    """Average of a module's parameters; early on the decay is smaller, so that the start is forgotten.

    Args:
        modules: named modules to follow.
        decay: final decay per step.
    """

    def __init__(self, modules: Mapping[str, nn.Module], decay: float) -> None:
        self.decay = decay
        self.average = {name: {key: value.detach().clone().float() for key, value in module.state_dict().items()}
                        for name, module in modules.items()}

    @torch.no_grad()
    def update(self, modules: Mapping[str, nn.Module], step: int) -> None:
        """Move the average towards the parameters after optimiser step ``step`` (counted from 0)."""
        decay = min(self.decay, (1.0 + step) / (10.0 + step))
        for name, module in modules.items():
            average = self.average[name]
            for key, value in module.state_dict().items():
                average[key].lerp_(value.float(), 1.0 - decay)

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Return the averages by module name and key."""
        return self.average

    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take averages saved by ``state_dict``."""
        self.average = {name: {k: v.to(self.average[name][k].device, copy=True) for k, v in tensors.items()}
                        for name, tensors in state.items()}
