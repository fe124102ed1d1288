"""The T5 text encoder as a native CLIP: ComfyUI's own T5 with Allegro's token length and mask."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping
from functools import partial
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
from ...allegro_model.loading import check_tensors, load_sampling_defaults, open_source, t5_config_from_shapes
from ...allegro_model.loading.dimensions import t5_shapes
from ...allegro_model.pipeline import SMALL_MODEL_PARAMETERS
from ...allegro_model.prompt_store import PromptStore, files_identity, prompt_key
from ...allegro_model.quantised import install
from ...allegro_model.text.unicode_repair import join_surrogates
from .compat import make_clip, remember_loader, text_quantisation
from .paths import snapshot_root
from .progress import cancel_before, stage
from .weights import OpenedFile, open_file

logger = logging.getLogger(__name__)

DEVICES = ("default", "cpu")
# The published tokenizer has 32,000 pieces and 100 extra ids; models round their embedding up to this.
PUBLISHED_VOCABULARY = 32128
# Of ComfyUI's T5, fixed in its code.
_BUCKETS = 32
_PADDING = 0  # of every T5
# What ComfyUI's CLIP has besides its tokenizer.
_WITH_WEIGHTS = ("cond_stage_model", "patcher", "layer_idx", "use_clip_schedule", "apply_hooks_to_conds")
_EMBEDS = "prompt_embeds"


class MaskedT5(comfy.text_encoders.sd3_clip.T5XXLModel):
    """ComfyUI's T5 that ignores padding and hands its mask to the transformer."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{**kwargs, "attention_mask": True})


def encoder_class(dtype: torch.dtype, opened: OpenedFile) -> type:
    """The text encoder in ComfyUI's form for a file, its weights kept in `dtype`, or packed."""

    class AllegroTextEncoder(comfy.sd1_clip.SD1ClipModel):
        def __init__(self, device: Any = "cpu", dtype: Any = None, model_options: Mapping[str, Any] | None = None) -> None:
            super().__init__(device=device, dtype=kept, name="t5xxl", clip_model=MaskedT5,
                             model_options=dict(model_options or {}))
            install(self.t5xxl.transformer, opened.layouts, opened.weights)

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

        def measure(self, text: str, **kwargs: Any) -> tuple[int, int, str]:
            """What `count_tokens` gives."""
            tokens = [token for token, *_ in super().tokenize_with_weights(text, **kwargs)[0] if token != _PADDING]
            lost = tokens[length - 1 : -1]
            return len(tokens) - len(lost), len(lost), self.tokenizer.decode(lost)

    class AllegroTokenizer(comfy.sd1_clip.SD1Tokenizer):
        def __init__(self, embedding_directory: Any = None, tokenizer_data: Mapping[str, Any] | None = None) -> None:
            super().__init__(embedding_directory=embedding_directory, tokenizer_data=dict(tokenizer_data or {}),
                             clip_name="t5xxl", name="t5xxl", tokenizer=Pieces)
            self.prompt_template = prompt_template

    return AllegroTokenizer


class T5OnDemand(comfy.sd.CLIP):
    """ComfyUI's CLIP whose weights are read when they are first asked for: prompts that are stored need none.

    Args:
        tokenizer: ready to use.
        read: gives the CLIP with its weights.
        identity: tells the weights, and where they are used, from others.
    """

    def __init__(self, tokenizer: Any, read: Callable[[], comfy.sd.CLIP], identity: Callable[[], str]) -> None:
        # Not the constructor of ComfyUI, which builds the network.
        self.tokenizer = tokenizer
        self.tokenizer_options: dict[str, Any] = {}
        self.identity = identity
        self._read: Callable[[], comfy.sd.CLIP] | None = read

    def __getattr__(self, name: str) -> Any:
        """Only asked for what is not there. ComfyUI also looks for attributes that no CLIP has; they need no weights."""
        read = self.__dict__.get("_read")
        if read is None or name not in _WITH_WEIGHTS:
            raise AttributeError(name)
        own = dict(self.__dict__)
        self.__dict__.update({**vars(read()), **own, "_read": None})
        return getattr(self, name)


def load_t5(path: str, device: str = "default", disable_dynamic: bool = False) -> T5OnDemand:
    """Opens a T5 v1.1 encoder; its weights are read when a prompt is encoded.

    Args:
        path: a .safetensors or .gguf file, or a folder.
        device: "default", or "cpu" to keep it out of the accelerator's memory.
        disable_dynamic: for ComfyUI: give a patcher without dynamic memory.
    Returns:
        ComfyUI's CLIP.
    Raises:
        CheckpointError, UnsupportedCheckpoint, CheckpointMismatch: with a sentence for the user.
    """
    source = open_source(path, "t5-encoder")
    config = t5_config_from_shapes(source.shapes, source.header.config)
    _check(config, source.shapes, path)
    return T5OnDemand(_tokenizer(config, path)(), partial(_read_t5, path, device, disable_dynamic),
                      partial(_identity, source.header.files, device))


def _identity(files: Iterable[Path], device: str) -> str:
    return f"{files_identity(files)} {'cpu' if device == 'cpu' else comfy.model_management.text_encoder_device()}"


