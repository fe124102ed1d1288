"""Variants of a model folder: other layouts that have to load, and wrong files that have to be refused."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from comfy.random_model import DIT, random_tensors, shapes_of
from safetensors.torch import load_file, save_file
from torch import Tensor

from allegro_model.config import VFIConfig
from allegro_model.dit import AllegroTI2V
from allegro_model.loading import interpolator_metadata
from allegro_model.vfi import EMAVFI


def write_variants(models: Path, model: Path) -> None:
    """Writes them into ComfyUI's model folders.

    Args:
        models: ComfyUI's models folder.
        model: a snapshot.
    """
    dit_file = model / "transformer" / "diffusion_pytorch_model.safetensors"
    config = (model / "transformer" / "config.json").read_text(encoding="utf-8")
    dit, folder = load_file(dit_file), models / "diffusion_models"
    metadata = {"config": config}
    save_file(dit, folder / "dit.safetensors", metadata)
    write_shards(dit, config, folder / "Sharded" / "transformer")
    save_file(eight_bit(dit), folder / "dit_fp8.safetensors", metadata)
    save_file(scaled(dit, "transformer_blocks"), folder / "dit_scaled.safetensors", metadata)
    write_text_variant(models / "allegro" / "eight-bit", model, lambda t5: scaled(t5, "encoder.block"))
    write_text_variant(models / "allegro" / "half", model, lambda t5: {k: v.half() for k, v in t5.items()})
    t5 = load_file(model / "text_encoder" / "model.safetensors")
    rows = torch.randn((32128, t5["shared.weight"].shape[1]), generator=torch.Generator().manual_seed(3)) * 0.1
    save_file({**t5, "shared.weight": rows, "encoder.embed_tokens.weight": rows.clone()},
              models / "text_encoders" / "published_vocabulary.safetensors")
    save_file(lora_for(dit), models / "loras" / "style.safetensors")
    write_image_model(models / "allegro" / "tiny-random-ti2v", model)
    save_file({f"blocks.3.q.{part}.weight": torch.ones(4, 4) for part in ("lora_A", "lora_B")},
              models / "loras" / "for_another_model.safetensors")
    save_file({"weight": torch.ones(4, 4)}, models / "loras" / "no_lora.safetensors")
    # Wrong ones
    vae = load_file(model / "vae" / "diffusion_pytorch_model.safetensors")
    save_file(vae, folder / "is_a_vae.safetensors")
    (folder / "truncated.safetensors").write_bytes(dit_file.read_bytes()[:100_000])
    torch.save({"weight": torch.zeros(4)}, folder / "pickle.safetensors")
    save_file({**dit, "proj_out.weight": torch.zeros(8, 8)}, folder / "edited.safetensors", metadata)
    write_shards(dit, config, folder / "Incomplete" / "transformer")
    (folder / "Incomplete" / "transformer" / "diffusion_pytorch_model-00002-of-00002.safetensors").unlink()
    save_file(dit, models / "vae" / "is_a_dit.safetensors")
    save_file(dit, models / "text_encoders" / "is_a_dit.safetensors")


def write_shards(tensors: dict[str, Tensor], config: str, folder: Path) -> None:
    """Two files and an index, as large models are published."""
    folder.mkdir(parents=True)
    names = sorted(tensors)
    halves = names[: len(names) // 2], names[len(names) // 2 :]
    weight_map = {}
    for i, half in enumerate(halves, 1):
        file = f"diffusion_pytorch_model-{i:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in half}, folder / file)
        weight_map |= dict.fromkeys(half, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    (folder / "config.json").write_text(config, encoding="utf-8")


def write_text_variant(root: Path, model: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    """The snapshot with another file for the text encoder."""
    (root / "text_encoder").mkdir(parents=True)
    for name in ("tokenizer", "transformer", "vae", "model_index.json"):
        os.symlink(model / name, root / name)
    shutil.copy(model / "text_encoder" / "config.json", root / "text_encoder")
    save_file(change(load_file(model / "text_encoder" / "model.safetensors")), root / "text_encoder" / "model.safetensors")


def write_image_model(root: Path, model: Path) -> None:
    """An image-to-video transformer whose other weights are those of the snapshot, which has the rest of the model."""
    (root / "transformer").mkdir(parents=True)
    os.symlink(model / "transformer" / "config.json", root / "transformer" / "config.json")
    (root / "model_index.json").write_text(json.dumps({"allegro_shared": f"../{model.name}"}), encoding="utf-8")
    name = "transformer/diffusion_pytorch_model.safetensors"
    shapes = shapes_of(AllegroTI2V(DIT, device="meta"))
    shared = load_file(model / name)
    extra = random_tensors({key: shape for key, shape in shapes.items() if key not in shared}, seed=7)
    save_file(shared | extra, root / name)


def scaled(tensors: dict[str, Tensor], below: str) -> dict[str, Tensor]:
    """Scaled fp8: matrices divided by a scale that is stored beside them, and a marker."""
    result = {"scaled_fp8": torch.empty(0, dtype=torch.float8_e4m3fn)}
    for name, tensor in tensors.items():
        if name.startswith(below) and tensor.ndim == 2 and name.endswith(".weight") and "relative" not in name:
            scale = tensor.abs().max() / 448
            result[name] = (tensor / scale).to(torch.float8_e4m3fn)
            result[name.removesuffix("weight") + "scale_weight"] = scale.float().reshape(1)
        else:
            result[name] = tensor.to(torch.bfloat16)
    return result


def eight_bit(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Matrices of the blocks in float8, the rest in bfloat16: the usual fp8 file."""
    return {name: tensor.to(torch.float8_e4m3fn if name.startswith("transformer_blocks") and tensor.ndim == 2
                            and name.endswith("weight") else torch.bfloat16) for name, tensor in tensors.items()}


