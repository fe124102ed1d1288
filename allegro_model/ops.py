"""The two things a host may inject into the networks: layer classes and a cast for bare parameters."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor, nn


class Operations(Protocol):
    """A namespace of layer classes with the constructor signatures of `torch.nn`, which is the default.

    A host passes its own to have weights streamed, cast or patched without the networks knowing.
    """

    Linear: Any
    Conv2d: Any
    Conv3d: Any
    ConvTranspose2d: Any
    GroupNorm: Any
    LayerNorm: Any


class _Unfilled:
    """Skips the random start values, which take longer to draw than a mapped checkpoint takes to load."""

    def reset_parameters(self) -> None: ...


class unfilled:
    """`Operations` for a network that is about to be filled from a file."""

    class Linear(_Unfilled, nn.Linear): ...

    class Conv2d(_Unfilled, nn.Conv2d): ...

    class Conv3d(_Unfilled, nn.Conv3d): ...

    class GroupNorm(_Unfilled, nn.GroupNorm): ...


class CastParam(Protocol):
    """Brings a bare parameter to the dtype and device of the activation it meets."""

    def __call__(self, param: Tensor, like: Tensor) -> Tensor: ...


def cast_like(param: Tensor, like: Tensor) -> Tensor:
    """The default `CastParam`."""
    return param.to(device=like.device, dtype=like.dtype)
