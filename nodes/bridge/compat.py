"""Differences between ComfyUI versions, 0.3.64 and later. Found by looking, never by comparing version numbers."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.sample
import comfy.sd
import comfy.utils
import torch
from torch import Tensor, nn

from ...allegro_model.errors import NotEnoughMemory, UnsupportedCheckpoint
from ...allegro_model.quantised import QuantisedLayer
from ...allegro_model.tensors import shorten

Weights = dict[str, Tensor]


def accepts(function: Callable[..., Any], name: str) -> bool:
    """True if `function` has a parameter of that name."""
    return name in inspect.signature(function).parameters


# Model patchers


def patcher_class(disable_dynamic: bool = False) -> type:
    """The class of model patchers. Looked up at each call: ComfyUI rebinds the name when it starts."""
    plain = comfy.model_patcher.ModelPatcher
    return plain if disable_dynamic else getattr(comfy.model_patcher, "CoreModelPatcher", plain)


class PackedPatcher(comfy.model_patcher.ModelPatcher):
    """Of a model with packed matrices, which live in our own layers: those cannot be streamed by dynamic memory."""

    def add_patches(self, patches: Any, *args: Any, **kwargs: Any) -> Any:
        """As `_check_patches`, which raises."""
        self._check_patches(patches)
        return super().add_patches(patches, *args, **kwargs)

    def add_hook_patches(self, hook: Any, patches: Any, *args: Any, **kwargs: Any) -> Any:
        """The patches of ComfyUI's hook nodes, likewise."""
        self._check_patches(patches)
        return super().add_hook_patches(hook, patches, *args, **kwargs)

    def _check_patches(self, patches: Any) -> None:
        """ComfyUI would add numbers to the bytes.

        Raises:
            UnsupportedCheckpoint: a patch is for a packed matrix.
        """
        packed = {f"{name}.weight" for name, layer in self.model.named_modules() if isinstance(layer, QuantisedLayer)}
        wrong = [name for name in (key if isinstance(key, str) else key[0] for key in patches) if name in packed]
        if wrong:
            raise UnsupportedCheckpoint(f"the matrices of this model are packed (int8 or GGUF), and ComfyUI cannot change them: "
                                        f"{shorten(sorted(wrong))}. Use Load Allegro LoRA for LoRAs, or a bf16 or fp8 file.")


def is_dynamic(patcher: Any) -> bool:
    """True if weights are to be handed over as they are mapped from the file, not copied."""
    return hasattr(patcher, "is_dynamic") and bool(patcher.is_dynamic())


def assign_option(load: Callable[..., Any], patcher: Any) -> dict[str, bool]:
    """`assign=` for a load function that knows it."""
    return {"assign": is_dynamic(patcher)} if accepts(load, "assign") else {}


