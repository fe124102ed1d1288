"""LoRAs of every dialect through ComfyUI's own patching, so that its memory manager, fp8 and other packs work."""

from __future__ import annotations

import logging
from typing import Any

import comfy.sd
import torch

from ...allegro_model.errors import CheckpointMismatch
from ...allegro_model.loading import read_lora

logger = logging.getLogger(__name__)

_PREFIX = "diffusion_model."


def add_lora(model: Any, path: str, strength: float) -> Any:
    """A copy of a MODEL with a LoRA on top of what it has already.

    Args:
        model: a model patcher; it is not changed.
        path: a .safetensors file.
        strength: any number; 0 gives `model` itself.
    Raises:
        CheckpointError, UnsupportedCheckpoint, CheckpointMismatch: see `read_lora`.
    """
    if strength == 0:
        return model
    network = model.model.diffusion_model
    layers = read_lora(path, {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()})
    tensors = {}
    for name, layer in layers.items():
        stem = _PREFIX + name.removesuffix(".weight")
        tensors |= {f"{stem}.lora_A.weight": layer.down, f"{stem}.lora_B.weight": layer.up}
        if layer.alpha is not None:
            tensors[f"{stem}.alpha"] = torch.tensor(layer.alpha, dtype=torch.float64)
    patched, _ = comfy.sd.load_lora_for_models(model, None, tensors, strength, 0.0)
    lost = [name for name in layers if _PREFIX + name not in patched.patches]
    if lost:  # ComfyUI would only mention it in the log
        raise CheckpointMismatch(f"ComfyUI took {len(layers) - len(lost)} of {len(layers)} layers of {path}; the first it did "
                                 f"not take is {lost[0]}. Please report this with your version of ComfyUI.")
    logger.info("Loaded LoRA %s: %d layers, rank %s, strength %g", path, len(layers),
                ", ".join(map(str, sorted({layer.rank for layer in layers.values()})[:4])), strength)
    return patched
