"""Models from checkpoints: built on the meta device, compared strictly, filled from the mapped file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from ..config import SAMPLING_88X720P, DiTConfig, VAEConfig
from ..dit import AllegroDiT, AllegroTI2V
from ..errors import CheckpointError, CheckpointMismatch
from ..ops import unfilled
from ..quantised import can_stay_packed, install
from ..tensors import check_tensors
from ..text import TextEncoder, build_text_encoder, has_tokenizer
from ..vae import VideoVAE
from .defaults import stated_text_length
from .dimensions import dit_config_from_shapes, t5_config_from_shapes, t5_shapes, vae_config_from_shapes
from .files import component_folder
from .lora import apply_loras
from .released import fetch_part
from .source import Source, config_of, open_source, packed_layouts, read_tensors, with_article

Part = Literal["full", "encoder", "decoder"]
AnyModule = TypeVar("AnyModule", bound=nn.Module)


def load_dit(
    path: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    operations: Any = unfilled,
    config: DiTConfig | None = None,
    loras: Sequence[tuple[str | Path, float]] = (),
    dequantise: bool = False,
) -> AllegroDiT:
    """Loads a transformer: text to video, or `AllegroTI2V` when its tensors say so.

    Args:
        path: a .safetensors or .gguf file, an index, a folder with them, or the root of a model snapshot.
        device: where the weights go. On the CPU, and in the stored type, they stay mapped to the file and
            take memory only as they are used.
        dtype: type of the weights that are not quantised; default the type most of those are stored in.
        operations: namespace of layer classes; default `torch.nn`'s without their random start values.
        config: sizes and scales; default from the shapes and the config.json beside the weights.
        loras: (path, strength) of LoRAs to merge; see `apply_loras`.
        dequantise: turn quantised matrices (float8, int8, GGUF) into `dtype`, by default bfloat16. Else the linear
            layers keep theirs as they are in the file and unpack them at each use (see `QuantisedLayer`).
    Raises:
        CheckpointError: the file cannot be read; UnsupportedCheckpoint: it is something else;
        CheckpointMismatch: it is incomplete, or tensors have other shapes.
    """
    source = open_source(path, "allegro-dit", subfolder="transformer")
    config = config or config_of(source, dit_config_from_shapes)
    network = AllegroTI2V if source.info.variant == "ti2v" else AllegroDiT
    dit = _fill(network(config, operations=operations, device="meta"), source, device, dtype, dequantise=dequantise)
    apply_loras(dit, loras)
    return dit


def load_vae(
    path: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = torch.float32,
    operations: Any = unfilled,
    config: VAEConfig | None = None,
    part: Part = "full",
) -> VideoVAE:
    """Loads the VideoVAE, or one half of it.

    Args:
        path, device, operations, config: as in `load_dit`.
        dtype: type of the weights, the reference's float32 by default; None for the stored one.
        part: "encoder" or "decoder" leaves the other half out; it need not be in the file then.
    Raises:
        CheckpointError, UnsupportedCheckpoint, CheckpointMismatch: as in `load_dit`.
    """
    source = open_source(path, "allegro-vae", subfolder="vae")
    if part != "full":
        source = _half(source, part)
    elif source.info.variant != "full":
        raise CheckpointMismatch(
            f"{path} is {with_article(source.info.title)}; expected encoder and decoder. Load it "
            f"with part={source.info.variant!r}, or use the file with both halves."
        )
    config = config or config_of(source, vae_config_from_shapes)
    return _fill(VideoVAE(config, part=part, operations=operations, device="meta"), source, device, dtype, dequantise=True)


def load_text_encoder(
    path: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = torch.bfloat16,
    max_length: int | None = None,
    tokenizer: str | Path | None = None,
    dequantise: bool = False,
) -> TextEncoder:
    """Loads a T5 v1.1 text encoder and its tokenizer.

    Args:
        path, device, dequantise: as in `load_dit`.
        dtype: type of the weights that are not quantised, and of the computation; the reference's bfloat16 by
            default, None for the stored one. float16 overflows in T5.
        max_length: tokens per text; default what the model's model_index.json says, else 512.
        tokenizer: folder of the tokenizer; default tokenizer/ in or beside `path`, or `path` itself.
    Raises:
        CheckpointError, UnsupportedCheckpoint, CheckpointMismatch: as in `load_dit`, or no
            tokenizer is there.
        MissingDependency: transformers is not installed.
    """
    folder = Path(tokenizer) if tokenizer is not None else _find_tokenizer(Path(path))
    source = open_source(path, "t5-encoder", subfolder="text_encoder")
    config = config_of(source, t5_config_from_shapes)
    check_tensors(t5_shapes(config), source.shapes, what=f"{path}, {with_article(source.info.title)},")
    max_length = max_length or stated_text_length(Path(path)) or SAMPLING_88X720P.text_length
    layouts = {} if dequantise else {n: layout for n, layout in packed_layouts(source).items() if len(source.shapes[n]) == 2}
    tensors = read_tensors(source, device=device, dtype=dtype, keep=layouts)
    return build_text_encoder(config, tensors, folder, max_length=max_length, layouts=layouts)


# Steps of a load


def _find_tokenizer(path: Path) -> Path:
    folder = path if path.is_dir() else path.parent
    places = (component_folder(folder, "tokenizer"), folder, folder.parent / "tokenizer")
    for place in places:
        if has_tokenizer(place):
            return place
    raise CheckpointError(
        f"no tokenizer for {path}: looked in {', '.join(map(str, places))} for spiece.model or "
        f"tokenizer.json. {fetch_part(folder, 'tokenizer')}"
    )


def _half(source: Source, part: Part) -> Source:
    prefixes = ("encoder.", "quant_conv.") if part == "encoder" else ("decoder.", "post_quant_conv.")
    other = ("decoder.", "post_quant_conv.") if part == "encoder" else ("encoder.", "quant_conv.")
    if not any(name.startswith(prefixes) for name in source.names):
        raise CheckpointMismatch(
            f"{source.path} is {with_article(source.info.title)}; expected the {part}. Use the file with "
            "both halves."
        )
    names = {ours: name for ours, name in source.names.items() if not ours.startswith(other)}
    return replace(source, names=names, shapes={ours: source.shapes[ours] for ours in names})


def _fill(
    model: AnyModule, source: Source, device: torch.device | str, dtype: torch.dtype | None, *, dequantise: bool
) -> AnyModule:
    """Compares a model on the meta device with its checkpoint, and gives it the tensors."""
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    check_tensors(expected, source.shapes, what=f"{source.path}, {with_article(source.info.title)},")
    layouts = {} if dequantise else packed_layouts(source)
    layouts = {name: layout for name, layout in layouts.items() if can_stay_packed(model, name)}
    state = read_tensors(source, device=device, dtype=dtype, keep=layouts)
    install(model, layouts, state)
    model.load_state_dict(state, strict=True, assign=True)
    return model.requires_grad_(False).eval()
