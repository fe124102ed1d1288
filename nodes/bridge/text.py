"""The T5 text encoder as a native CLIP: ComfyUI's own T5 with Allegro's token length and mask."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models_base
import comfy.text_encoders.sd3_clip
import torch
from torch import Tensor
from transformers import T5TokenizerFast

from ...allegro_model.config import SAMPLING_88X720P
from ...allegro_model.errors import CheckpointError, UnsupportedCheckpoint
from ...allegro_model.loading import check_tensors, load_sampling_defaults, t5_config_from_shapes
from ...allegro_model.loading.dimensions import t5_shapes
from ...allegro_model.text.unicode_repair import join_surrogates
from .compat import SMALL_MODEL_PARAMETERS, make_clip, remember_loader, text_quantisation
from .paths import snapshot_root
from .progress import cancel_before
from .weights import open_file

logger = logging.getLogger(__name__)

DEVICES = ("default", "cpu")
# The published tokenizer has 32,000 pieces and 100 extra ids; models round their embedding up to this.
PUBLISHED_VOCABULARY = 32128
# Of ComfyUI's T5, fixed in its code.
_BUCKETS = 32


class MaskedT5(comfy.text_encoders.sd3_clip.T5XXLModel):
    """ComfyUI's T5 that ignores padding and hands its mask to the transformer."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{**kwargs, "attention_mask": True})


def encoder_class(dtype: torch.dtype) -> type:
    """The text encoder in ComfyUI's form, its weights kept in `dtype`."""

    class AllegroTextEncoder(comfy.sd1_clip.SD1ClipModel):
        def __init__(self, device: Any = "cpu", dtype: Any = None, model_options: Mapping[str, Any] | None = None) -> None:
            super().__init__(device=device, dtype=kept, name="t5xxl", clip_model=MaskedT5,
                             model_options=dict(model_options or {}))

    kept = dtype
    return AllegroTextEncoder


def tokenizer_class(folder: str, length: int, prompt_template: bool) -> type:
    """The tokenizer in ComfyUI's form.

    Args:
        folder: of the tokenizer files.
        length: tokens a prompt is padded or cut to; the last one is the end token.
        prompt_template: whether the model was made for prompts in the official template.
    """

    class Pieces(comfy.sd1_clip.SDTokenizer):
        def __init__(self, embedding_directory: Any = None, tokenizer_data: Mapping[str, Any] | None = None) -> None:
            super().__init__(
                folder, embedding_directory=embedding_directory, pad_with_end=False, embedding_size=4096,
                embedding_key="t5xxl", tokenizer_class=T5TokenizerFast, has_start_token=False,
                pad_to_max_length=False, max_length=99999999, min_length=length,
                tokenizer_data=dict(tokenizer_data or {}))

        def tokenize_with_weights(self, text: str, return_word_ids: bool = False, **kwargs: Any) -> list[list[Any]]:
            """ComfyUI would make a longer sequence; the reference cuts, and keeps the end token."""
            tokens = super().tokenize_with_weights(text, return_word_ids, **kwargs)[0]
            if len(tokens) > length:
                logger.warning("Allegro: the prompt has %d tokens; the model reads %d, the rest is cut off.",
                               len(tokens) - 1, length - 1)
                tokens = [*tokens[: length - 1], tokens[-1]]
            return [tokens]

    class AllegroTokenizer(comfy.sd1_clip.SD1Tokenizer):
        def __init__(self, embedding_directory: Any = None, tokenizer_data: Mapping[str, Any] | None = None) -> None:
            super().__init__(embedding_directory=embedding_directory, tokenizer_data=dict(tokenizer_data or {}),
                             clip_name="t5xxl", name="t5xxl", tokenizer=Pieces)
            self.prompt_template = prompt_template

    return AllegroTokenizer


