"""Writes the trained frame interpolator, and measures it on triplets that training never saw."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..loading import interpolator_metadata, load_interpolator
from ..vfi import EMAVFI
from .recipe import TINY_VFI
from .vfi_data import Triplet, held_out_triplets
from .vfi_stage import stack

#: (first, second, position) -> the frame between.
Method = Callable[[Tensor, Tensor, Tensor], Tensor]
KINDS = ("shape", "sea", "clouds", "ball")
POSITIONS = (Fraction(1, 2), Fraction(1, 3))


def export_vfi(work: Path, target: Path) -> int:
    """Write the averaged weights in half precision as one file, with what the weights do not tell in its metadata.

    Args:
        work: folder of the training run (`vfi.pt`).
        target: the .safetensors file.

    Returns:
        Its size in bytes.
    """
    averaged = torch.load(work / "vfi.pt", map_location="cpu", weights_only=True)["ema"]["vfi"]
    target.parent.mkdir(parents=True, exist_ok=True)
    half = {name: value.to(torch.float16).contiguous() for name, value in averaged.items()}
    save_file(half, target, metadata={**interpolator_metadata(TINY_VFI), "title": "tiny EMA-VFI"})
    return target.stat().st_size


def repeat(first: Tensor, second: Tensor, position: Tensor) -> Tensor:
    """Return the nearer of both frames, the first one in the middle."""
    return torch.where(position <= 0.5, first, second)


def blend(first: Tensor, second: Tensor, position: Tensor) -> Tensor:
    """Return both frames laid over each other, the nearer one stronger."""
    return torch.lerp(first, second, position)


def interpolate(model: EMAVFI) -> Method:
    """Return what ``model`` puts between two frames."""
    def method(first: Tensor, second: Tensor, position: Tensor) -> Tensor:
        with torch.no_grad():
            return model.between(model.extract_features(first), model.extract_features(second), [position])[0]

    return method


def psnr(frames: Tensor, target: Tensor) -> Tensor:
    """Return the PSNR in dB of each of ``frames [B, 3, H, W]`` in [0, 1], at most 60: a still pair has no error."""
    error = (frames - target).square().mean(dim=(1, 2, 3))
    return -10 * torch.log10(error.clamp(min=1e-6))


def measure(methods: Sequence[Method], triplets: list[Triplet]) -> list[float]:
    """Return the mean PSNR in dB of each method."""
    first, between, second, position = stack(triplets)
    return [float(psnr(method(first, second, position), between).mean()) for method in methods]


def evaluate_vfi(path: Path, count: int = 48) -> dict[str, list[float]]:
    """Return, per kind of scene and position, the mean PSNR of the model, of repeated frames and of blended ones.

    Args:
        path: the .safetensors file.
        count: triplets of each kind.
    """
    methods = (interpolate(load_interpolator(path)), repeat, blend)
    return {f"{kind} {position}": measure(methods, held_out_triplets(kind, count, position))
            for kind in KINDS for position in POSITIONS}
