"""What is this checkpoint? Decided by tensor names and shapes, never by the name of the file."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from . import keymaps
from .dimensions import block_count
from .header import TensorInfo
from .other_models import UNKNOWN, other_title

Shapes = Mapping[str, tuple[int, ...]]

TI2V_MARK = "pos_embed_masked_video.0.proj.weight"


@dataclass(frozen=True)
class CheckpointInfo:
    """The answer of `identify`.

    Attributes:
        family: "allegro-dit", "allegro-vae", "t5-encoder", "lora", "ema-vfi", "bundle" (several of them in
            one file) or "unknown".
        variant: "t2v" or "ti2v" for a transformer, "full", "encoder" or "decoder" for a VAE, the size of a
            T5, "ours" or "ours_small" for EMA-VFI; None where there is none.
        title: one line for people; for unknown files it says what they look like.
        dtypes: storage types, the one with most of the weights first, e.g. ("bfloat16",) or ("Q8_0", "float32"); empty if not given.
        num_parameters: numbers in the weights.
        num_bytes: their size; None if the storage types were not given.
        prefix: what stands in front of our names in the file.
        parts: of a bundle, what it is made of.
    """

    family: str
    variant: str | None
    title: str
    dtypes: tuple[str, ...]
    num_parameters: int
    num_bytes: int | None
    prefix: str = ""
    parts: tuple[CheckpointInfo, ...] = ()


def identify(
    shapes: Shapes,
    *,
    tensors: Mapping[str, TensorInfo] | None = None,
    metadata: Mapping[str, str] | None = None,
    config: Mapping[str, Any] | None = None,
) -> CheckpointInfo:
    """Recognises a checkpoint; never fails: what it does not know has the family "unknown".

    Args:
        shapes: tensor name -> shape, names as in the file.
        tensors: tensor name -> how it is stored; adds types and sizes to the answer.
        metadata, config: of the file; used only to say more about unknown ones.
    """
    groups = keymaps.split_prefixes(shapes)
    lora = _lora_title(shapes)
    if lora is not None:
        return _info("lora", None, lora, "", {name: name for name in shapes}, shapes, tensors)
    parts = [_identify_group(prefix, names, shapes, tensors) for prefix, names in groups.items()]
    known = [part for part in parts if part.family != "unknown"]
    if len(parts) == 1:
        found = parts[0]
    else:
        found = _info(
            "bundle" if known else "unknown",
            None,
            "several models in one file: " + "; ".join(part.title for part in known) if known else UNKNOWN,
            "",
            {name: name for name in shapes},
            shapes,
            tensors,
        )
        found = replace(found, parts=tuple(known))
    if not shapes:
        return replace(found, title="a file without tensors")
    if found.title == UNKNOWN:
        return replace(found, title=_describe_unknown(metadata or {}, config or {}))
    return found


def _identify_group(
    prefix: str, names: Mapping[str, str], shapes: Shapes, tensors: Mapping[str, TensorInfo] | None
) -> CheckpointInfo:
    local = {
        stripped: shapes[name] for stripped, name in names.items() if not keymaps.is_quant_name(stripped)
    }
    for recognise in _FAMILIES:
        found = recognise(local)
        if found is not None:
            family, variant, title = found
            return _info(family, variant, title, prefix, names, shapes, tensors)
    return _info("unknown", None, other_title(local), prefix, names, shapes, tensors)


def _info(
    family: str,
    variant: str | None,
    title: str,
    prefix: str,
    names: Mapping[str, str],
    shapes: Shapes,
    tensors: Mapping[str, TensorInfo] | None,
) -> CheckpointInfo:
    """Adds the sums; the two names of the T5 embedding are one tensor and count once."""
    tied = "encoder.embed_tokens.weight" if family == "t5-encoder" and "shared.weight" in names else None
    elements: Counter[str] = Counter()
    num_parameters, num_bytes = 0, 0
    for stripped, name in names.items():
        if keymaps.is_quant_name(stripped) or stripped == tied:
            continue
        count = math.prod(shapes[name])
        num_parameters += count
        if tensors is not None:
            elements[tensors[name].stored_as] += count
            num_bytes += tensors[name].num_bytes
    return CheckpointInfo(
        family,
        variant,
        title,
        tuple(kind for kind, _ in elements.most_common()),
        num_parameters,
        num_bytes if tensors is not None else None,
        prefix,
    )


# The families we use

Found = tuple[str, str | None, str]  # family, variant, title

# Names by which a family is known. A transformer that lacks one or two of its own is still recognised, so that
# the error can say which.
MARKS: dict[str, tuple[str, ...]] = {
    "allegro-dit": (
        "pos_embed.proj.weight",
        "adaln_single.linear.weight",
        "caption_projection.linear_1.weight",
        "transformer_blocks.0.attn1.to_q.weight",
        "transformer_blocks.0.attn2.to_q.weight",
        "scale_shift_table",
        "proj_out.weight",
    ),
    "allegro-vae": (
        "encoder.temp_conv_in.weight",
        "encoder.down_blocks.0.temp_convs.0.conv1.2.weight",
        "quant_conv.weight",
        "decoder.temp_conv_in.weight",
        "decoder.up_blocks.0.temp_convs.0.conv1.2.weight",
        "post_quant_conv.weight",
    ),
    "t5-encoder": (
        "shared.weight",
        "encoder.block.0.layer.0.SelfAttention.q.weight",
        "encoder.block.0.layer.1.DenseReluDense.wi_0.weight",
        "encoder.final_layer_norm.weight",
    ),
    "ema-vfi": (
        "feature_bone.block1.conv.0.weight",
        "feature_bone.patch_embed4.layers.6.weight",
        "feature_bone.block5.0.attn.cor_embed.weight",
        "block.1.conv.2.1.weight",
        "unet.up3.0.weight",
    ),
}


def _allegro_dit(shapes: Shapes) -> Found | None:
    foreign = other_title(shapes) != UNKNOWN or "pos_embed.pos_embed" in shapes
    if foreign or sum(mark in shapes for mark in MARKS["allegro-dit"]) < len(MARKS["allegro-dit"]) - 2:
        return None
    layers = block_count(shapes, "transformer_blocks")
    if TI2V_MARK in shapes:
        return "allegro-dit", "ti2v", f"Allegro image-to-video transformer (TI2V), {layers} layers"
    return "allegro-dit", "t2v", f"Allegro text-to-video transformer, {layers} layers"


def _allegro_vae(shapes: Shapes) -> Found | None:
    # Only this VAE has temporal convolutions of this name beside two-dimensional ones.
    if not any(".temp_convs." in name or ".temp_conv_in." in name for name in shapes):
        return None
    halves = [half for half in ("encoder", "decoder") if any(name.startswith(half + ".") for name in shapes)]
    if not halves:
        return None
    part = "full" if len(halves) == 2 else halves[0]
    return (
        "allegro-vae",
        part,
        "Allegro VideoVAE" if part == "full" else f"Allegro VideoVAE, {part} half only",
    )


_T5_SIZES = {512: "small", 768: "base", 1024: "large", 2048: "xl", 4096: "xxl"}


def _t5(shapes: Shapes) -> Found | None:
    query = shapes.get("encoder.block.0.layer.0.SelfAttention.q.weight")
    if query is None:
        return None
    if "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight" in shapes:
        return "unknown", None, "a UMT5 text encoder (used by Wan and others), not T5 v1.1"
    layers = block_count(shapes, "encoder.block")
    if "encoder.block.0.layer.1.DenseReluDense.wi_0.weight" not in shapes:
        return "unknown", None, "a text encoder of the first T5 version, not T5 v1.1"
    size = _T5_SIZES.get(query[1])
    label = f" {size.upper() if size in ('xl', 'xxl') else size}" if size else ""
    title = f"T5 v1.1{label} text encoder, {layers} layers of width {query[1]}"
    if any(name.startswith("decoder.block.") for name in shapes):
        title += ", with the decoder (unused)"
    return "t5-encoder", size, title


def _ema_vfi(shapes: Shapes) -> Found | None:
    first = shapes.get("feature_bone.block1.conv.0.weight")
    if first is None or not any(name.startswith("unet.") for name in shapes):
        return None
    variant = {32: "ours", 16: "ours_small"}.get(first[0])
    return "ema-vfi", variant, f"EMA-VFI frame interpolation ({variant or f'{first[0]} channels'})"


_FAMILIES: tuple[Callable[[Shapes], Found | None], ...] = (_allegro_vae, _t5, _ema_vfi, _allegro_dit)


_LORA = re.compile(r"(.+?)\.(lora_A|lora_down|lora\.down|lora_linear_layer\.down)(\.default)?\.weight")
_LORA_LIKE = re.compile(r".*\.(lora_\w+|hada_w1_a|lokr_w1|oft_blocks|diff|dora_scale)(\..*)?")


def _lora_title(shapes: Shapes) -> str | None:
    pairs = [name for name in shapes if _LORA.fullmatch(name)]
    if pairs:
        ranks = sorted({min(shapes[name], default=0) for name in pairs})
        return f"a LoRA ({len(pairs)} layers, rank {', '.join(map(str, ranks[:4]))})"
    if shapes and all(_LORA_LIKE.fullmatch(name) or name.endswith(".alpha") for name in shapes):
        return "a LoRA or similar adapter"
    return None


def _describe_unknown(metadata: Mapping[str, str], config: Mapping[str, Any]) -> str:
    """Uses what the file says about itself where the tensors say nothing."""
    claims = (config.get("_class_name"), config.get("model_type"), metadata.get("modelspec.architecture"))
    claim = next((c for c in claims if isinstance(c, str) and c), None)
    return f"{UNKNOWN}, it calls itself {json.dumps(claim[:60])}" if claim else UNKNOWN
