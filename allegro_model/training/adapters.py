"""The trainable part of a LoRA: pairs of small matrices beside the layers of a frozen transformer."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import CheckpointMismatch
from ..loading.lora import METADATA_KEY

# Under these names ComfyUI's own loader reads the file, too.
PREFIX = "diffusion_model."


class Adapters(nn.Module):
    """Adds `alpha / rank * up(down(x))` to the output of layers, and nothing before the first step.

    The layers themselves are not changed; the hooks on them go when `remove` is called.

    Args:
        layers: {name: layer}, linear.
        rank: columns of each `down`, rows of each `up`.
        alpha: the change is multiplied by alpha / rank.
        generator: of the first values.
    """

    def __init__(self, layers: Mapping[str, nn.Linear], rank: int, alpha: float, generator: torch.Generator) -> None:
        super().__init__()
        self.names, self.rank, self.alpha = list(layers), rank, alpha
        self.down, self.up = nn.ParameterList(), nn.ParameterList()
        for layer in layers.values():
            device = layer.weight.device
            bound = 1.0 / math.sqrt(layer.in_features)
            down = torch.rand((rank, layer.in_features), generator=generator) * 2 * bound - bound
            self.down.append(nn.Parameter(down.to(device)))
            self.up.append(nn.Parameter(torch.zeros((layer.out_features, rank), device=device)))
        self._hooks = [layer.register_forward_hook(self._added_to(i)) for i, layer in enumerate(layers.values())]

    def _added_to(self, index: int) -> Any:
        def hook(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            change = F.linear(F.linear(inputs[0], self.down[index]), self.up[index])
            return output + (self.alpha / self.rank) * change.to(output.dtype)

        return hook

    def remove(self) -> None:
        """Takes the hooks off the layers."""
        for hook in self._hooks:
            hook.remove()


def choose_layers(dit: nn.Module, targets: tuple[str, ...]) -> dict[str, nn.Linear]:
    """The linear layers whose names end with one of `targets`, such as "attn2.to_v".

    Raises:
        CheckpointMismatch: a target fits no layer.
    """
    linear = {name: layer for name, layer in dit.named_modules() if isinstance(layer, nn.Linear)}
    for target in targets:
        if not any(f".{name}".endswith(f".{target}") for name in linear):
            ends = sorted({".".join(name.split(".")[2:]) or name for name in linear if "transformer_blocks" in name})
            raise CheckpointMismatch(f"--targets {target}: no linear layer of the model has a name that ends so. Use names "
                                     f"such as {', '.join(ends)}, caption_projection.linear_1.")
    return {name: layer for name, layer in linear.items()
            if any(f".{name}".endswith(f".{target}") for target in targets)}


def write_lora(path: Path, adapters: Adapters, values: Mapping[str, Tensor], about: Mapping[str, str]) -> None:
    """Writes a LoRA file: peft's names, alpha as kohya keeps it, and the description that diffusers reads.

    Args:
        path: replaced when it exists, completely or not at all.
        adapters: whose names, rank and alpha are written.
        values: state of `adapters`, e.g. its moving average.
        about: entries of the metadata.
    """
    tensors = {}
    for index, name in enumerate(adapters.names):
        tensors[f"{PREFIX}{name}.lora_A.weight"] = values[f"down.{index}"].half().cpu().contiguous()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = values[f"up.{index}"].half().cpu().contiguous()
        tensors[f"{PREFIX}{name}.alpha"] = torch.tensor(float(adapters.alpha))
    description = {"transformer.peft_type": "LORA", "transformer.r": adapters.rank,
                   "transformer.lora_alpha": adapters.alpha, "transformer.target_modules": adapters.names}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    save_file(tensors, temporary, {"format": "pt", **about, METADATA_KEY: json.dumps(description)})
    temporary.replace(path)