def _read_t5(path: str, device: str, disable_dynamic: bool) -> comfy.sd.CLIP:
    """The CLIP of `load_t5` with its weights."""
    opened = open_file(path, "t5-encoder")
    source, weights = opened.source, opened.weights
    config = t5_config_from_shapes(source.shapes, source.header.config)
    parameters = source.info.num_parameters
    target = comfy.supported_models_base.ClipTarget(_tokenizer(config, path), encoder_class(_kept_dtype(weights, parameters), opened))
    options: dict[str, Any] = {"t5xxl_model_config": _comfy_config(config)}
    options |= {} if opened.layouts else text_quantisation(weights)
    if device == "cpu":
        options["load_device"] = options["offload_device"] = torch.device("cpu")
    clip = make_clip(target, weights, parameters=parameters, model_options=options,
                     disable_dynamic=disable_dynamic or bool(opened.layouts))
    for block in clip.cond_stage_model.t5xxl.transformer.encoder.block:
        block.register_forward_pre_hook(cancel_before)
    remember_loader(clip.patcher, load_t5_patcher, (path, device))
    return clip


def load_t5_patcher(path: str, device: str, disable_dynamic: bool = False) -> Any:
    """The model patcher of `load_t5`, for ComfyUI."""
    return _read_t5(path, device, disable_dynamic).patcher


def encode(clip: Any, text: str, *, weighting: bool, store: PromptStore | None = None) -> list[Any]:
    """Encodes a text, or takes it from the store.

    Args:
        clip: CLIP, ours or that of another loader for T5 v1.1 XXL.
        text: what the encoder reads.
        weighting: read "(word:1.3)" as a weight; else parentheses are ordinary characters.
        store: of encoded prompts; None for none. Only our own loader's CLIP, as it comes from it, says what it is.
    Returns:
        CONDITIONING.
    """
    tokens = clip.tokenize(join_surrogates(text), **_options(weighting))  # a script can send what no tokenizer can read
    key = _key(clip, tokens) if store is not None else None
    if store is not None and key is not None and (found := store.get(key, **{_EMBEDS: 3})) is not None:
        logger.info("Allegro: the prompt was encoded before and is taken from %s.", store.folder)
        return _conditioning(found)
    with stage("text encoding", comfy.model_management.text_encoder_device()):
        result = clip.encode_from_tokens_scheduled(tokens)
    if store is not None and key is not None and (tensors := _tensors(result)) is not None:
        store.put(key, tensors)
    return result


def count_tokens(clip: Any, text: str, *, weighting: bool) -> tuple[int, int, str] | None:
    """What a text is to the encoder.

    Args:
        clip, text, weighting: as in `encode`.
    Returns:
        (tokens that are read, tokens that are cut off, the words these stand for); None for a CLIP with a tokenizer of
        another kind.
    """
    pieces = getattr(clip.tokenizer, "t5xxl", None)
    text = join_surrogates(text)
    if hasattr(pieces, "measure"):
        return pieces.measure(text, **_options(weighting))
    if isinstance(pieces, comfy.sd1_clip.SDTokenizer):  # of another loader; ComfyUI's cuts nothing
        tokens = pieces.tokenize_with_weights(text, **_options(weighting))
        return sum(token != _PADDING for part in tokens for token, *_ in part), 0, ""
    return None


def _options(weighting: bool) -> dict[str, bool]:
    return {} if weighting else {"disable_weights": True}


def _key(clip: Any, tokens: Any) -> str | None:
    """Of a prompt in the store: everything that its embeddings depend on. None for a CLIP that others have changed, or
    whose file is gone while its weights are in memory."""
    if type(clip) is not T5OnDemand or clip.__dict__.get("layer_idx") is not None:
        return None
    try:
        return prompt_key(clip.identity(), tokens)
    except OSError as error:
        logger.warning("Allegro: the encoded prompt is not kept: %s", error)
        return None


def _tensors(conditioning: list[Any]) -> dict[str, Tensor] | None:
    """A conditioning in the form of the store; None if it holds anything else than a prompt and its mask."""
    if len(conditioning) != 1:
        return None
    embeds, rest = conditioning[0]
    named = {name: value for name, value in rest.items() if value is not None}
    return {_EMBEDS: embeds, **named} if all(isinstance(value, Tensor) for value in named.values()) else None


def _conditioning(tensors: Mapping[str, Tensor]) -> list[Any]:
    return [[tensors[_EMBEDS], {"pooled_output": None, **{name: t for name, t in tensors.items() if name != _EMBEDS}}]]


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


def _tokenizer(config: Mapping[str, Any], path: str) -> type:
    """The tokenizer of a text encoder, with the length that the model it lies in was made for."""
    root = snapshot_root(path)
    defaults = load_sampling_defaults(root) if root is not None and (root / "transformer").is_dir() else SAMPLING_88X720P
    return tokenizer_class(_tokenizer_folder(config["vocab_size"], root), defaults.text_length, defaults.prompt_template)


def _tokenizer_folder(vocabulary: int, root: Path | None) -> str:
    """ComfyUI has the published tokenizer built in; a model with another vocabulary brings its own."""
    if vocabulary == PUBLISHED_VOCABULARY:
        return os.path.join(os.path.dirname(os.path.realpath(comfy.text_encoders.sd3_clip.__file__)), "t5_tokenizer")
    folder = root / "tokenizer" if root is not None else None
    if folder is None or not folder.is_dir():
        raise CheckpointError(f"this text encoder has {vocabulary} tokens, the published one {PUBLISHED_VOCABULARY}, and no folder "
                              "tokenizer/ lies beside its own. Keep the model's folders together.")
    return str(folder)
