"""Writes the trained weights as a model folder in the published layout."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..config import SamplingConfig
from .latents import latent_scale
from .preview import add_preview
from .recipe import SAMPLING, TI2V_SAMPLING, TINY_DIT, TINY_TEXT, TINY_VAE

_WEIGHTS = "diffusion_pytorch_model.safetensors"


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_weights(path: Path, tensors: Mapping[str, Tensor], family: str, title: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    half = {key: value.to(torch.float16).contiguous() for key, value in tensors.items()}
    save_file(half, path, metadata={"format": "pt", "family": family, "title": title})


def _averaged(path: Path, name: str) -> dict[str, Tensor]:
    return torch.load(path, map_location="cpu", weights_only=True)["ema"][name]


def export(work: Path, target: Path, sampling: SamplingConfig = SAMPLING) -> int:
    """Write `model_index.json`, `tokenizer/`, `text_encoder/`, `transformer/` and `vae/` in half precision.

    Args:
        work: folder of the training run (`dit.pt`, `vae.pt` or `decoder.pt`, `tokenizer/`, `latents/`).
        target: model folder; files of the same name are replaced.
        sampling: defaults of the model.

    Returns:
        Size of the weight files in bytes.
    """
    text = _averaged(work / "dit.pt", "text")
    text.pop("encoder.embed_tokens.weight", None)  # the same tensor as shared.weight
    vae_path = work / "decoder.pt" if (work / "decoder.pt").exists() else work / "vae.pt"
    parts = {
        "text_encoder/model.safetensors": (text, "t5-encoder", "Allegro tiny text encoder"),
        f"transformer/{_WEIGHTS}": (_averaged(work / "dit.pt", "dit"), "allegro-dit", "Allegro tiny text-to-video"),
        f"vae/{_WEIGHTS}": (_averaged(vae_path, "vae"), "allegro-vae", "Allegro tiny VideoVAE"),
    }
    for name, (tensors, family, title) in parts.items():
        _write_weights(target / name, tensors, family, title)
    for source in (work / "tokenizer").iterdir():
        (target / "tokenizer").mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target / "tokenizer" / source.name)
    _write_configs(target, latent_scale(work), text["shared.weight"].shape[0], sampling)
    add_preview(target)
    return sum((target / name).stat().st_size for name in parts)


def _write_configs(target: Path, scale: float, vocabulary: int, sampling: SamplingConfig) -> None:
    dit = {"_class_name": "AllegroTransformer3DModel", **TINY_DIT.to_dict()}
    vae = {"_class_name": "AllegroAutoencoderKL3D", **replace(TINY_VAE, scale_factor=round(scale, 5)).to_dict()}
    text = {"architectures": ["T5EncoderModel"], "model_type": "t5", "vocab_size": vocabulary, **TINY_TEXT}
    index = {
        "_class_name": "AllegroPipeline",
        "text_encoder": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "T5TokenizerFast"],
        "transformer": ["allegro_model", "AllegroDiT"],
        "vae": ["allegro_model", "VideoVAE"],
        "allegro_sampling": sampling.to_dict(),
    }
    _write_json(target / "transformer/config.json", dit)
    _write_json(target / "vae/config.json", vae)
    _write_json(target / "text_encoder/config.json", text)
    _write_json(target / "model_index.json", index)


def export_ti2v(work: Path, target: Path, shared: Path, sampling: SamplingConfig = TI2V_SAMPLING) -> int:
    """Write `model_index.json` and `transformer/` of the image-to-video model; the other parts are those of ``shared``.

    Args:
        work: folder of the training run (`ti2v.pt`).
        target: model folder; files of the same name are replaced.
        shared: folder that `export` wrote.
        sampling: defaults of the model.

    Returns:
        Size of the weight file in bytes.
    """
    weights = target / "transformer" / _WEIGHTS
    _write_weights(weights, _averaged(work / "ti2v.pt", "dit"), "allegro-dit", "Allegro tiny image-to-video")
    _write_json(target / "transformer/config.json", {"_class_name": "AllegroTransformer3DModel", **TINY_DIT.to_dict()})
    _write_json(target / "model_index.json", {
        "_class_name": "AllegroTI2VPipeline",
        "transformer": ["allegro_model", "AllegroTI2V"],
        "allegro_shared": os.path.relpath(shared, target),
        "allegro_sampling": sampling.to_dict(),
    })
    return weights.stat().st_size
