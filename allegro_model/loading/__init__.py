"""Checkpoints: finding files, recognising them, building models from them."""

from ..tensors import check_tensors
from .build import load_dit, load_text_encoder, load_vae
from .defaults import (
    bundled_interpolator,
    bundled_loras,
    bundled_model,
    bundled_models,
    load_sampling_defaults,
)
from .describe import describe
from .detect import CheckpointInfo, identify
from .dimensions import dit_config_from_shapes, preset_name, t5_config_from_shapes, vae_config_from_shapes
from .files import (
    Checkpoint,
    Header,
    component_folder,
    is_snapshot,
    map_tensors,
    read_checkpoint,
    read_header,
)
from .interpolator import interpolator_metadata, load_interpolator, read_pickled_interpolator
from .lora import apply_loras, lora_file, read_lora
from .source import Source, open_source, read_tensors

__all__ = [
    "Checkpoint",
    "CheckpointInfo",
    "Header",
    "Source",
    "apply_loras",
    "bundled_interpolator",
    "bundled_loras",
    "bundled_model",
    "bundled_models",
    "check_tensors",
    "component_folder",
    "describe",
    "dit_config_from_shapes",
    "identify",
    "interpolator_metadata",
    "is_snapshot",
    "load_dit",
    "load_interpolator",
    "load_sampling_defaults",
    "load_text_encoder",
    "load_vae",
    "lora_file",
    "map_tensors",
    "open_source",
    "preset_name",
    "read_checkpoint",
    "read_header",
    "read_lora",
    "read_pickled_interpolator",
    "read_tensors",
    "t5_config_from_shapes",
    "vae_config_from_shapes",
]
