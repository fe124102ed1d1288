"""Configurations from the shapes of a checkpoint; a `config.json` adds what shapes cannot tell."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from ..config import PRESETS, VAE_NAMES, DiTConfig, VAEConfig
from ..errors import CheckpointMismatch, UnsupportedCheckpoint

logger = logging.getLogger(__name__)

Shapes = Mapping[str, tuple[int, ...]]

RELEASED_HEAD_DIM = 96


def block_count(shapes: Iterable[str], stem: str) -> int:
    """Number of `stem.0`, `stem.1`, ...: the highest index + 1, 0 if there is none.

    Never more than there are tensors below `stem`, so that one invented name cannot ask for a giant network.
    """
    pattern = re.compile(re.escape(stem) + r"\.(\d{1,6})\.")
    indices = [int(match[1]) for match in map(pattern.match, shapes) if match]
    return min(max(indices, default=-1) + 1, len(indices))


def dit_config_from_shapes(shapes: Shapes, config: Mapping[str, Any] | None = None) -> DiTConfig:
    """Derives the sizes of a transformer.

    Args:
        shapes: our tensor names -> shapes. Where a tensor is missing its size is taken from `config`, else
            from the released model, so that the comparison of the tensors can report it.
        config: a config.json of either dialect; the positional scales and the head width come from it.
            Without one the head width is 96 and the scales are those of the released 88x720P model.
    Raises:
        CheckpointMismatch: `config` states a size that the tensors contradict.
        UnsupportedCheckpoint: no config and a width that is no multiple of 96, or an impossible value.
    """
    blocks = "transformer_blocks.0."
    patch = _shape(shapes, "pos_embed.proj.weight", 4)
    out = _shape(shapes, "proj_out.weight", 2)
    # One edited tensor must not decide the width of all others.
    width = _most_common(
        [
            *patch[:1],
            *_shape(shapes, "adaln_single.linear.weight", 2)[1:],
            *_shape(shapes, "caption_projection.linear_2.weight", 2)[:1],
            *_shape(shapes, blocks + "attn1.to_q.weight", 2)[:1],
            *_shape(shapes, blocks + "attn2.to_out.0.weight", 2)[:1],
        ]
    )
    found: dict[str, int] = {}
    if layers := block_count(shapes, "transformer_blocks"):
        found["num_layers"] = layers
    if patch:
        found |= {"in_channels": patch[1], "patch_size": patch[2]}
        if out and out[0] % patch[2] ** 2 == 0:
            found["out_channels"] = out[0] // patch[2] ** 2
    if caption := _shape(shapes, "caption_projection.linear_1.weight", 2):
        found["caption_channels"] = caption[1]
    if config is None:
        logger.warning(
            "No config.json with this transformer: its positions are scaled as in the released "
            "88-frame 720p model. Put its config.json beside the weights if it is another one."
        )
    stated = dict(config or {})
    _refuse_contradictions(stated, found)
    return DiTConfig.from_dict(stated | found | _heads(stated, width))


def _heads(stated: Mapping[str, Any], width: int | None) -> dict[str, int]:
    """Head count and width. No tensor shows them: the config says, or heads are 96 wide."""
    if width is None:
        return {}
    heads, dim = stated.get("num_attention_heads"), stated.get("attention_head_dim")
    if isinstance(heads, int) and isinstance(dim, int):
        if heads * dim != width:
            raise CheckpointMismatch(
                f"the tensors are {width} wide, the config says {heads} heads of {dim} = "
                f"{heads * dim}. Put the config.json of these weights beside them."
            )
    elif isinstance(heads, int) and heads > 0 and width % heads == 0:
        dim = width // heads
    elif width % RELEASED_HEAD_DIM == 0:
        heads, dim = width // RELEASED_HEAD_DIM, RELEASED_HEAD_DIM
    else:
        raise UnsupportedCheckpoint(
            f"the tensors are {width} wide, which is no multiple of {RELEASED_HEAD_DIM}, the width "
            "of the heads of the released models, and no config.json states another. Put "
            "its config.json beside the weights."
        )
    return {"num_attention_heads": heads, "attention_head_dim": dim}


def vae_config_from_shapes(shapes: Shapes, config: Mapping[str, Any] | None = None) -> VAEConfig:
    """Derives the sizes of a VideoVAE, whole or half.

    Args:
        shapes: our tensor names -> shapes.
        config: a config.json of either dialect; group counts, scale factor and tiles come from it, from the
            released model where it is silent.
    Raises:
        CheckpointMismatch: `config` states a size that the tensors contradict.
        UnsupportedCheckpoint: channels that do not divide into the groups, or an impossible value.
    """
    found = _encoder_sizes(shapes) | _decoder_sizes(shapes)
    stated = dict(config or {})
    for ours, names in VAE_NAMES.items():
        value = next((stated[name] for name in names if stated.get(name) is not None), None)
        if value is not None:
            stated[ours] = value
    _refuse_contradictions(stated, found)
    result = VAEConfig.from_dict(_other_half(found) | stated | found)
    for groups in {result.norm_num_groups, result.temporal_norm_num_groups}:
        if groups < 1 or any(c % groups for c in result.block_out_channels):
            raise UnsupportedCheckpoint(
                f"levels of {list(result.block_out_channels)} channels do not divide into {groups} "
                "groups. Put the config.json of this VAE beside its weights."
            )
    return result


def _encoder_sizes(shapes: Shapes) -> dict[str, Any]:
    levels = block_count(shapes, "encoder.down_blocks")
    channels = [_shape(shapes, f"encoder.down_blocks.{i}.resnets.0.conv2.weight", 4) for i in range(levels)]
    if not levels or not all(channels):
        return {}
    found: dict[str, Any] = {
        "block_out_channels": [shape[0] for shape in channels],
        "layers_per_block": block_count(shapes, "encoder.down_blocks.0.resnets"),
        "temporal_down": [
            f"encoder.down_blocks.{i}.temp_convs_down.conv1.2.weight" in shapes for i in range(levels)
        ],
    }
    if moments := _shape(shapes, "encoder.conv_out.weight", 4):
        found["latent_channels"] = moments[0] // 2
    return found


def _decoder_sizes(shapes: Shapes) -> dict[str, Any]:
    levels = block_count(shapes, "decoder.up_blocks")
    channels = [_shape(shapes, f"decoder.up_blocks.{i}.resnets.0.conv2.weight", 4) for i in range(levels)]
    if not levels or not all(channels):
        return {}
    found: dict[str, Any] = {
        "block_out_channels": [shape[0] for shape in reversed(channels)],
        "layers_per_block": block_count(shapes, "decoder.up_blocks.0.resnets") - 1,
        "temporal_up": [
            f"decoder.up_blocks.{i}.temp_conv_up.conv1.2.weight" in shapes for i in range(levels)
        ],
    }
    if latents := _shape(shapes, "decoder.conv_in.weight", 4):
        found["latent_channels"] = latents[1]
    return found


def _other_half(found: Mapping[str, Any]) -> dict[str, Any]:
    """Of half a VAE without a config: the levels at which the other half changes the frame count.

    It undoes as many halvings; at which levels makes no difference to the half that is there.
    """
    if "temporal_up" in found and "temporal_down" not in found:
        return {"temporal_down": [*found["temporal_up"][1:], False]}
    if "temporal_down" in found and "temporal_up" not in found:
        return {"temporal_up": [False, *found["temporal_down"][:-1]]}
    return {}


def t5_config_from_shapes(shapes: Shapes, config: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The config.json of a T5 v1.1 encoder, in the names of transformers.

    Args:
        shapes: our tensor names -> shapes.
        config: a config.json; what shapes cannot tell (epsilon, token ids, ...) comes from it, else from
            T5 v1.1.
    Raises:
        CheckpointMismatch: `config` states a size that the tensors contradict, or a tensor that tells sizes
            is missing.
    """
    layer = "encoder.block.0.layer."
    marks = {
        "embedding": "shared.weight",
        "bias": layer + "0.SelfAttention.relative_attention_bias.weight",
        "query": layer + "0.SelfAttention.q.weight",
        "gate": layer + "1.DenseReluDense.wi_0.weight",
    }
    missing = [name for name in marks.values() if not _shape(shapes, name, 2)]
    if missing:
        raise CheckpointMismatch(
            f"this text encoder lacks {', '.join(missing)}. The file is incomplete; download it again."
        )
    embedding, bias, query, gate = (shapes[name] for name in marks.values())
    found = {
        "vocab_size": embedding[0],
        "d_model": embedding[1],
        "num_layers": block_count(shapes, "encoder.block"),
        "num_heads": bias[1],
        "relative_attention_num_buckets": bias[0],
        "d_kv": query[0] // max(bias[1], 1),
        "d_ff": gate[0],
    }
    _refuse_contradictions(config or {}, found)
    return {**_T5_DEFAULTS, **(config or {}), **found}