def lora_for(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A LoRA of rank 2 for the queries, under the names that ComfyUI's own loader reads."""
    generator = torch.Generator().manual_seed(5)
    lora = {}
    for name, tensor in tensors.items():
        if name.endswith("attn1.to_q.weight"):
            stem = "diffusion_model." + name.removesuffix(".weight")
            lora[f"{stem}.lora_A.weight"] = torch.randn(2, tensor.shape[1], generator=generator)
            lora[f"{stem}.lora_B.weight"] = torch.randn(tensor.shape[0], 2, generator=generator)
    return lora


def write_interpolators(folder: Path) -> None:
    """Frame interpolators with random weights, one for every position and one for the middle, and wrong files.

    Args:
        folder: ComfyUI's folder for them.
    """
    config = VFIConfig(base_channels=8, depth=(1, 1, 1, 2, 2), window=7, arbitrary_time=True)
    weights = random_tensors(shapes_of(EMAVFI(config, device="meta")), seed=7)
    metadata = interpolator_metadata(config)
    save_file(weights, folder / "random_t.safetensors", metadata)
    save_file(weights, folder / "random.safetensors", interpolator_metadata(replace(config, arbitrary_time=False)))
    # Beyond what float16 can hold: every frame is NaN unless it is computed in float32.
    large = {name: weights[name] * 1e4 for name in ("feature_bone.block1.conv.0.weight", "feature_bone.patch_embed2.0.weight")}
    save_file({**weights, **large}, folder / "large_t.safetensors", metadata)
    torch.save({f"module.{k}": v for k, v in weights.items()}, folder / "ours.pkl")
    save_file({"conv.weight": torch.zeros(4, 4)}, folder / "is_something_else.safetensors")
    save_file({k: v for k, v in weights.items() if not k.startswith("unet.up3")}, folder / "incomplete_t.safetensors", metadata)
    whole = (folder / "random_t.safetensors").read_bytes()
    (folder / "truncated_t.safetensors").write_bytes(whole[: len(whole) // 2])
