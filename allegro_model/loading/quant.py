"""Weights stored in 8 bits: read back to a type that plain PyTorch computes in.

Two conventions are in circulation: bare float8 tensors, and float8 tensors with a scale beside them
(`X.scale_weight` with the marker `scaled_fp8`, or `X.weight_scale` with `X.comfy_quant`). In both the value
is `stored * scale`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import UnsupportedCheckpoint
from .header import TensorInfo
from .keymaps import is_quant_name

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
COMPUTE = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_SCALES = (".scale_weight", ".weight_scale")
_FORMAT = ".comfy_quant"
_KNOWN_FORMATS = ("float8_e4m3fn", "float8_e5m2")


def check_storage(tensors: Mapping[str, TensorInfo]) -> None:
    """Refuses weights that cannot be turned into floating point numbers.

    Raises:
        UnsupportedCheckpoint: a weight is stored as an integer or bool.
    """
    wrong = sorted(
        name for name, info in tensors.items() if not is_quant_name(name) and not info.dtype.is_floating_point
    )
    if wrong:
        kind = str(tensors[wrong[0]].dtype).removeprefix("torch.")
        raise UnsupportedCheckpoint(
            f"{len(wrong)} weights are stored as integers, the first is {wrong[0]} ({kind}); expected bfloat16, "
            "float16, float32 or float8. Use an unquantised or fp8 version of the file."
        )


def common_dtype(tensors: Mapping[str, TensorInfo]) -> torch.dtype:
    """The type most of the weights are stored in; bfloat16 where all of them are float8."""
    sizes: Counter[torch.dtype] = Counter()
    for name, info in tensors.items():
        if info.dtype in COMPUTE and not is_quant_name(name):
            sizes[info.dtype] += info.num_elements
    has_float8 = any(info.dtype in FLOAT8 for info in tensors.values())
    # Beside float8 matrices only biases and norms are left, often a few of them in float32.
    return torch.bfloat16 if has_float8 or not sizes else sizes.most_common(1)[0][0]


def companions(name: str) -> tuple[str, ...]:
    """Names of the tensors `dequantise` looks for beside a weight."""
    base = name.removesuffix(".weight")
    return (base + _FORMAT, *(base + suffix for suffix in _SCALES))


def dequantise(name: str, tensor: Tensor, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    """`tensor` as `dtype`, multiplied by its scale if the file holds one.

    Args:
        name: of the tensor, in the file.
        tensors: its companions, among others.
        dtype: the wanted type.
    Raises:
        UnsupportedCheckpoint: a storage format other than float8.
    """
    if tensor.dtype not in FLOAT8:
        return tensor.to(dtype)
    marker, *scales = (tensors.get(companion) for companion in companions(name))
    if marker is not None:
        _check_format(name, marker)
    scale = next((found for found in scales if found is not None), None)
    if scale is None:
        return tensor.to(dtype)
    # One scale per tensor, or one per output row.
    scale = scale.float()
    if scale.numel() > 1:
        scale = scale.reshape(-1, *(1,) * (tensor.ndim - 1))
    return (tensor.float() * scale).to(dtype)


def _check_format(name: str, marker: Tensor) -> None:
    try:
        found = json.loads(bytes(marker.flatten().tolist())).get("format")
    except (ValueError, TypeError, AttributeError):
        found = None
    if found not in _KNOWN_FORMATS:
        raise UnsupportedCheckpoint(
            f"{name} is stored in the format {found!r}, expected one of "
            f"{', '.join(_KNOWN_FORMATS)}. Use an fp8 or bf16 version of the file."
        )
