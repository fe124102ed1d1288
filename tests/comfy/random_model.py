"""A model folder in the published layout with random weights: a few MB, made in a second."""

import json
import math
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from allegro_model.dit import AllegroDiT
from allegro_model.loading.dimensions import t5_shapes
from allegro_model.training.recipe import SAMPLING, TINY_DIT, TINY_TEXT, TINY_VAE
from allegro_model.training.tokenizer import save_tokenizer
from allegro_model.vae import VideoVAE

# Wide enough that fp8 and partial loading have something to do; two layers keep it fast.
DIT = replace(TINY_DIT, num_layers=2, num_attention_heads=2, attention_head_dim=96, absolute_position=False)

# The released scale: what a transformer without a VAE beside it is taken to have been trained with.
VAE = replace(TINY_VAE, scale_factor=0.13235, block_out_channels=(8, 8, 8, 16), tile_size=64, tile_overlap=(16, 24),
              tile_frames=16, overlap_frames=8)


def random_tensors(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    """Weights at the scale of a fresh network, so that activations keep their size."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes.items():
        fan_in = math.prod(shape[1:]) if len(shape) > 1 else 1
        value = torch.randn(shape, generator=generator) / math.sqrt(fan_in)
        if len(shape) == 1:
            value = value * 0.1 + (1.0 if name.endswith("norm.weight") or (".norm" in name and name.endswith("weight")) else 0.0)
        tensors[name] = value.contiguous()
    return tensors


def shapes_of(module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in module.state_dict().items()}


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_model(root: Path, *, seed: int = 0) -> Path:
    """Writes transformer/, vae/, text_encoder/, tokenizer/ and model_index.json below `root`."""
    for part in ("transformer", "vae", "text_encoder"):
        (root / part).mkdir(parents=True)
    dit = random_tensors(shapes_of(AllegroDiT(DIT, device="meta")), seed)
    save_file(dit, root / "transformer" / "diffusion_pytorch_model.safetensors")
    write_json(root / "transformer" / "config.json", DIT.to_dict())
    vae = random_tensors(shapes_of(VideoVAE(VAE, device="meta")), seed + 1)
    save_file(vae, root / "vae" / "diffusion_pytorch_model.safetensors")
    write_json(root / "vae" / "config.json", VAE.to_dict())
    save_tokenizer(root / "tokenizer")
    vocabulary = json.loads((root / "tokenizer" / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    config = {**TINY_TEXT, "vocab_size": len(vocabulary)}
    save_file(random_tensors(t5_shapes(config), seed + 2), root / "text_encoder" / "model.safetensors")
    write_json(root / "text_encoder" / "config.json", config)
    write_json(root / "model_index.json", {"_class_name": "AllegroPipeline", "allegro_sampling": SAMPLING.to_dict()})
    return root