def remember_loader(patcher: Any, loader: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """Tells newer versions how to load the model again without dynamic memory (compilers and hooks need that)."""
    patcher.cached_patcher_init = (loader, args)


def clone_without_dynamic_memory(patcher: Any) -> Any:
    """A copy of a MODEL that a compiler can follow: newer versions stream weights in ways that it cannot."""
    return patcher.clone(disable_dynamic=True) if accepts(patcher.clone, "disable_dynamic") else patcher.clone()


def archive_dtypes(module: nn.Module) -> None:
    """Newer versions note the dtype of each weight before a patcher is made."""
    archive = getattr(comfy.model_management, "archive_model_dtypes", None)
    if archive is not None:
        archive(module)


def settle_dtypes(patcher: Any) -> None:
    """Brings weights to the dtype their module was made for, unless they are streamed from the file.

    With dynamic memory switched on, newer versions leave matrices in the dtype of the file, whatever the module
    was made for; but only a dynamic patcher casts them later. A plain one (compilers, hooks, models on the CPU) would
    multiply matrices of different types. Not for quantised files.
    """
    if is_dynamic(patcher):
        return
    for module in patcher.model.modules():
        for name in ("weight", "bias"):
            wanted, param = getattr(module, f"{name}_comfy_model_dtype", None), getattr(module, name, None)
            if wanted is not None and type(param) is nn.Parameter and param.dtype != wanted:
                setattr(module, name, nn.Parameter(param.to(wanted), requires_grad=False))
    patcher.size = 0  # bytes, measured anew when they are asked for


# Quantised weights


def prepare_quantised(weights: Weights, metadata: dict[str, str] | None) -> Weights:
    """Brings the companions of scaled fp8 weights to the form that the running version reads."""
    convert = getattr(comfy.utils, "convert_old_quants", None)
    if convert is None:
        return weights
    converted, _ = convert(weights, "", metadata=dict(metadata or {}))
    return converted


def quantisation(weights: Weights) -> dict[str, Any]:
    """What a model configuration must know about scaled weights; removes the marker of older versions.

    Returns:
        {} for plain weights, else {"quant_config": ...} or {"scaled_fp8": dtype}.
    """
    detect = getattr(comfy.utils, "detect_layer_quantization", None)
    if detect is not None:
        found = detect(weights, "")
        return {} if found is None else {"quant_config": found}
    marker = weights.pop("scaled_fp8", None)
    if marker is None:
        return {}
    return {"scaled_fp8": torch.float8_e4m3fn if marker.dtype == torch.float32 else marker.dtype}


def text_quantisation(weights: Weights) -> dict[str, Any]:
    """The same for a T5 text encoder, as entries of `model_options`."""
    if hasattr(comfy.utils, "detect_layer_quantization"):
        found = comfy.utils.detect_layer_quantization(weights, "")
        return {} if found is None else {"t5xxl_quantization_metadata": found}
    marker = weights.get("scaled_fp8")
    return {} if marker is None else {"t5xxl_scaled_fp8": marker.dtype}


# Text encoders


def make_clip(target: Any, weights: Weights, *, parameters: int, model_options: dict[str, Any],
              disable_dynamic: bool = False) -> comfy.sd.CLIP:
    """A CLIP with its weights loaded."""
    kwargs: dict[str, Any] = {"embedding_directory": None, "parameters": parameters, "model_options": model_options,
                              "tokenizer_data": {}}
    if accepts(comfy.sd.CLIP.__init__, "disable_dynamic"):
        kwargs["disable_dynamic"] = disable_dynamic
    if accepts(comfy.sd.CLIP.__init__, "state_dict"):
        clip = comfy.sd.CLIP(target, state_dict=[weights], **kwargs)
    else:
        clip = comfy.sd.CLIP(target, **kwargs)
        clip.load_sd(weights)
    if not any("quantization" in name or "scaled" in name for name in model_options):
        settle_dtypes(clip.patcher)
    return clip


# Latents and errors


class DeviceMemoryFull(NotEnoughMemory, comfy.model_management.OOM_EXCEPTION):
    """A device ran out of memory. ComfyUI knows it as such and unloads its models, so that the next run has room."""


def fix_empty_latent(model: Any, latent: dict[str, Any]) -> Tensor:
    """The samples of a LATENT with the channels and dimensions of the model, also from other packs' empty ones."""
    fix = comfy.sample.fix_empty_latent_channels
    hints = {name: latent[name] for name in ("downscale_ratio_spacial", "downscale_ratio_temporal")
             if name in latent and accepts(fix, name)}
    samples = fix(model, latent["samples"], **hints)
    return samples.unsqueeze(2) if samples.ndim == 4 else samples


def cut_to_window(condition: Tensor, latents: Tensor, transformer_options: dict[str, Any]) -> Tensor:
    """What belongs to the latents of a context window. Newer versions cut it themselves, the oldest only the latents.

    Args:
        condition: [B, C, t, h, w] of the window or of the whole clip.
        latents: [B, 4, t, h, w] of the window.
        transformer_options: as ComfyUI hands them to the model.
    """
    window = transformer_options.get("context_window")
    if window is None or condition.shape[2] == latents.shape[2]:
        return condition
    return window.get_tensor(condition, condition.device, dim=2)


def intermediate_dtype() -> torch.dtype:
    """dtype of what nodes hand to each other."""
    choose = getattr(comfy.model_management, "intermediate_dtype", None)
    return torch.float32 if choose is None else choose()


def is_out_of_memory(error: Exception) -> bool:
    """True for every form in which a device reports that its memory is full."""
    known = getattr(comfy.model_management, "is_oom", None)
    if known is not None and known(error):
        return True
    return isinstance(error, comfy.model_management.OOM_EXCEPTION | MemoryError) or (
        isinstance(error, RuntimeError) and "out of memory" in str(error).lower())
