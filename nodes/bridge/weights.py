"""From a path to the tensors of a known kind of model, through ComfyUI's loader."""

from __future__ import annotations

from dataclasses import dataclass

import comfy.utils

from ...allegro_model.errors import UnsupportedCheckpoint
from ...allegro_model.loading import Source, open_source
from ...allegro_model.loading.keymaps import is_quant_name, native_tensor, split_prefixes
from ...allegro_model.loading.source import packed_layouts
from .compat import Weights, prepare_quantised


@dataclass(frozen=True)
class OpenedFile:
    """A checkpoint whose headers were checked and whose tensors are mapped.

    Attributes:
        source: what the headers say.
        weights: our name -> tensor, and the companions of scaled weights.
    """

    source: Source
    weights: Weights


def open_file(path: str, family: str) -> OpenedFile:
    """Opens a checkpoint after making sure that it is what was asked for.

    ComfyUI's loader maps the files; with dynamic memory it is the only one whose tensors can be streamed.

    Args:
        path: a .safetensors file or a folder of shards.
        family: "allegro-dit", "allegro-vae" or "t5-encoder".
    Raises:
        CheckpointError, UnsupportedCheckpoint, CheckpointMismatch: with a sentence for the user.
    """
    source = open_source(path, family)
    _refuse_packed(source)
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


def _refuse_packed(source: Source) -> None:
    """ComfyUI multiplies with float8 by itself; other packed matrices it would take for numbers."""
    kinds = sorted({layout.name for layout in packed_layouts(source).values() if not layout.name.startswith("float8")})
    if kinds:
        raise UnsupportedCheckpoint(f"{source.path} is stored as {', '.join(kinds)}, which these nodes do not read yet; expected "
                                    "bfloat16, float16, float32 or float8. Use an fp8 file, such as allegro convert --format fp8 "
                                    "makes, or the file on the command line.")