def load_t5(path: str, device: str = "default", disable_dynamic: bool = False) -> comfy.sd.CLIP:
    """Loads a T5 v1.1 encoder.

    Args:
        path: a .safetensors file or a folder.
        device: "default", or "cpu" to keep it out of the accelerator's memory.
        disable_dynamic: for ComfyUI: give a patcher without dynamic memory.
    Returns:
        ComfyUI's CLIP.
    Raises:
        CheckpointError, UnsupportedCheckpoint, CheckpointMismatch: with a sentence for the user.
    """
    opened = open_file(path, "t5-encoder")
    source, weights = opened.source, opened.weights
    config = t5_config_from_shapes(source.shapes, source.header.config)
    _check(config, source.shapes, path)
    parameters = source.info.num_parameters
    root = snapshot_root(path)
    defaults = load_sampling_defaults(root) if root is not None and (root / "transformer").is_dir() else SAMPLING_88X720P
    target = comfy.supported_models_base.ClipTarget(
        tokenizer_class(_tokenizer_folder(config["vocab_size"], root), defaults.text_length, defaults.prompt_template),
        encoder_class(_kept_dtype(weights, parameters)))
    options: dict[str, Any] = {"t5xxl_model_config": _comfy_config(config), **text_quantisation(weights)}
    if device == "cpu":
        options["load_device"] = options["offload_device"] = torch.device("cpu")
    clip = make_clip(target, weights, parameters=parameters, model_options=options, disable_dynamic=disable_dynamic)
    for block in clip.cond_stage_model.t5xxl.transformer.encoder.block:
        block.register_forward_pre_hook(cancel_before)
    remember_loader(clip.patcher, load_t5_patcher, (path, device))
    return clip


def load_t5_patcher(path: str, device: str, disable_dynamic: bool = False) -> Any:
    """The model patcher of `load_t5`, for ComfyUI."""
    return load_t5(path, device, disable_dynamic).patcher


def encode(clip: Any, text: str, *, weighting: bool) -> list[Any]:
    """Encodes a text.

    Args:
        clip: CLIP, ours or that of another loader for T5 v1.1 XXL.
        text: what the encoder reads.
        weighting: read "(word:1.3)" as a weight; else parentheses are ordinary characters.
    Returns:
        CONDITIONING.
    """
    text = join_surrogates(text)  # a script can send what no tokenizer can read
    tokens = clip.tokenize(text) if weighting else clip.tokenize(text, disable_weights=True)
    return clip.encode_from_tokens_scheduled(tokens)


def wants_template(clip: Any) -> bool:
    """Whether the model that a text encoder belongs to was made for the official prompt template."""
    return bool(getattr(clip.tokenizer, "prompt_template", True))


def _check(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], path: str) -> None:
    expected = t5_shapes(config)
    optional = {"encoder.embed_tokens.weight"}  # the same tensor as shared.weight
    check_tensors(expected, {name: s for name, s in shapes.items() if name not in optional}, what=f"{path}, a T5 text encoder,")
    if config["relative_attention_num_buckets"] != _BUCKETS:
        raise UnsupportedCheckpoint(f"{path} has {config['relative_attention_num_buckets']} position buckets, expected {_BUCKETS} as in "
                                    "every T5 v1.1. Choose another text encoder.")


def _comfy_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The sizes under the names of ComfyUI's T5, which has those of the XXL model built in."""
    sizes = ("d_ff", "d_kv", "d_model", "num_heads", "num_layers", "vocab_size", "layer_norm_epsilon")
    return {name: config[name] for name in sizes}


def _kept_dtype(weights: Mapping[str, Tensor], parameters: int) -> torch.dtype:
    """The stored type; bfloat16, the reference's, for a large encoder in float32, which would take 19 GB."""
    stored = weights["encoder.final_layer_norm.weight"].dtype  # of a norm, since scaled files mix types
    return torch.bfloat16 if stored == torch.float32 and parameters >= SMALL_MODEL_PARAMETERS else stored


def _tokenizer_folder(vocabulary: int, root: Path | None) -> str:
    """ComfyUI has the published tokenizer built in; a model with another vocabulary brings its own."""
    if vocabulary == PUBLISHED_VOCABULARY:
        return os.path.join(os.path.dirname(os.path.realpath(comfy.text_encoders.sd3_clip.__file__)), "t5_tokenizer")
    folder = root / "tokenizer" if root is not None else None
    if folder is None or not folder.is_dir():
        raise CheckpointError(f"this text encoder has {vocabulary} tokens, the published one {PUBLISHED_VOCABULARY}, and no folder "
                              "tokenizer/ lies beside its own. Keep the model's folders together.")
    return str(folder)
