"""LoRAs of every dialect through ComfyUI's own patching, so that its memory manager, fp8 and other packs work."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Mapping
from typing import Any

import comfy.sd
import torch

from ...allegro_model.errors import CheckpointMismatch
from ...allegro_model.loading import read_lora
from ...allegro_model.loading.lora import LoraLayer
from ...allegro_model.quantised import QuantisedLinear, stack_low_rank, weight_shapes

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
    layers = read_lora(path, weight_shapes(network))
    packed = {name: layer for name, layer in layers.items()
              if isinstance(network.get_submodule(name.removesuffix(".weight")), QuantisedLinear)}
    patched = _beside_packed(model, packed, strength) if packed else model
    patched = _patched(patched, {name: layer for name, layer in layers.items() if name not in packed}, path, strength)
    logger.info("Loaded LoRA %s: %d layers, rank %s, strength %g", path, len(layers),
                ", ".join(map(str, sorted({layer.rank for layer in layers.values()})[:4])), strength)
    return patched


def _beside_packed(model: Any, layers: Mapping[str, LoraLayer], strength: float) -> Any:
    """A copy of a MODEL whose packed layers have the factors of a LoRA beside them while it is the one that is loaded."""
    patched = model.clone()
    for name, layer in layers.items():
        places = [_PREFIX + name.removesuffix("weight") + part for part in ("down", "up")]
        before = (patched.get_model_object(place) for place in places)
        factors = stack_low_rank(*before, layer.down.flatten(1), layer.up.flatten(1), strength * layer.scale)
        for place, factor in zip(places, factors, strict=True):
            patched.add_object_patch(place, factor)
    patched.patches_uuid = uuid.uuid4()  # or ComfyUI takes the weights for those that are loaded, and moves nothing
    return patched


def _patched(model: Any, layers: Mapping[str, LoraLayer], path: str, strength: float) -> Any:
    """A copy of a MODEL with a LoRA on its ordinary layers."""
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
    return patched
