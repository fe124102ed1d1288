"""Another attention kernel, and the compiler, on a MODEL through ComfyUI's wrappers."""

from __future__ import annotations

from typing import Any

import comfy.model_patcher
import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...allegro_model.attention import AttentionShape, Kernel, check_attention, choose_attention
from ...allegro_model.compiling import CompiledBlocks
from ...allegro_model.geometry import LatentShape, token_count
from .cache import check_ours
from .compat import clone_without_dynamic_memory

ATTENTION = "allegro_attention"
COMPILED = "allegro_compiled"
OVERRIDE = "optimized_attention_override"  # ComfyUI's name in transformer_options; the node that sets it last counts
COMFYUI = "comfyui"  # its own choice

Executor = Any  # comfy.patcher_extension.WrapperExecutor


class AttentionChoice:
    """Stands on a MODEL where a run finds the kernel that was asked for. What was measured is kept for the next run.

    Args:
        name: one of `ATTENTIONS`.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._kernels: dict[tuple[Any, ...], Kernel] = {}

    def __call__(self, function: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Outside a run: ComfyUI's own attention."""
        return function(*args, **kwargs)

    def kernel(self, model: Any, latents: tuple[int, ...]) -> Kernel:
        """The kernel for a model patcher and latents of a shape [B, 4, t, h, w]."""
        config = model.model.diffusion_model.config
        tokens = token_count(LatentShape(*latents[2:]), config.patch_size)
        dtype = model.model.manual_cast_dtype or model.model.get_dtype()
        key = (self.name, model.load_device, dtype,
               AttentionShape(tokens, config.num_attention_heads, config.attention_head_dim))
        if key not in self._kernels:
            self._kernels[key] = choose_attention(*key)
        return self._kernels[key]


class _ChosenAttention:
    """ComfyUI's override during a run.

    Args:
        kernel: what computes instead.
    """

    def __init__(self, kernel: Kernel) -> None:
        self.name, self.run = kernel.name, kernel.run

    def __call__(self, function: Any, q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None,
                 **kwargs: Any) -> Tensor:
        return self.run(q, k, v, heads, mask)


def set_attention(model: Any, name: str) -> Any:
    """A copy of a MODEL with another attention, in place of one that it has.

    Args:
        model: a model patcher; it is not changed.
        name: one of `ATTENTIONS`, or "comfyui".
    Raises:
        ScheduleError: there is no such attention.
        CheckpointMismatch: the model is none of ours.
    """
    if name != COMFYUI:
        check_attention(name)
    check_ours(model, "the attention node")
    patched = model.clone()
    patched.remove_wrappers_with_key(WrappersMP.OUTER_SAMPLE, ATTENTION)
    options = patched.model_options.setdefault("transformer_options", {})
    options.pop(OVERRIDE, None)
    if name != COMFYUI:
        options[OVERRIDE] = AttentionChoice(name)
        patched.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, ATTENTION, _with_attention)
    return patched


def _with_attention(executor: Executor, noise: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Round a whole run: the kernel, chosen for its size."""
    guider = executor.class_obj
    before = guider.model_options
    choice = before.get("transformer_options", {}).get(OVERRIDE)
    if not isinstance(choice, AttentionChoice):  # another node has set its own behind ours
        return executor(noise, *args, **kwargs)
    options = comfy.model_patcher.create_model_options_clone(before)
    options["transformer_options"][OVERRIDE] = _ChosenAttention(choice.kernel(guider.model_patcher, tuple(noise.shape)))
    guider.model_options = options
    try:
        return executor(noise, *args, **kwargs)
    finally:
        guider.model_options = before


def attention_override(options: dict[str, Any]) -> str | None:
    """The attention that a node has put in the place of ComfyUI's in transformer_options; None where none has."""
    if OVERRIDE not in options:
        return None
    return str(getattr(options[OVERRIDE], "name", "of another node"))


def compile_blocks(model: Any) -> Any:
    """A copy of a MODEL whose blocks run through torch.compile, and without it where that fails.

    Args:
        model: a model patcher; it is not changed.
    Raises:
        CheckpointMismatch: the model is none of ours.
    """
    check_ours(model, "the compile node")
    patched = clone_without_dynamic_memory(model)
    compiled = CompiledBlocks()

    def run(executor: Executor, *args: Any, **kwargs: Any) -> Tensor:
        if torch.compiler.is_compiling():  # ComfyUI's own node compiles the whole model already
            return executor(*args, **kwargs)
        with compiled.applied(executor.class_obj.transformer_blocks):
            return executor(*args, **kwargs)

    patched.remove_wrappers_with_key(WrappersMP.DIFFUSION_MODEL, COMPILED)
    patched.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, COMPILED, run)
    return patched
