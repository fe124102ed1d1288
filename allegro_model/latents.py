"""Latents in files: finished ones in ComfyUI's own latent format, unfinished runs with all they need to go on.

A finished file holds `latent_tensor`, raw latents [1, 4, t, h, w] float32, and `latent_format_version_0`,
which is what ComfyUI's LoadLatent reads. An unfinished one holds `noisy_latents` (normalised) and the other
tensors of its `SampleState`. Metadata: everything in `metadata` as JSON under "allegro".
"""

from __future__ import annotations

import json
from dataclasses import fields
from os import PathLike
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from .errors import UnsupportedCheckpoint
from .pipeline import SampleSettings, SampleState

# Annotation of a field of SampleSettings -> types its value may have in JSON.
_KINDS: dict[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "str": (str,)}
# Tensors that a state may have besides its latents, under the names of their fields.
_OPTIONAL = ("denoised", "condition", "kept")


def pack_latents(latents: Tensor, metadata: dict[str, Any]) -> bytes:
    """A file of finished latents.

    Args:
        latents: raw latents [1, 4, t, h, w].
        metadata: JSON-able; prompt, settings, ...
    """
    tensors = {"latent_tensor": latents.float().contiguous(), "latent_format_version_0": torch.tensor([])}
    return save(tensors, {"allegro": json.dumps(metadata)})


def pack_state(state: SampleState, metadata: dict[str, Any]) -> bytes:
    """A file of an unfinished run.

    Args:
        state: where the run stopped.
        metadata: JSON-able; prompt and what else is needed to repeat the run.
    """
    tensors = {"noisy_latents": state.latents.contiguous()}
    for name in _OPTIONAL:
        tensor = getattr(state, name)
        if tensor is not None:
            tensors[name] = tensor.contiguous()
    run = {**metadata, "step": state.step, "settings": state.settings.to_dict(), "attention": state.attention}
    if state.kept is not None:
        run["kept_start"] = state.kept_start
    return save(tensors, {"allegro": json.dumps(run)})


def _read(path: str | PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(str(path), framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            metadata = json.loads((file.metadata() or {}).get("allegro", "{}"))
        if not isinstance(metadata, dict):
            raise ValueError("its metadata is not an object")
    except (SafetensorError, OSError, ValueError) as error:
        raise UnsupportedCheckpoint(f"{path} is not a readable file of latents ({error}). Expected a .safetensors "
                                    "file written by --save-latents, encode or ComfyUI's SaveLatent.") from error
    return tensors, metadata


def read_latents(path: str | PathLike[str]) -> tuple[Tensor, dict[str, Any]]:
    """Finished latents, written here or by ComfyUI's SaveLatent.

    Returns:
        raw latents [1, 4, t, h, w] float32, and the metadata.
    Raises:
        UnsupportedCheckpoint: not such a file, or an unfinished run.
    """
    tensors, metadata = _read(path)
    if "noisy_latents" in tensors:
        raise UnsupportedCheckpoint(f"{path} holds a run that stopped after step {metadata.get('step')}: finish it "
                                    "with `generate --resume` before decoding.")
    latents = tensors.get("latent_tensor")
    if latents is None or latents.ndim != 5 or latents.shape[1] != 4:
        found = {name: list(t.shape) for name, t in list(tensors.items())[:4]}
        raise UnsupportedCheckpoint(f"{path} holds {found}: expected latent_tensor [1, 4, frames, height, width].")
    return latents.float(), metadata


def read_state(path: str | PathLike[str]) -> tuple[SampleState, dict[str, Any]]:
    """An unfinished run, written by `pack_state`.

    Raises:
        UnsupportedCheckpoint: not such a file.
    """
    tensors, metadata = _read(path)
    if "noisy_latents" not in tensors or "settings" not in metadata:
        raise UnsupportedCheckpoint(f"{path} holds {sorted(tensors)}: expected a run saved with --stop-at-step.")
    stated, step, kept_start = metadata["settings"], metadata.get("step"), metadata.get("kept_start", 0)
    if isinstance(stated, dict):
        stated = {"cache": "off", **stated}  # runs of versions that had none
    kinds = {field.name: _KINDS[str(field.type)] for field in fields(SampleSettings)}
    if not isinstance(stated, dict) or stated.keys() != kinds.keys() or not all(
            type(stated[name]) in kind for name, kind in kinds.items()) or type(step) is not int or type(kept_start) is not int:
        raise UnsupportedCheckpoint(f"{path} holds the settings {stated} after step {step}: expected {sorted(kinds)} and a "
                                    "whole number. The file is damaged; start the run again.")
    optional: dict[str, Any] = {name: tensors.get(name) for name in _OPTIONAL}
    optional["attention"] = str(metadata.get("attention", ""))  # one that is unknown, or of versions without, is as none
    return SampleState(tensors["noisy_latents"], step, SampleSettings(**stated), **optional, kept_start=kept_start), metadata
