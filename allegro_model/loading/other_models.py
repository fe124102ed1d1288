"""Well-known models of other kinds, by their tensors, so that an error can name them."""

from __future__ import annotations

import math
from collections.abc import Mapping

UNKNOWN = "a file of tensors that is not known here"
# All names of a row have to be there.
_OTHERS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("a Wan video transformer", ("patch_embedding.weight", "blocks.0.self_attn.q.weight")),
    ("a Wan video transformer", ("patch_embedding.weight", "condition_embedder.time_proj.weight")),
    ("a HunyuanVideo transformer", ("double_blocks.0.img_attn_qkv.weight",)),
    ("a HunyuanVideo transformer", ("txt_in.individual_token_refiner.blocks.0.norm1.weight",)),
    ("a HunyuanVideo transformer", ("context_embedder.token_refiner.refiner_blocks.0.norm1.weight",)),
    ("a Mochi video transformer", ("pos_frequencies", "blocks.0.attn.qkv_x.weight")),
    ("a Mochi video transformer", ("pos_frequencies", "transformer_blocks.0.attn1.add_q_proj.weight")),
    ("a CogVideoX transformer", ("patch_embed.text_proj.weight",)),
    ("a CogVideoX transformer", ("transformer_blocks.0.norm1.linear.weight", "norm_final.weight")),
    ("an LTX-Video transformer", ("patchify_proj.weight",)),
    (
        "an LTX-Video transformer",
        ("proj_in.weight", "time_embed.linear.weight", "transformer_blocks.0.attn1.norm_q.weight"),
    ),
    ("a Latte video transformer", ("temporal_transformer_blocks.0.attn1.to_q.weight",)),
    ("a Qwen-Image transformer", ("txt_norm.weight", "transformer_blocks.0.img_mod.1.weight")),
    ("a Flux transformer", ("double_blocks.0.img_attn.qkv.weight",)),
    ("a Flux transformer", ("single_transformer_blocks.0.proj_mlp.weight", "x_embedder.weight")),
    ("a Stable Diffusion 3 transformer", ("joint_blocks.0.x_block.attn.qkv.weight",)),
    (
        "a Stable Diffusion 3 transformer",
        ("pos_embed.pos_embed", "transformer_blocks.0.attn.add_k_proj.weight"),
    ),
    ("a Sana transformer", ("caption_norm.weight", "transformer_blocks.0.ff.conv_inverted.weight")),
    ("a PixArt image transformer", ("adaln_single.emb.resolution_embedder.linear_1.weight",)),
    ("a PixArt image transformer", ("t_block.1.weight", "y_embedder.y_proj.fc1.weight")),
    ("a Stable Diffusion XL UNet", ("input_blocks.0.0.weight", "label_emb.0.0.weight")),
    ("a Stable Diffusion UNet", ("input_blocks.0.0.weight", "middle_block.1.proj_in.weight")),
    (
        "a Stable Diffusion XL UNet",
        ("down_blocks.1.attentions.0.proj_in.weight", "add_embedding.linear_1.weight"),
    ),
    (
        "a Stable Diffusion UNet",
        ("down_blocks.0.attentions.0.proj_in.weight", "time_embedding.linear_1.weight"),
    ),
    ("a CLIP text encoder", ("text_model.encoder.layers.0.self_attn.q_proj.weight",)),
    ("an OpenCLIP text encoder", ("transformer.resblocks.0.attn.in_proj_weight",)),
    ("an OpenCLIP text encoder", ("resblocks.0.attn.in_proj_weight",)),
    (
        "a UMT5 text encoder (used by Wan)",
        ("token_embedding.weight", "blocks.0.pos_embedding.embedding.weight"),
    ),
    ("a language model", ("model.layers.0.self_attn.q_proj.weight",)),
    ("the VAE of Wan", ("encoder.downsamples.0.residual.0.gamma",)),
    ("the VAE of Wan", ("encoder.mid_block.attentions.0.to_qkv.weight", "decoder.norm_out.gamma")),
    ("the VAE of another video model", ("decoder.conv_in.conv.weight",)),
    ("an image VAE (Stable Diffusion, Flux)", ("decoder.up.0.block.0.norm1.weight",)),
    (
        "an image VAE (Stable Diffusion, Flux)",
        ("decoder.up_blocks.0.resnets.0.norm1.weight", "decoder.conv_in.weight"),
    ),
    ("a frame interpolation model of another kind (RIFE)", ("block0.conv0.0.0.weight",)),
)


def other_title(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """What a file of tensors that is none of ours looks like; `UNKNOWN` if nothing comes to mind."""
    for title, names in _OTHERS:
        if all(name in shapes for name in names):
            return title
    patch, out = shapes.get("pos_embed.proj.weight", ()), shapes.get("proj_out.weight", ())
    if "adaln_single.linear.weight" in shapes and len(patch) == 5:
        return "a transformer of the Open-Sora Plan kind"
    # The same names as ours, but twice the output channels: it predicts a variance too.
    if (
        "adaln_single.linear.weight" in shapes
        and len(patch) == 4
        and out
        and out[0] == 2 * math.prod(patch[1:])
    ):
        return "a PixArt image transformer"
    return UNKNOWN
