"""From a path to the tensors of a known kind of model, through ComfyUI's loader."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import comfy.utils

from ...allegro_model.loading import Source, open_source
from ...allegro_model.loading.keymaps import is_quant_name, native_tensor, split_prefixes
from ...allegro_model.loading.source import packed_layouts, read_tensors
from ...allegro_model.quantised import Layout
from .compat import Weights, prepare_quantised

# ComfyUI's T5 asks these tables for rows in a dtype of its choice, which ours do not know; unpacked, they are small.
_TABLES = ("shared.weight", "embed_tokens.weight", "relative_attention_bias.weight")


@dataclass(frozen=True)
class OpenedFile:
    """A checkpoint whose headers were checked and whose tensors are mapped.

    Attributes:
        source: what the headers say.
        weights: our name -> tensor, and the companions of scaled weights.
        layouts: of the matrices that are still packed, which only our own layers compute with (see
            `quantised.install`); empty for files that ComfyUI's layers take.
    """

    source: Source
    weights: Weights
    layouts: Mapping[str, Layout] = field(default_factory=dict)

    @property
    def packed_as(self) -> str:
        """The kinds of packed matrices, for people."""
        return ", ".join(sorted({layout.name for layout in self.layouts.values()}))


def open_file(path: str, family: str) -> OpenedFile:
    """Opens a checkpoint after making sure that it is what was asked for.

    ComfyUI's loader maps the files; with dynamic memory it is the only one whose tensors can be streamed. It takes
    float8 by itself; of int8 and GGUF, matrices stay packed and the rest is read as plain numbers.

    Args:
        path: a .safetensors or .gguf file, or a folder of shards.
        family: "allegro-dit", "allegro-vae" or "t5-encoder".
    Raises:
        CheckpointError, UnsupportedCheckpoint, CheckpointMismatch: with a sentence for the user.
    """
    source = open_source(path, family)
    layouts = packed_layouts(source)
    if any(not layout.name.startswith("float8") for layout in layouts.values()):
        kept = {name: layout for name, layout in layouts.items() if _stays_packed(source, name)}
        return OpenedFile(source, read_tensors(source, keep=kept), kept)
    stored: Weights = {}
    metadata: dict[str, str] = {}
    for file in source.header.files:
        tensors, found = comfy.utils.load_torch_file(str(file), safe_load=True, return_metadata=True)
        stored |= tensors
        metadata = (found or {}) | metadata
    weights = {ours: native_tensor(ours, stored[name], family) for ours, name in source.names.items()}
    group = split_prefixes(source.header.shapes)[source.info.prefix]
    companions = {stripped: stored[name] for stripped, name in group.items() if is_quant_name(stripped)}
    if companions or "_quantization_metadata" in metadata:
        weights = prepare_quantised(weights | companions, metadata)
    return OpenedFile(source, weights)


def _stays_packed(source: Source, name: str) -> bool:
    """Matrices of linear layers; the VAE has hardly any, and computes in full precision."""
    matrix = name.endswith(".weight") and len(source.shapes[name]) == 2
    return matrix and source.info.family != "allegro-vae" and not name.endswith(_TABLES)
