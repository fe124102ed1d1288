"""Names of tensors: from the layouts files come in to the one our modules have.

Our names are the published ones, which the official code and diffusers share, so there is little to rename:
a prefix that another program put in front, the attention of older VAE files, and the companions of scaled
weights. What no table knows keeps its name, and the strict comparison in `build` then refuses it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

from ..errors import CheckpointMismatch

# Longest first: the first that fits is taken off.
PREFIXES = (
    "text_encoders.t5xxl.transformer.",  # ComfyUI, all-in-one files
    "text_encoders.t5xxl.",
    "model.diffusion_model.",  # ComfyUI and the original latent diffusion code
    "first_stage_model.",
    "diffusion_model.",
    "text_encoder.",
    "transformer.",
    "module.",  # data-parallel training
    "vae.",
)

# Attention of the VAE, as diffusers named it before 0.18 -> as it is named now.
VAE_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_VAE_ATTENTION = re.compile(r"(.*\.attentions\.\d+)\.(query|key|value|proj_attn)\.(weight|bias)")

# Tensors that belong to the storage of another tensor, not to the network; `quant` reads them.
QUANT_SUFFIXES = (".scale_weight", ".weight_scale", ".scale_input", ".input_scale", ".comfy_quant")
QUANT_MARKER = "scaled_fp8"

# The embedding of T5 has two names for one tensor; files hold either or both.
T5_TIED = ("encoder.embed_tokens.weight", "shared.weight")
# Entries of a text encoder file that its network has no use for.
_T5_UNUSED = re.compile(r"lm_head\..*|decoder\..*")
# Buffers that the reference's attention leaves in its checkpoints, with the shape of the last picture it saw.
_VFI_BUFFERS = re.compile(r"(.*\.)?(attn_mask|HW)")
# The names of T5 in GGUF files, which llama.cpp gave them: in theirs -> in ours.
T5_GGUF_ARCHITECTURES = ("t5", "t5encoder")
_T5_GGUF = {
    "token_embd": "shared",
    "enc.output_norm": "encoder.final_layer_norm",
}
_T5_GGUF_BLOCK = {
    "attn_q": "0.SelfAttention.q",
    "attn_k": "0.SelfAttention.k",
    "attn_v": "0.SelfAttention.v",
    "attn_o": "0.SelfAttention.o",
    "attn_rel_b": "0.SelfAttention.relative_attention_bias",
    "attn_norm": "0.layer_norm",
    "ffn_gate": "1.DenseReluDense.wi_0",
    "ffn_up": "1.DenseReluDense.wi_1",
    "ffn_down": "1.DenseReluDense.wo",
    "ffn_norm": "1.layer_norm",
}
_T5_TO_GGUF, _T5_TO_GGUF_BLOCK = ({ours: theirs for theirs, ours in table.items()} for table in (_T5_GGUF, _T5_GGUF_BLOCK))
_LOGIT_SCALE = "logit_scale"  # ComfyUI keeps one beside every text encoder it saves


def is_quant_name(name: str) -> bool:
    """True for the companions of a scaled weight and the marker of a scaled file."""
    return name.endswith(QUANT_SUFFIXES) or name == QUANT_MARKER


def split_prefixes(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """Sorts tensor names by the known prefix they carry.

    Returns:
        {prefix: {name without prefix: name}}; names without a known prefix are under "". A group without
        weights (markers of scaled files) is left out.
    """
    groups: dict[str, dict[str, str]] = {}
    for name in names:
        prefix = next((p for p in PREFIXES if name.startswith(p)), "")
        groups.setdefault(prefix, {})[name[len(prefix) :]] = name
    return {
        prefix: group
        for prefix, group in groups.items()
        if not all(is_quant_name(name) or name == _LOGIT_SCALE for name in group)
    }


def native_name(name: str, family: str) -> str | None:
    """Our name of a tensor, prefix already removed; None for an entry that is to be left out.

    Args:
        name: as in the file.
        family: "allegro-dit", "allegro-vae", "t5-encoder", "ema-vfi", ...: the tables differ.
    """
    if family == "allegro-vae" and (match := _VAE_ATTENTION.fullmatch(name)):
        return f"{match[1]}.{VAE_ATTENTION[match[2]]}.{match[3]}"
    if family == "t5-encoder" and _T5_UNUSED.fullmatch(name):
        return None
    if family == "ema-vfi" and _VFI_BUFFERS.fullmatch(name):
        return None
    return name


def native_names(names: Mapping[str, str], family: str) -> dict[str, str]:
    """{our name: name in the file} for one group of `split_prefixes`; companions of scaled weights left out.

    Raises:
        CheckpointMismatch: two tensors of the file mean the same one.
    """
    result: dict[str, str] = {}
    for stripped, name in names.items():
        native = native_name(stripped, family)
        if native is None or is_quant_name(stripped):
            continue
        if family == "t5-encoder" and native == T5_TIED[0]:
            if T5_TIED[1] in names:
                continue
            native = T5_TIED[1]
        if native in result:
            raise CheckpointMismatch(
                f"{result[native]} and {name} both mean {native}. The file mixes an old and a new "
                "layout; download it again."
            )
        result[native] = name
    return result


def native_shape(name: str, shape: tuple[int, ...], family: str) -> tuple[int, ...]:
    """The shape under our name: older VAE files store attention as a 1x1 convolution."""
    if family == "allegro-vae" and ".attentions." in name and len(shape) == 4 and shape[2:] == (1, 1):
        return shape[:2]
    return shape


def native_tensor(name: str, tensor: Tensor, family: str) -> Tensor:
    """The tensor under our name, a view; see `native_shape`."""
    return tensor.reshape(native_shape(name, tuple(tensor.shape), family))


def t5_name(name: str) -> str:
    """The published name of a T5 tensor in a GGUF file; a name of another kind stays."""
    if name.startswith("dec."):
        return "decoder." + name.removeprefix("dec.")  # left out as the decoder of other files is
    stem, _, end = name.rpartition(".")
    match = re.fullmatch(r"enc\.blk\.(\d{1,6})\.(\w+)", stem)
    if match and match[2] in _T5_GGUF_BLOCK:
        return f"encoder.block.{match[1]}.layer.{_T5_GGUF_BLOCK[match[2]]}.{end}"
    return f"{_T5_GGUF.get(stem, stem)}.{end}"


def t5_gguf_name(name: str) -> str:
    """The reverse of `t5_name`."""
    stem, _, end = name.rpartition(".")
    match = re.fullmatch(r"encoder\.block\.(\d{1,6})\.layer\.(.+)", stem)
    if match and match[2] in _T5_TO_GGUF_BLOCK:
        return f"enc.blk.{match[1]}.{_T5_TO_GGUF_BLOCK[match[2]]}.{end}"
    return f"{_T5_TO_GGUF.get(stem, stem)}.{end}"
