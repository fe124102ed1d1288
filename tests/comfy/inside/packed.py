"""A text encoder as GGUF loaders hand it to ComfyUI: packed weights, unpacked by operations of their own.

`write_gguf` makes a real file (package `gguf`); `PackedOps` does with a state dict what such a loader does with one: its
tensors report the shape of the matrix while they hold blocks of bytes, and layers have no weight before they are loaded.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.ops
import comfy.sd
import torch
from torch import Tensor, nn

BLOCK = 32  # weights that share a scale, in the format Q8_0: 2 bytes of scale, then one byte each

# T5's names in a GGUF file.
NAMES = {
    "encoder.block.": "enc.blk.", "shared.": "token_embd.", "encoder.final_layer_norm": "enc.output_norm",
    "layer.0.SelfAttention.relative_attention_bias": "attn_rel_b", "layer.0.SelfAttention.": "attn_",
    "layer.0.layer_norm": "attn_norm", "layer.1.DenseReluDense.wi_0": "ffn_gate", "layer.1.DenseReluDense.wi_1": "ffn_up",
    "layer.1.DenseReluDense.wo": "ffn_down", "layer.1.layer_norm": "ffn_norm",
}


def is_packed(name: str, tensor: Tensor) -> bool:
    """Matrices are; norms and the position table stay as they are."""
    return tensor.ndim == 2 and "relative_attention_bias" not in name


def without_loss(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The nearest weights that packing does not change, without the copy of the embedding."""
    return {name: PackedTensor.pack(t).unpack(t.dtype) if is_packed(name, t) else t for name, t in weights.items()
            if name != "encoder.embed_tokens.weight"}


def write_gguf(weights: Mapping[str, Tensor], path: Path) -> None:
    """Writes a T5 encoder, matrices in Q8_0."""
    import gguf

    writer = gguf.GGUFWriter(str(path), "t5encoder")
    for name, tensor in weights.items():
        stored = name
        for ours, theirs in NAMES.items():
            stored = stored.replace(ours, theirs)
        if is_packed(name, tensor):
            data = gguf.quants.quantize(tensor.float().numpy(), gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(stored, data, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(stored, tensor.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class PackedTensor(Tensor):
    """Bytes that call themselves a matrix of `matrix_shape`."""

    matrix_shape: torch.Size

    @staticmethod
    def pack(matrix: Tensor) -> "PackedTensor":
        blocks = matrix.float().reshape(-1, BLOCK)
        scale = (blocks.abs().amax(1, keepdim=True) / 127).clamp(min=1e-8)
        stored = torch.cat([scale.half().view(torch.uint8), (blocks / scale).round().to(torch.int8).view(torch.uint8)], 1)
        return PackedTensor.around(stored.reshape(len(matrix), -1), matrix.shape)

    @staticmethod
    def around(stored: Tensor, shape: torch.Size) -> "PackedTensor":
        packed = stored.as_subclass(PackedTensor)
        packed.matrix_shape = shape
        return packed

    def unpack(self, dtype: torch.dtype) -> Tensor:
        blocks = self.as_subclass(Tensor).reshape(-1, BLOCK + 2)
        scale, codes = blocks[:, :2].contiguous().view(torch.float16), blocks[:, 2:].contiguous().view(torch.int8)
        return (scale.float() * codes).reshape(self.matrix_shape).to(dtype)

    @property
    def shape(self) -> torch.Size:
        return self.matrix_shape

    def to(self, *args: Any, **kwargs: Any) -> "PackedTensor":
        return PackedTensor.around(self.as_subclass(Tensor).to(*args, **kwargs), self.matrix_shape)

    def clone(self, *args: Any, **kwargs: Any) -> "PackedTensor":
        return self

    def detach(self) -> "PackedTensor":
        return self


class _PackedLayer:
    """Takes whatever the state dict holds as its weight."""

    def _load_from_state_dict(self, state_dict: Mapping[str, Tensor], prefix: str, *args: Any) -> None:
        weight = state_dict.get(f"{prefix}weight")
        if isinstance(weight, PackedTensor):
            self.weight = nn.Parameter(weight, requires_grad=False)
        else:
            super()._load_from_state_dict(state_dict, prefix, *args)


class PackedOps(comfy.ops.manual_cast):
    """Operations that unpack their weight each time."""

    class Linear(_PackedLayer, comfy.ops.manual_cast.Linear):
        def __init__(self, in_features: int, out_features: int, bias: bool = True, device: Any = None, dtype: Any = None) -> None:
            nn.Module.__init__(self)
            self.in_features, self.out_features = in_features, out_features
            self.weight = self.bias = None

        def forward_comfy_cast_weights(self, input: Tensor) -> Tensor:
            return nn.functional.linear(input, self.weight.unpack(input.dtype))

    class Embedding(_PackedLayer, comfy.ops.manual_cast.Embedding):
        def forward_comfy_cast_weights(self, input: Tensor, out_dtype: Any = None) -> Tensor:
            if not isinstance(self.weight, PackedTensor):
                return super().forward_comfy_cast_weights(input, out_dtype=out_dtype)
            return nn.functional.embedding(input, self.weight.unpack(out_dtype or torch.float32))


@contextmanager
def small_t5(sizes: Mapping[str, Any]) -> Iterator[None]:
    """Lets ComfyUI build a T5 of these sizes where it knows that of the XXL model only."""
    known, load = comfy.sd.detect_te_model, comfy.sd.load_text_encoder_state_dicts

    def with_sizes(*args: Any, model_options: dict[str, Any], **kwargs: Any) -> Any:
        return load(*args, model_options={**model_options, "t5xxl_model_config": dict(sizes)}, **kwargs)

    comfy.sd.detect_te_model, comfy.sd.load_text_encoder_state_dicts = lambda weights: comfy.sd.TEModel.T5_XXL, with_sizes
    try:
        yield
    finally:
        comfy.sd.detect_te_model, comfy.sd.load_text_encoder_state_dicts = known, load


def load_packed_clip(weights: Mapping[str, Tensor]) -> Any:
    """A CLIP of type mochi, through the same door as GGUF loaders take."""
    packed = {name: PackedTensor.pack(t) if is_packed(name, t) else t for name, t in weights.items()}
    return comfy.sd.load_text_encoder_state_dicts(
        [packed], clip_type=comfy.sd.CLIPType.MOCHI, model_options={
            "custom_operations": PackedOps, "initial_device": comfy.model_management.text_encoder_offload_device()})
