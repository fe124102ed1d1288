"""The attention contract, the kernels that fulfil it, and the choice of one by measurement.

Every attention of the DiT goes through one callable with the signature of `Attention`, so that a host can put its own
kernel in its place. The model never asks which kernels are installed; `choose_attention` does, once per run. Packages
with kernels are imported when they are tried, and none is required.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from statistics import median
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import ScheduleError, first_line

log = logging.getLogger(__name__)

# Measuring needs no more than this to tell kernels apart: the scores of two heads of the released model.
_MEASURED_SCORES = 2 * 79_200**2
_ROUNDS = 3
# A kernel that is exact but for rounding stays below this (relative, root mean square); bfloat16 alone is at 0.005.
_TOLERANCE = 0.02
_HALF = (torch.float16, torch.bfloat16)


class Attention(Protocol):
    """softmax(q k^T / sqrt(dh) + mask) v for heads that are contiguous slices of the last axis."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
        """Attends.

        Args:
            q: [B, Nq, heads * dh].
            k, v: [B, Nk, heads * dh].
            heads: number of heads.
            mask: additive bias, broadcastable to [B, heads, Nq, Nk], or None.
        Returns:
            [B, Nq, heads * dh].
        """
        ...


def sdpa(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """`Attention` by torch's scaled_dot_product_attention, which picks one of its kernels by rules of its own."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))  # [B, heads, N, dh]
    if k.device.type == "cpu":  # this kernel reads keys and values once per block of queries; in one piece it is faster
        k, v = k.contiguous(), v.contiguous()
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out.transpose(1, 2).flatten(2)


def _sdpa_with(kernel: str) -> Attention:
    """`sdpa` by one of torch's kernels, a name of `SDPBackend`; a mask, which most of them do not take, goes to any."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    backend = getattr(SDPBackend, kernel)

    def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
        if mask is not None and kernel != "MATH":
            return sdpa(q, k, v, heads, mask)
        with sdpa_kernel(backend):
            return sdpa(q, k, v, heads, mask)

    return attention


def _flash_of(package: str) -> Attention:
    """`Attention` by `flash_attn_func` of a package; a mask, which it does not take, goes to `sdpa`."""
    attend = import_module(package).flash_attn_func

    def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
        if mask is not None:
            return sdpa(q, k, v, heads, mask)
        out = attend(*(x.unflatten(-1, (heads, -1)) for x in (q, k, v)))  # [B, N, heads, dh]
        return (out[0] if isinstance(out, tuple) else out).flatten(2)  # some versions also give the softmax's sums

    return attention


def _sage() -> Attention:
    """`Attention` by the sageattention package, which multiplies q and k in 8 bits; a mask goes to `sdpa`."""
    attend = import_module("sageattention").sageattn

    def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
        if mask is not None:
            return sdpa(q, k, v, heads, mask)
        q, k, v = (x.unflatten(-1, (heads, -1)) for x in (q, k, v))  # [B, N, heads, dh]
        return attend(q, k, v, tensor_layout="NHD", is_causal=False).flatten(2)

    return attention


class AttentionShape(NamedTuple):
    """What a kernel has to do in a self-attention: tokens of a clip, heads, and the width of a head."""

    tokens: int
    heads: int
    head_width: int


@dataclass(frozen=True)
class Backend:
    """A kernel that can be asked for.

    Attributes:
        load: gives the kernel; raises ImportError when its package is missing.
        title: what it is, for a list.
        package: what has to be installed, and what its own documentation calls it; empty for torch's own kernels.
        devices: types of device it can run on; empty for all.
        capability: lowest and highest generation of an NVIDIA GPU; None for all.
        dtypes: empty for all.
        head_widths: lowest and highest width of a head; None for all.
        measured: whether "auto" may choose it: exact, and no matrix of all scores in memory.
        extra: of this project, which installs the package.
    """

    load: Callable[[], Attention]
    title: str
    package: str = ""
    devices: tuple[str, ...] = ()
    capability: tuple[tuple[int, int], tuple[int, int]] | None = None
    dtypes: tuple[torch.dtype, ...] = ()
    head_widths: tuple[int, int] | None = None
    measured: bool = True
    extra: str = ""

    def problem(self, device: torch.device, dtype: torch.dtype, head_width: int) -> str | None:
        """Why it cannot be used, in words for the user; None if it can, which a tiny call proves.

        Args:
            device, dtype: of the queries.
            head_width: of a head.
        """
        return self._contradiction(device, dtype, head_width) or self._failure(device, dtype, head_width)

    def _contradiction(self, device: torch.device, dtype: torch.dtype, head_width: int) -> str | None:
        """What its documentation excludes."""
        if self.devices and device.type not in self.devices:
            return f"it runs on {' and '.join(self.devices)}, not on {device.type}"
        if self.dtypes and dtype not in self.dtypes:
            return f"it computes in {' or '.join(map(_name, self.dtypes))}, not in {_name(dtype)}"
        if self.head_widths and not self.head_widths[0] <= head_width <= self.head_widths[1]:
            low, high = self.head_widths
            return f"its heads are {low} to {high} wide, those of this model {head_width}"
        if self.capability and torch.version.hip is None:
            generation = torch.cuda.get_device_capability(device)
            if not self.capability[0] <= generation <= self.capability[1]:
                return f"it is not made for a GPU of the generation {generation[0]}.{generation[1]}"
        return None

    def _failure(self, device: torch.device, dtype: torch.dtype, head_width: int) -> str | None:
        """How a tiny call fails: a missing package, a build for another version of torch, no kernel for the device."""
        x = torch.ones((1, 128, head_width), device=device, dtype=dtype)
        try:
            attend = self.load()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch gives one for each kernel that it cannot use
                attend(x, x, x, 1)
        except ImportError as error:
            missing = isinstance(error, ModuleNotFoundError) and error.name == self.package
            if not missing:
                return f"importing it fails: {first_line(error)}"
            cure = f' (pip install "allegro-video[{self.extra}]")' if self.extra else ""
            return f"the package {self.package} is not installed{cure}"
        except Exception as error:  # noqa: BLE001 (compilers of kernels raise types of their own)
            return f"it fails here: {first_line(error)}"
        return None


# Kernels by name. Sources: PyTorch's SDPBackend; the documentation of flash-attn (Ampere or later for 2, Hopper for 3, heads
# up to 256) and of SageAttention (heads of 64 to 128, where 96 is one of its own widths or padded; version 1 and 2).
BACKENDS: dict[str, Backend] = {
    "sdpa": Backend(lambda: sdpa, "torch's own choice of its kernels"),
    "sdpa-cudnn": Backend(partial(_sdpa_with, "CUDNN_ATTENTION"), "cuDNN, through torch", devices=("cuda",), dtypes=_HALF),
    "sdpa-flash": Backend(partial(_sdpa_with, "FLASH_ATTENTION"), "torch's build of FlashAttention 2", devices=("cuda",),
                          dtypes=_HALF),
    "sdpa-efficient": Backend(partial(_sdpa_with, "EFFICIENT_ATTENTION"), "torch's memory-efficient kernel", devices=("cuda",)),
    "sdpa-math": Backend(partial(_sdpa_with, "MATH"), "plain matrix products; short clips only", measured=False),
    "flash2": Backend(partial(_flash_of, "flash_attn"), "the flash-attn package", "flash_attn", ("cuda",),
                      ((8, 0), (99, 0)), _HALF, (8, 256), extra="flash"),
    "flash3": Backend(partial(_flash_of, "flash_attn_interface"), "FlashAttention 3, for Hopper", "flash_attn_interface",
                      ("cuda",), ((9, 0), (9, 9)), _HALF, (64, 256)),
    "sage": Backend(_sage, "SageAttention: queries and keys in 8 bits, approximate", "sageattention", ("cuda",),
                    ((8, 0), (99, 0)), _HALF, (64, 128), measured=False),
}
ATTENTIONS = ("auto", *BACKENDS)


def check_attention(name: str) -> None:
    """Raises unless there is such a choice.

    Raises:
        ScheduleError: names all of them.
    """
    if name not in ATTENTIONS:
        raise ScheduleError(f"attention={name!r}: must be one of {', '.join(ATTENTIONS)}.")


class Kernel(NamedTuple):
    """A kernel that was chosen.

    Attributes:
        name: in `BACKENDS`.
        run: the kernel.
        seconds: what those measured for the choice took for the same work, itself among them; empty when nothing was.
    """

    name: str
    run: Attention
    seconds: dict[str, float]

    def describe(self) -> str:
        """Its name, with the measurement."""
        times = ", ".join(f"{name} {1000 * value:.1f} ms" for name, value in self.seconds.items())
        return f"{self.name} (measured: {times})" if times else self.name


def choose_attention(name: str, device: torch.device, dtype: torch.dtype, shape: AttentionShape) -> Kernel:
    """The kernel of a run. What was measured, or why a kernel cannot be used, is one line in the log.

    Args:
        name: one of `ATTENTIONS`; "auto" measures the exact ones on the device, at the real length, and takes the fastest.
        device, dtype: of the queries.
        shape: of the run.
    Raises:
        ScheduleError: there is no such choice.
    """
    check_attention(name)
    if name == "auto":
        return _fastest(device, dtype, shape)
    problem = BACKENDS[name].problem(device, dtype, shape.head_width)
    if problem is not None:
        log.warning("Attention %s cannot be used: %s. Using sdpa.", name, problem)
        name = "sdpa"
    return Kernel(name, BACKENDS[name].load(), {})


def _fastest(device: torch.device, dtype: torch.dtype, shape: AttentionShape) -> Kernel:
    candidates = [name for name, backend in BACKENDS.items()
                  if backend.measured and backend.problem(device, dtype, shape.head_width) is None]
    if candidates in ([], ["sdpa"]):  # as on every device without other kernels: nothing to measure
        return Kernel("sdpa", sdpa, {})
    seconds = measure(candidates, device, dtype, shape)
    name = min(seconds, key=lambda name: seconds[name])
    kernel = Kernel(name, BACKENDS[name].load(), seconds)
    log.info("Attention of %d tokens in %s: %s", shape.tokens, _name(dtype), kernel.describe())
    return kernel


def measure(names: list[str], device: torch.device, dtype: torch.dtype, shape: AttentionShape) -> dict[str, float]:
    """Seconds that kernels take for some heads of a self-attention: medians, in turn, so that all meet the same machine.

    Those whose result differs from torch's own are left out, with a warning, and so are those that run out of memory.

    Args:
        names: keys of `BACKENDS`; "sdpa" is always measured.
        device, dtype: of the queries.
        shape: as many of its heads are taken as are needed to fill a GPU.
    """
    heads = max(1, min(shape.heads, _MEASURED_SCORES // shape.tokens**2))
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn((1, shape.tokens, heads * shape.head_width), generator=generator).to(device, dtype) for _ in range(3))
    kernels = {"sdpa": sdpa}
    expected = sdpa(q, k, v, heads)
    for name in names:
        problem = _disagreement(BACKENDS[name].load(), (q, k, v), heads, expected)
        if problem is None:
            kernels[name] = BACKENDS[name].load()
        else:
            log.warning("Attention %s is left out: %s.", name, problem)
    rounds: dict[str, list[float]] = {name: [] for name in kernels}
    for _ in range(_ROUNDS):
        for name, attend in kernels.items():
            _wait(device)
            start = time.perf_counter()
            attend(q, k, v, heads)
            _wait(device)
            rounds[name].append(time.perf_counter() - start)
    return {name: median(values) for name, values in rounds.items()}


def _disagreement(attend: Attention, qkv: tuple[Tensor, Tensor, Tensor], heads: int, expected: Tensor) -> str | None:
    """Why a result is not what torch's own kernel gives; None if it is. This first call also warms the kernel up."""
    try:
        error = float((attend(*qkv, heads) - expected).float().norm() / expected.float().norm())
    except Exception as failure:  # noqa: BLE001 (as in `Backend`; here memory can run out, too)
        return first_line(failure)
    return None if error < _TOLERANCE else f"its result differs from torch's by {error:.2g} of it"  # NaN differs, too


def _wait(device: torch.device) -> None:
    """Until a device has done what it was told; a CPU has."""
    backend: Any = getattr(torch, device.type, None)
    if device.type != "cpu" and hasattr(backend, "synchronize"):
        backend.synchronize()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
