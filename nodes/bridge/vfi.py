"""EMA-VFI as a native INTERP_MODEL.

That is a patcher round a network with `memory_used_forward`, `extract_features`, a call with `timestep` and `cache`, and
optionally `forward_multi_timestep`, `pad_align` and `get_dtype`. Newer versions of ComfyUI have a node that runs such
models, RIFE and FILM; earlier ones have neither node nor type, and need neither.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import comfy.model_management
import comfy.ops
import torch
from torch import nn

from ...allegro_model.config import VFIConfig
from ...allegro_model.loading import check_tensors
from ...allegro_model.loading.interpolator import interpolator_config, refuse_pickle
from ...allegro_model.vfi import EMAVFI, best_dtype
from ...allegro_model.vfi.emavfi.blocks import Block
from .compat import archive_dtypes, assign_option, patcher_class, remember_loader, settle_dtypes
from .progress import cancel_before
from .weights import open_file

logger = logging.getLogger(__name__)

DTYPES: dict[str, torch.dtype | None] = {
    "auto": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class ComfyEMAVFI(EMAVFI):
    """EMA-VFI with the members that ComfyUI's own interpolation node uses. It pads frames by itself.

    Args:
        config: of the checkpoint.
        compute_dtype: of the network; warps are float32 in any case.
    """

    def __init__(self, config: VFIConfig, compute_dtype: torch.dtype) -> None:
        super().__init__(config, operations=comfy.ops.manual_cast, cast_param=comfy.ops.cast_to_input, dtype=compute_dtype)
        self.compute_dtype = compute_dtype
        for module in self.modules():  # one pair of large frames can take longer than anybody wants to wait
            if isinstance(module, nn.Sequential | Block):
                module.register_forward_pre_hook(cancel_before)

    @property
    def dtype(self) -> torch.dtype:
        """Type the network computes in; layers cast their weights to it."""
        return self.compute_dtype

    def get_dtype(self) -> torch.dtype:
        """What ComfyUI gives frames in: float32, in which they are warped, whatever the network computes in."""
        return torch.float32

    def memory_used_forward(self, images_shape: Sequence[int], dtype: torch.dtype) -> int:
        """Bytes one pair needs; `dtype`, of the frames, does not matter."""
        return super().memory_used_forward(images_shape, self.compute_dtype)


def load_interpolator(path: str, dtype: str = "auto", disable_dynamic: bool = False) -> Any:
    """Loads an EMA-VFI model.

    Args:
        path: a .safetensors file.
        dtype: a key of `DTYPES`.
        disable_dynamic: for ComfyUI: give a patcher without dynamic memory.
    Returns:
        its model patcher.
    Raises:
        CheckpointError, UnsupportedCheckpoint, CheckpointMismatch: with a sentence for the user.
    """
    refuse_pickle(path)
    opened = open_file(path, "ema-vfi")
    source = opened.source
    config = interpolator_config(source)
    expected = {name: tuple(p.shape) for name, p in EMAVFI(config, device="meta").state_dict().items()}
    check_tensors(expected, source.shapes, what=f"{path}, {source.info.title},")
    device = comfy.model_management.get_torch_device()
    network = ComfyEMAVFI(config, DTYPES[dtype] or _auto_dtype(device)).requires_grad_(False).eval()
    archive_dtypes(network)
    patcher = patcher_class(disable_dynamic)(network, load_device=device,
                                             offload_device=comfy.model_management.unet_offload_device())
    network.load_state_dict(opened.weights, strict=True, **assign_option(nn.Module.load_state_dict, patcher))
    settle_dtypes(patcher)
    network.requires_grad_(False)
    remember_loader(patcher, load_interpolator, (path, dtype))
    logger.info("Loaded %s: %s, %s, %s", path, source.info.title, network.compute_dtype,
                "for every position between two frames" if config.arbitrary_time else "for the middle between two frames")
    return patcher


def _auto_dtype(device: torch.device) -> torch.dtype:
    """What the package takes, as far as ComfyUI thinks it good for this device."""
    dtype = best_dtype(device)
    if dtype == torch.float16 and not comfy.model_management.should_use_fp16(device):
        return torch.float32
    return dtype
