"""The sizes of a model's networks, of a folder or a released one, and networks of these sizes."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ..config import PRESETS, DiTConfig, SamplingConfig, VAEConfig
from ..dit import AllegroDiT, AllegroTI2V
from ..errors import CheckpointError
from ..loading import (
    bundled_model,
    bundled_models,
    dit_config_from_shapes,
    load_sampling_defaults,
    open_source,
    t5_config_from_shapes,
    vae_config_from_shapes,
)
from ..loading.dimensions import t5_shapes
from ..loading.quant import common_dtype
from ..loading.source import Source, config_of
from ..sampling.cache import BUNDLED, CacheCalibration
from ..streaming import layers_of_dit, streamed_bytes
from ..vae import VideoVAE
from .measure import randomise

META = torch.device("meta")

# The encoder of the released models. Source: the config.json of google/t5-v1_1-xxl.
T5_XXL: Mapping[str, Any] = {"vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64,
                             "relative_attention_num_buckets": 32}


@dataclass(frozen=True)
class Networks:
    """What a model consists of.

    Attributes:
        name: for people.
        dit, vae: their configurations.
        text: sizes of the text encoder, in the names of transformers.
        defaults: the settings the model was made for.
        image_to_video: whether the transformer takes given frames.
        file_bytes: size of the files; None when there are none.
        root: the folder, None for sizes alone.
        calibration: of the step caches.
        dit_stored, text_stored: the type that most of the file has; those of the released models are in bfloat16.
    """

    name: str
    dit: DiTConfig
    vae: VAEConfig
    text: Mapping[str, Any]
    defaults: SamplingConfig
    image_to_video: bool = False
    file_bytes: int | None = None
    root: Path | None = None
    calibration: CacheCalibration = BUNDLED
    dit_stored: torch.dtype = torch.bfloat16
    text_stored: torch.dtype = torch.bfloat16

    @cached_property
    def dit_parameters(self) -> int:
        """Numbers in the transformer."""
        kind = AllegroTI2V if self.image_to_video else AllegroDiT
        return sum(p.numel() for p in kind(self.dit, device=META).parameters())

    @cached_property
    def vae_parameters(self) -> int:
        """Numbers in the VAE, both halves."""
        return sum(p.numel() for p in VideoVAE(self.vae, device=META).parameters())

    @cached_property
    def text_parameters(self) -> int:
        """Numbers in the text encoder."""
        return sum(math.prod(shape) for shape in t5_shapes(self.text).values())

    def streamed_dit_bytes(self, dtype: torch.dtype) -> int:
        """What the transformer needs on a device that it does not fit on, for weights."""
        dit = (AllegroTI2V if self.image_to_video else AllegroDiT)(self.dit, device=META)
        return streamed_bytes(dit, layers_of_dit(dit), dtype)

    def streamed_text_bytes(self, dtype: torch.dtype) -> int:
        """The same of the text encoder: all but the blocks, and the two largest of these."""
        blocks: Counter[str] = Counter()
        for name, shape in t5_shapes(self.text).items():
            block = re.match(r"encoder\.block\.\d+\.", name)
            blocks[block[0] if block else ""] += math.prod(shape) * dtype.itemsize
        return blocks.pop("", 0) + sum(sorted(blocks.values())[-2:])

    def random_dit(self, layers: int, device: torch.device, dtype: torch.dtype) -> AllegroDiT:
        """A transformer with so many layers of this model's width and arbitrary weights."""
        config = replace(self.dit, num_layers=layers)
        return randomise(AllegroDiT(config, device=META), device, dtype)  # type: ignore[return-value]

    def random_decoder(self, device: torch.device, dtype: torch.dtype = torch.float32) -> VideoVAE:
        """The decoding half of the VAE with arbitrary weights."""
        return randomise(VideoVAE(self.vae, part="decoder", device=META), device, dtype)  # type: ignore[return-value]


def open_networks(model: str) -> Networks:
    """Reads the sizes of a model, no weights.

    Args:
        model: the name of a released model (88x720P, ...), whose files need not be there; of a bundled one; or a folder.
    Raises:
        CheckpointError: there is no such model.
        UnsupportedCheckpoint, CheckpointMismatch: the folder is not that of a model.
    """
    if model in PRESETS:
        preset = PRESETS[model]
        return Networks(model, preset.dit, preset.vae, T5_XXL, preset.sampling)
    if model not in bundled_models() and not Path(model).is_dir():
        raise CheckpointError(f"--model {model}: there is no such folder. Give a model folder, a bundled model "
                              f"({', '.join(bundled_models())}), or the sizes of a released one: {', '.join(PRESETS)}.")
    root = bundled_model(model) if model in bundled_models() else Path(model)
    dit, vae, text = (open_source(root, family, subfolder=part) for family, part in (
        ("allegro-dit", "transformer"), ("allegro-vae", "vae"), ("t5-encoder", "text_encoder")))
    size = sum(part.header.num_bytes for part in (dit, vae, text))
    return Networks(root.resolve().name, config_of(dit, dit_config_from_shapes), config_of(vae, vae_config_from_shapes),
                    config_of(text, t5_config_from_shapes), load_sampling_defaults(root), dit.info.variant == "ti2v", size, root,
                    dit_stored=_stored(dit), text_stored=_stored(text))


def _stored(source: Source) -> torch.dtype:
    return common_dtype(source.names, source.header.tensors)
