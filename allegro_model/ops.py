"""The two things a host may inject into the networks: layer classes and a cast for bare parameters."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor


class Operations(Protocol):
    """A namespace of layer classes with the constructor signatures of `torch.nn`, which is the default.

    A host passes its own to have weights streamed, cast or patched without the networks knowing.
    """

    Linear: Any
    Conv2d: Any
    Conv3d: Any
    GroupNorm: Any


class CastParam(Protocol):
    """Brings a bare parameter to the dtype and device of the activation it meets."""

    def __call__(self, param: Tensor, like: Tensor) -> Tensor: ...


def cast_like(param: Tensor, like: Tensor) -> Tensor:
    """The default `CastParam`."""
    return param.to(device=like.device, dtype=like.dtype)