# What T5 v1.1 encoders of every size have in common. Source: the config.json of google/t5-v1_1-xxl.
_T5_DEFAULTS: dict[str, Any] = {
    "model_type": "t5",
    "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-6,
    "dropout_rate": 0.1,
    "feed_forward_proj": "gated-gelu",
    "is_encoder_decoder": True,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "eos_token_id": 1,
}


def t5_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of a T5 v1.1 encoder; the embedding under the name `shared.weight`."""
    d, inner, ff = config["d_model"], config["d_kv"] * config["num_heads"], config["d_ff"]
    shapes: dict[str, tuple[int, ...]] = {
        "shared.weight": (config["vocab_size"], d),
        "encoder.final_layer_norm.weight": (d,),
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": (
            config["relative_attention_num_buckets"],
            config["num_heads"],
        ),
    }
    for i in range(config["num_layers"]):
        attention, feed_forward = f"encoder.block.{i}.layer.0.", f"encoder.block.{i}.layer.1."
        shapes |= {attention + f"SelfAttention.{name}.weight": (inner, d) for name in "qkv"}
        shapes |= {
            attention + "SelfAttention.o.weight": (d, inner),
            attention + "layer_norm.weight": (d,),
            feed_forward + "DenseReluDense.wi_0.weight": (ff, d),
            feed_forward + "DenseReluDense.wi_1.weight": (ff, d),
            feed_forward + "DenseReluDense.wo.weight": (d, ff),
            feed_forward + "layer_norm.weight": (d,),
        }
    return shapes


def preset_name(config: DiTConfig) -> str | None:
    """The released model with the same trained size and scales, e.g. "40x360P"; None for any other."""
    return next((name for name, preset in PRESETS.items() if preset.dit == config), None)


# Helpers


def _shape(shapes: Shapes, name: str, rank: int) -> tuple[int, ...]:
    """The shape of a tensor, () when it is missing or of another rank."""
    shape = shapes.get(name, ())
    return shape if len(shape) == rank else ()


def _most_common(values: list[int]) -> int | None:
    return Counter(values).most_common(1)[0][0] if values else None


def _refuse_contradictions(stated: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    wrong = []
    for name, value in found.items():
        said = stated.get(name)
        if said is not None and (list(said) if isinstance(said, list | tuple) else said) != value:
            wrong.append(f"{name} is {value} in the tensors and {said} in the config")
    if wrong:
        raise CheckpointMismatch(
            "weights and config contradict each other: " + "; ".join(wrong) + ". The file is "
            "incomplete, or the config.json belongs to another model; download both again."
        )
