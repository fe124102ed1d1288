"""Weights stored in 8 bits or less: what kind each is, kept packed or turned into a type that plain PyTorch computes in.

Of safetensors these conventions are in circulation: bare float8 tensors, and float8 or int8 tensors with a scale beside
them (`X.scale_weight` with the marker `scaled_fp8`, or `X.weight_scale` with `X.comfy_quant`). In all of them the value
is `stored * scale`. In GGUF files the scales are among the bytes of the tensor.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import UnsupportedCheckpoint
from ..quantised import BY_NAME, Layout, unpack
from .header import TensorInfo
from .keymaps import is_quant_name

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
COMPUTE = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_SCALES = (".scale_weight", ".weight_scale")
_FORMAT = ".comfy_quant"
# Format by the marker -> its layout. "int8_tensorwise" may have one scale for each row.
_KNOWN_FORMATS = {"float8_e4m3fn": "float8_e4m3fn", "float8_e5m2": "float8_e5m2", "int8_tensorwise": "int8"}


def layout_of(name: str, tensors: Mapping[str, TensorInfo]) -> Layout | None:
    """How a tensor is packed; None for ordinary ones, and for integers that stand for nothing else.

    Args:
        name: in the file.
        tensors: all of the file.
    """
    info = tensors[name]
    if info.layout is not None:
        return info.layout
    if info.dtype in FLOAT8 or (info.dtype == torch.int8 and len(info.shape) == 2 and _scale_name(name, tensors)):
        return BY_NAME[info.stored_as]
    return None


def check_storage(names: Mapping[str, str], tensors: Mapping[str, TensorInfo]) -> None:
    """Refuses weights that cannot be turned into floating point numbers.

    Args:
        names: anything -> name in the file.
        tensors: all of the file.
    Raises:
        UnsupportedCheckpoint: a weight is stored as an integer or bool, without what would make a number of it.
    """
    wrong = sorted(name for name in names.values() if not is_quant_name(name)
                   and not tensors[name].dtype.is_floating_point and layout_of(name, tensors) is None)
    if wrong:
        raise UnsupportedCheckpoint(
            f"{len(wrong)} weights are stored as integers, the first is {wrong[0]} ({tensors[wrong[0]].stored_as}); expected "
            "bfloat16, float16, float32, float8, int8 with a weight_scale, or GGUF. Use another version of the file."
        )


def common_dtype(names: Mapping[str, str], tensors: Mapping[str, TensorInfo], *, kept: bool = False) -> torch.dtype:
    """The type for what is not packed: the one that most of it is stored in.

    Args:
        names, tensors: as in `check_storage`.
        kept: packed matrices stay packed. Otherwise the type is that of the unpacked ones, too, and bfloat16: beside
            packed matrices only biases and norms are left, often a few of them in float32.
    """
    sizes: Counter[torch.dtype] = Counter()
    for name in names.values():
        if tensors[name].dtype in COMPUTE and not is_quant_name(name):
            sizes[tensors[name].dtype] += tensors[name].num_elements
    unpacked = not kept and any(layout_of(name, tensors) is not None for name in names.values())
    return torch.bfloat16 if unpacked or not sizes else sizes.most_common(1)[0][0]


def companions(name: str) -> tuple[str, ...]:
    """Names of the tensors that `packed` looks for beside a weight."""
    base = name.removesuffix(".weight")
    return (base + _FORMAT, *(base + suffix for suffix in _SCALES))


def _scale_name(name: str, tensors: Mapping[str, object]) -> str | None:
    return next((found for found in companions(name)[1:] if found in tensors), None)


def packed(name: str, tensors: Mapping[str, Tensor], layout: Layout) -> tuple[Tensor, Tensor | None]:
    """The bytes of a weight, int8 [rows, bytes], and its scale.

    Args:
        name: in the file.
        tensors: it and its companions, among others.
        layout: of `layout_of`.
    Returns:
        bytes, a view; the scale float32, one number or [rows, 1], None where there is none.
    Raises:
        UnsupportedCheckpoint: a storage format of another kind.
    """
    marker = tensors.get(companions(name)[0])
    if marker is not None:
        _check_format(name, marker, layout)
    tensor = tensors[name]
    rows = tensor.shape[0] if tensor.ndim > 1 else 1
    scale_name = _scale_name(name, tensors)
    scale = None if scale_name is None else tensors[scale_name].float()
    if scale is not None and scale.numel() not in (1, rows):
        raise UnsupportedCheckpoint(f"{name} has a scale of shape {list(scale.shape)}, expected one number or {rows}, one for "
                                    "each row. Use an fp8 or bf16 version of the file.")
    if scale is not None:
        scale = scale.reshape(()) if scale.numel() == 1 else scale.reshape(rows, 1)
    return tensor.view(torch.int8).reshape(rows, -1), scale


def dequantise(name: str, tensors: Mapping[str, Tensor], info: TensorInfo, layout: Layout | None,
               dtype: torch.dtype) -> Tensor:
    """A weight as `dtype`.

    Args:
        name, tensors, layout: as in `packed`.
        info: of the header.
        dtype: the wanted type.
    Raises:
        UnsupportedCheckpoint: see `packed`.
    """
    if layout is None:
        return tensors[name].to(dtype)
    stored, scale = packed(name, tensors, layout)
    return unpack(layout, stored, scale, dtype).reshape(info.shape)


def _check_format(name: str, marker: Tensor, layout: Layout) -> None:
    try:
        found = json.loads(bytes(marker.flatten().tolist()))
        kind, rotated = found.get("format"), found.get("convrot", False)
    except (ValueError, TypeError, AttributeError):
        kind, rotated = None, False
    if rotated or _KNOWN_FORMATS.get(kind) != layout.name:
        described = f"{kind} with rotation" if rotated else kind
        raise UnsupportedCheckpoint(
            f"{name} is stored in the format {described!r}, expected one of "
            f"{', '.join(_KNOWN_FORMATS)}. Use an fp8 or bf16 version of the file."
        )
