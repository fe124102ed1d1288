"""The two things a host may inject into the networks: layer classes and a cast for bare parameters.

The default layers are `torch.nn`'s with other arithmetic on the CPU, where it is faster: see `layers`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .convolution import convolve_wide


class Operations(Protocol):
    """A namespace of layer classes with the constructor signatures of `torch.nn`; the default is `layers`.

    A host passes its own to have weights streamed, cast or patched without the networks knowing.
    """

    Linear: Any
    Conv2d: Any
    Conv3d: Any
    ConvTranspose2d: Any
    GroupNorm: Any
    LayerNorm: Any


# Rows of a matrix that are brought to float32 at once: enough that converting the weights does not show.
ROWS = 2048


@cache
def half_is_slow(dtype: torch.dtype) -> bool:
    """Whether this processor has no instructions for a 16-bit type: float32 is then several times faster.

    PyTorch hands 16-bit layers to oneDNN where the processor can, and else to plain loops.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return False
    name = "_is_mkldnn_bf16_supported" if dtype == torch.bfloat16 else "_is_mkldnn_fp16_supported"
    supported = getattr(torch.ops.mkldnn, name, None) if torch.backends.mkldnn.is_available() else None
    return supported is None or not supported()


def own_arithmetic(x: Tensor) -> bool:
    """Whether a layer may go its own way: on the CPU, without gradients, with nothing that traces or casts."""
    return x.device.type == "cpu" and not (
        torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"))


def _floats(*tensors: Tensor | None) -> Iterator[Any]:
    return (None if x is None else x.float() for x in tensors)


class Linear(nn.Linear):
    """`nn.Linear` that computes 16-bit types in float32 where the processor has no instructions for them."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., C']."""
        if not (half_is_slow(x.dtype) and own_arithmetic(x)):
            return super().forward(x)
        weight, bias = _floats(self.weight, self.bias)
        y = x.new_empty(*x.shape[:-1], self.out_features)
        for part, result in zip(x.reshape(-1, x.shape[-1]).split(ROWS), y.view(-1, y.shape[-1]).split(ROWS), strict=True):
            result.copy_(F.linear(part.float(), weight, bias))
        return y


class Conv2d(nn.Conv2d):
    """`nn.Conv2d` with fewer multiplications for wide 3x3 kernels; 16-bit types as in `Linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C', H', W']."""
        slow = half_is_slow(x.dtype)
        if not ((slow or x.dtype == torch.float32) and own_arithmetic(x)):
            return super().forward(x)
        weight, bias = _floats(self.weight, self.bias)
        if self.kernel_size == (3, 3) and _saves(self, len(x) * x[0, 0].numel()):
            pad: Any = self.padding
            clip = x.transpose(0, 1)[None]  # pictures do not meet: a clip with a kernel of one frame
            return convolve_wide(clip, weight[:, :, None], bias, (0, *pad))[0].transpose(0, 1)
        return _by_picture(lambda picture: self._conv_forward(picture, weight, bias), x)


class Conv3d(nn.Conv3d):
    """`nn.Conv3d` with fewer multiplications for wide kernels of 3 along an axis; 16-bit types as in `Linear`.

    Tensors in the layout channels_last_3d gain most; others are brought to it.
    """

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T, H, W] -> [B, C', T', H', W']."""
        slow = half_is_slow(x.dtype)
        if not ((slow or x.dtype == torch.float32) and own_arithmetic(x)):
            return super().forward(x)
        weight, bias = _floats(self.weight, self.bias)
        if self.kernel_size in ((3, 1, 1), (3, 3, 3)) and _saves(self, x[0, 0].numel()):
            pad: Any = self.padding
            return convolve_wide(x, weight, bias, pad)
        return self._conv_forward(x.float(), weight, bias).to(x.dtype)


def _saves(layer: nn.Conv2d | nn.Conv3d, points: int) -> bool:
    """Whether fewer multiplications outweigh the additions they cost, in a plain convolution.

    Kernels along time are the library's slowest ones and its pictures the fastest. More points make up for the new kernels.
    """
    channels = min(layer.in_channels, layer.out_channels)
    return (set(layer.stride) == set(layer.dilation) == {1} and layer.groups == 1 and layer.padding_mode == "zeros"
            and not isinstance(layer.padding, str) and points >= 2 * channels
            and channels >= (64 if layer.kernel_size[-1] == 1 else 256))


def _by_picture(convolve: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`convolve` in float32 on every picture of [B, C, H, W]; on all at once when no conversion costs memory."""
    if x.dtype == torch.float32:
        return convolve(x)
    return torch.cat([convolve(picture.float()).to(x.dtype) for picture in x.split(1)])


class layers:
    """The default `Operations`."""

    Linear = Linear
    Conv2d = Conv2d
    Conv3d = Conv3d
    ConvTranspose2d = nn.ConvTranspose2d
    GroupNorm = nn.GroupNorm
    LayerNorm = nn.LayerNorm


class _Unfilled:
    """Skips the random start values, which take longer to draw than a mapped checkpoint takes to load."""

    def reset_parameters(self) -> None: ...


class unfilled:
    """`Operations` for a network that is about to be filled from a file."""

    class Linear(_Unfilled, Linear): ...

    class Conv2d(_Unfilled, Conv2d): ...

    class Conv3d(_Unfilled, Conv3d): ...

    class GroupNorm(_Unfilled, nn.GroupNorm): ...


class CastParam(Protocol):
    """Brings a bare parameter to the dtype and device of the activation it meets."""

    def __call__(self, param: Tensor, like: Tensor) -> Tensor: ...


def cast_like(param: Tensor, like: Tensor) -> Tensor:
    """The default `CastParam`."""
    return param.to(device=like.device, dtype=like.dtype)
