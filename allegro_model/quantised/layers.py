"""Layers whose matrix stays packed in memory and is unpacked, as a whole, each time it is used.

The bytes are an ordinary parameter of type int8 (whatever they stand for), so that they move with `.to(device)`;
`.to(dtype)` leaves them, and the scales beside them, as they are. The result is in the dtype of the input. What is
unpacked is gone when the layer is done: at most one matrix at a time exists in full.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layouts import Layout, unpack


class QuantisedLayer(nn.Module):
    """A packed matrix.

    Args:
        layout: of the bytes.
        rows, columns: of the matrix.
        scale_shape: of the scale beside it; None where there is none.
        device: of the parameters, which are not filled.
    """

    def __init__(self, layout: Layout, rows: int, columns: int, *, scale_shape: tuple[int, ...] | None = None,
                 device: torch.device | str | None = None) -> None:
        super().__init__()
        self.layout = layout
        self.rows, self.columns = rows, columns
        # int8: transformers casts the input of one of T5's layers to any other type that it finds here.
        self.weight = nn.Parameter(torch.empty(rows, layout.row_bytes(columns), dtype=torch.int8, device=device),
                                   requires_grad=False)
        scale = None if scale_shape is None else torch.empty(scale_shape, dtype=torch.float32, device=device)
        self.weight_scale: nn.Parameter | None
        self.register_parameter("weight_scale", None if scale is None else nn.Parameter(scale, requires_grad=False))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantisedLayer:
        """Moves everything, but never casts the scale: what was packed is not worth less precision."""
        scale = self._parameters.pop("weight_scale")
        try:
            super()._apply(fn, recurse)
            if scale is not None:
                moved = fn(scale.detach())
                moved = moved if moved.dtype == scale.dtype else scale.detach().to(moved.device)
                scale = nn.Parameter(moved, requires_grad=False)
        finally:  # memory may run out half-way, and whoever makes room tries again
            self._parameters["weight_scale"] = scale
        return self

    def dense(self, dtype: torch.dtype, index: Tensor | None = None, device: torch.device | None = None) -> Tensor:
        """The matrix [rows, columns], or some of its rows; the bytes go to `device` first, by default where they are."""
        stored = self.weight.to(device)
        scale = None if self.weight_scale is None else self.weight_scale.to(device)
        if index is not None:
            stored, scale = stored[index], scale[index] if scale is not None and scale.ndim else scale
        return unpack(self.layout, stored, scale, dtype)

    def extra_repr(self) -> str:
        return f"{self.rows}, {self.columns}, {self.layout.name}"


class QuantisedLinear(QuantisedLayer):
    """`nn.Linear` with a packed matrix, and room for what LoRAs add to it.

    Args:
        layout, scale_shape, device: as in `QuantisedLayer`.
        in_features, out_features, bias: as in `nn.Linear`.
        dtype: of the bias.
    """

    down: Tensor | None
    up: Tensor | None

    def __init__(self, layout: Layout, in_features: int, out_features: int, *, bias: bool = True,
                 dtype: torch.dtype | None = None, **kwargs: Any) -> None:
        super().__init__(layout, out_features, in_features, **kwargs)
        self.in_features, self.out_features = in_features, out_features
        empty = torch.empty(out_features, dtype=dtype, device=kwargs.get("device")) if bias else None
        self.bias: nn.Parameter | None
        self.register_parameter("bias", None if empty is None else nn.Parameter(empty, requires_grad=False))
        self.register_buffer("down", None, persistent=False)  # [R, in], all LoRAs together
        self.register_buffer("up", None, persistent=False)  # [out, R], with their strengths
        self._copied: tuple[Tensor, ...] | None = None  # both, and both as the input needs them

    def add_low_rank(self, down: Tensor, up: Tensor, factor: float) -> None:
        """Adds factor * up @ down to the matrix, without unpacking it.

        The two factors stay beside it: they are exact, where packing the sum would round it again, and take a few
        percent of its memory.

        Args:
            down: [rank, in].
            up: [out, rank].
            factor: strength * alpha / rank.
        """
        device = self.weight.device
        self.down, self.up = stack_low_rank(self.down, self.up, down.to(device), up.to(device), factor)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out] in the dtype of `x`, and on its device, wherever a host keeps the bytes."""
        y = F.linear(x, self.dense(x.dtype, device=x.device), None if self.bias is None else self.bias.to(x))
        if self.down is not None and self.up is not None:
            down, up = self._low_rank(self.down, self.up, x)
            y = y + F.linear(F.linear(x, down), up)
        return y

    def _low_rank(self, down: Tensor, up: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Both factors on the device and in the dtype of `x`; where that takes a copy it is kept until they change or move."""
        if (down.device, down.dtype) == (x.device, x.dtype) or torch.compiler.is_compiling():
            return down.to(x), up.to(x)
        kept = self._copied
        if kept is None or kept[0] is not down or kept[1] is not up or (kept[2].device, kept[2].dtype) != (x.device, x.dtype):
            with torch.inference_mode(False), torch.no_grad():  # they must serve a later run that has gradients
                self._copied = kept = (down, up, down.to(x, copy=True), up.to(x, copy=True))
        return kept[2], kept[3]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantisedLayer:
        """Copies of the factors do not stay on a device that the bytes leave."""
        self._copied = None
        return super()._apply(fn, recurse)


def stack_low_rank(first_down: Tensor | None, first_up: Tensor | None, down: Tensor, up: Tensor,
                   factor: float) -> tuple[Tensor, Tensor]:
    """`down` and `up` of a `QuantisedLinear` with one LoRA more; those it has already are not changed.

    Args:
        first_down, first_up: [R, in] and [out, R] of the LoRAs before; None where there is none.
        down, up, factor: as in `QuantisedLinear.add_low_rank`.
    """
    down, up = down.float(), factor * up.float()
    return (down if first_down is None else torch.cat([first_down, down]),
            up if first_up is None else torch.cat([first_up, up], 1))


class QuantisedEmbedding(QuantisedLayer):
    """`nn.Embedding` with a packed table, of which only the rows that are asked for are unpacked.

    Args:
        layout, scale_shape, device: as in `QuantisedLayer`.
        num_embeddings, embedding_dim: as in `nn.Embedding`.
        dtype: of the result.
    """

    like: Tensor

    def __init__(self, layout: Layout, num_embeddings: int, embedding_dim: int, *, dtype: torch.dtype,
                 **kwargs: Any) -> None:
        super().__init__(layout, num_embeddings, embedding_dim, **kwargs)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        # Tells the dtype, which no parameter does, and follows `.to(dtype)`. Never on the meta device: it is not filled.
        self.register_buffer("like", torch.empty(0, dtype=dtype, device="cpu"), persistent=False)

    def forward(self, index: Tensor) -> Tensor:
        """int64 [...] -> [..., columns]."""
        return self.dense(self.like.dtype, index.flatten()).unflatten(0, index.shape)


def install(model: nn.Module, layouts: Mapping[str, Layout], state: Mapping[str, Tensor]) -> None:
    """Puts quantised layers in the place of layers whose matrix is packed; they are still to be filled.

    Args:
        model: its Linear and Embedding layers are replaced.
        layouts: name of the weight -> how it is packed; see `can_stay_packed`.
        state: what the model is going to be filled with: tells the scales, and the dtype of what is not packed.
    """
    dtype = next((t.dtype for name, t in state.items() if name not in layouts and not name.endswith("_scale")), torch.float32)
    for name, layout in layouts.items():
        path, _, attribute = name.removesuffix(".weight").rpartition(".")
        parent = model.get_submodule(path)
        layer = getattr(parent, attribute)
        scale = state.get(f"{name}_scale")
        shared: dict[str, Any] = {"scale_shape": None if scale is None else tuple(scale.shape), "dtype": dtype,
                                  "device": getattr(layer.weight, "device", None)}  # a host may allocate later
        new: QuantisedLayer
        if isinstance(layer, nn.Linear):
            new = QuantisedLinear(layout, layer.in_features, layer.out_features, bias=f"{name.removesuffix('weight')}bias" in state,
                                  **shared)
        else:
            new = QuantisedEmbedding(layout, layer.num_embeddings, layer.embedding_dim, **shared)
        setattr(parent, attribute, new)


def can_stay_packed(model: nn.Module, name: str) -> bool:
    """Whether `install` has a layer for a parameter: the matrix of a Linear or Embedding."""
    path, _, attribute = name.rpartition(".")
    return attribute == "weight" and isinstance(model.get_submodule(path), nn.Linear | nn.Embedding)


def weight_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a model's parameters as if none were quantised."""
    layers = {f"{name}." * bool(name): layer for name, layer in model.named_modules() if isinstance(layer, QuantisedLayer)}
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for prefix, layer in layers.items():
        shapes.pop(f"{prefix}weight_scale", None)
        shapes[f"{prefix}weight"] = (layer.rows, layer.columns)
    return shapes
