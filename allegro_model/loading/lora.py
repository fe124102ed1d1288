"""LoRA files: the dialects they come in, and merging them into the weights of a transformer.

A LoRA adds `strength * alpha / rank * up @ down` to a weight matrix (arXiv 2106.09685). Trainers agree on
that and on nothing else: a file's names are taken apart by the tables below and looked up among the layers the
model really has. Anything that is left over is named; nothing is guessed.
"""

from __future__ import annotations

import json
import logging
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, CheckpointMismatch, ScheduleError, UnsupportedCheckpoint
from ..quantised import QuantisedLinear, weight_shapes
from ..tensors import shorten
from .defaults import bundled_loras
from .detect import identify
from .files import Header, map_tensors, read_header, read_json
from .quant import check_storage
from .source import with_article

logger = logging.getLogger(__name__)

Shapes = Mapping[str, tuple[int, ...]]
Parts = dict[str, dict[str, str]]  # layer -> {"down", "up", "alpha": name in the file}

# In front of our dotted names; taken off one after the other, since trainers wrap models in each other.
PREFIXES = (
    "base_model.model.",  # peft
    "model.diffusion_model.",
    "diffusion_model.",  # ComfyUI
    "transformer.",  # diffusers
    "module.",  # data-parallel training
)
# In front of our names written with underscores.
FLAT_PREFIXES = (
    "lora_unet_",  # kohya
    "lora_transformer_",
    "lycoris_",
)
# End of a name -> what the tensor is.
SUFFIXES = {
    ".lora_A.weight": "down",  # peft, diffusers
    ".lora_B.weight": "up",
    ".lora_A.default.weight": "down",  # peft's own state, saved as it is
    ".lora_B.default.weight": "up",
    ".lora_down.weight": "down",  # kohya
    ".lora_up.weight": "up",
    ".lora.down.weight": "down",  # early diffusers
    ".lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    ".alpha": "alpha",
}
# Ends of names by which other adapters are known: a part of them, merged as a LoRA, would draw something else.
OTHER_KINDS = {
    ".dora_scale": "DoRA",
    ".lora_magnitude_vector": "DoRA",
    ".lora_magnitude_vector.weight": "DoRA",
    ".lora_mid.weight": "a LoRA of three factors",
    ".hada_w1_a": "LoHa",
    ".lokr_w1": "LoKr",
    ".lokr_w1_a": "LoKr",
    ".oft_blocks": "OFT",
}
# Where diffusers and peft keep rank and alpha.
METADATA_KEY = "lora_adapter_metadata"
_PEFT_WEIGHTS, _PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"


class LoraLayer(NamedTuple):
    """What a LoRA adds to one layer.

    Attributes:
        down: [rank, in], or [rank, in, kh, kw] of a convolution.
        up: [out, rank], or [out, rank, 1, 1].
        alpha: the change is multiplied by alpha / rank; None stands for alpha = rank.
    """

    down: Tensor
    up: Tensor
    alpha: float | None

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return 1.0 if self.alpha is None else self.alpha / self.rank


def read_lora(path: str | Path, shapes: Shapes) -> dict[str, LoraLayer]:
    """Reads a LoRA for a model.

    Args:
        path: a .safetensors file, a folder with one (peft), or the name of a bundled LoRA ("tiny/orange").
        shapes: names and shapes of the model's parameters.
    Returns:
        {name of the weight in the model: what is added to it}; tensors are mapped, in the stored type.
    Raises:
        CheckpointError, UnsupportedCheckpoint: unreadable, no LoRA, an adapter of another kind, or a LoRA of
            which no layer is in the model.
        CheckpointMismatch: layers that are incomplete, ambiguous or of another shape.
    """
    path = lora_file(path)
    header = read_header(path)
    _check_kind(path, header)
    layers = {
        name.removesuffix(".weight"): shape
        for name, shape in shapes.items()
        if name.endswith(".weight") and len(shape) >= 2
    }
    try:
        parts, unknown = match_names(header.tensors, layers)
    except CheckpointMismatch as error:
        raise CheckpointMismatch(f"{path}: {error}") from error
    if not parts:
        raise UnsupportedCheckpoint(_explain_no_match(path, header, layers))
    if unknown:
        logger.warning(
            "%s: %d of %d tensors fit no layer of this model and are left out: %s",
            path.name, len(unknown), len(header.tensors), shorten(unknown),
        )  # fmt: skip
    _check_parts(path, header, parts, layers)
    return _read_layers(header, parts)


def lora_file(path: str | Path) -> Path:
    """The file or folder behind the name of a bundled LoRA, or behind a path.

    Raises:
        CheckpointError: there is neither.
    """
    bundled = bundled_loras()
    found = bundled.get(Path(path).as_posix()) or Path(path)
    if not found.exists():
        raise CheckpointError(f"{path} does not exist. Give the .safetensors file of a LoRA, a folder with one, or the name of a "
                              f"bundled LoRA: {', '.join(bundled)}.")
    return found


def match_names(names: Iterable[str], layers: Iterable[str]) -> tuple[Parts, list[str]]:
    """Finds the layer each tensor of a LoRA belongs to.

    Args:
        names: of the tensors, as in the file.
        layers: names of the model's layers, without ".weight".
    Returns:
        {layer: {"down", "up", "alpha": name}} and the names that fit nothing, sorted.
    Raises:
        CheckpointMismatch: a name could be two layers, or two names are the same tensor.
    """
    known = set(layers)
    flat = defaultdict(list)
    for dotted in sorted(known):
        flat[dotted.replace(".", "_")].append(dotted)
    parts: Parts = {}
    unknown = []
    for name in names:
        suffix = next((suffix for suffix in SUFFIXES if name.endswith(suffix)), None)
        layer = suffix and _layer_of(name.removesuffix(suffix), known, flat)
        if suffix is None or layer is None:
            unknown.append(name)
            continue
        other = parts.setdefault(layer, {}).setdefault(SUFFIXES[suffix], name)
        if other != name:
            raise CheckpointMismatch(
                f"{other} and {name} both mean {SUFFIXES[suffix]} of {layer}. The file holds two LoRAs in one; "
                "use one with a single LoRA."
            )
    return parts, sorted(unknown)


def apply_loras(
    model: nn.Module, loras: Sequence[tuple[str | Path, float]], *, dtype: torch.dtype | None = None
) -> None:
    """Merges LoRAs into the weights of a model.

    The sum is made in float32 and rounded once. Only the weights that change are replaced, by new tensors; what
    they were mapped from is never written to. Quantised matrices stay as they are; the two factors of a LoRA are kept
    beside them (see `QuantisedLinear.add_low_rank`).

    Args:
        model: a transformer of any variant; its parameters are replaced.
        loras: (path, strength), in this order; see `read_lora`. A strength of 0 changes nothing.
        dtype: of the weights that change; default the type each of them has.
    Raises:
        ScheduleError: a strength that is no finite number. CheckpointError and its kinds: as in `read_lora`.
    """
    state = model.state_dict()
    shapes = weight_shapes(model)
    changes: dict[str, list[tuple[LoraLayer, float]]] = defaultdict(list)
    for path, strength in loras:
        check_strength(strength)
        for name, layer in read_lora(path, shapes).items():
            if strength:
                changes[name].append((layer, strength))
    for name in list(changes):
        module = model.get_submodule(name.rpartition(".")[0])
        if isinstance(module, QuantisedLinear):
            for layer, strength in changes.pop(name):
                module.add_low_rank(layer.down.flatten(1), layer.up.flatten(1), strength * layer.scale)
    merged = {name: merge(state[name], added).to(dtype or state[name].dtype) for name, added in changes.items()}
    model.load_state_dict(merged, strict=False, assign=True)


def merge(weight: Tensor, added: Iterable[tuple[LoraLayer, float]]) -> Tensor:
    """`weight` plus what LoRAs add, float32.

    Args:
        weight: [out, in] or [out, in, kh, kw]; it is not changed.
        added: layers and their strengths, added one after the other.
    """
    total = weight.float()
    for layer, strength in added:
        down, up = (factor.to(total.device, torch.float32).flatten(1) for factor in (layer.down, layer.up))
        total = total + (strength * layer.scale) * (up @ down).reshape(total.shape)
    return total


def check_strength(strength: float) -> None:
    """Raises unless a LoRA can be merged with this strength.

    Raises:
        ScheduleError: NaN or Inf.
    """
    if not math.isfinite(strength):
        raise ScheduleError(f"strength={strength}: must be a finite number. 1 is what the LoRA was trained for.")


# Names


def _layer_of(stem: str, layers: set[str], flat: Mapping[str, list[str]]) -> str | None:
    """The layer that a name without its suffix means; None if there is no such layer."""
    for prefix in FLAT_PREFIXES:
        found = flat.get(stem.removeprefix(prefix), []) if stem.startswith(prefix) else []
        if len(found) > 1:
            raise CheckpointMismatch(
                f"{stem} could be {' or '.join(found)}, expected a name with one meaning. Use a version of the "
                "LoRA whose names have dots."
            )
        if found:
            return found[0]
    while stem not in layers:
        wrapper = next((prefix for prefix in PREFIXES if stem.startswith(prefix)), None)
        if wrapper is None:
            return None
        stem = stem.removeprefix(wrapper)
    return stem


# Checks


def _check_kind(path: Path, header: Header) -> None:
    info = identify(header.shapes, tensors=header.tensors, metadata=header.metadata, config=header.config)
    if info.family != "lora":
        raise UnsupportedCheckpoint(
            f"{path} is {with_article(info.title)}; expected a LoRA for Allegro. It holds "
            f"{len(header.tensors)} tensors: {shorten(sorted(header.tensors))}. Choose another file."
        )
    for name in sorted(header.tensors):
        kind = next((kind for suffix, kind in OTHER_KINDS.items() if name.endswith(suffix)), None)
        if kind is not None:
            raise UnsupportedCheckpoint(
                f"{path} is an adapter of another kind ({kind}: {name}); expected a plain LoRA, of pairs such as "
                "lora_A and lora_B. Export it as one, or merge it with the program that made it."
            )


def _explain_no_match(path: Path, header: Header, layers: Shapes) -> str:
    layer = min(layers, key=lambda name: (".attn1.to_q" not in name, name), default="...")
    examples = (
        f"diffusion_model.{layer}.lora_A.weight",
        f"transformer.{layer}.lora_A.weight",
        f"lora_unet_{layer.replace('.', '_')}.lora_down.weight",
    )
    return (
        f"{path} is a LoRA for another model: none of its {len(header.tensors)} tensors fits one of the "
        f"{len(layers)} layers of this one. Found: {shorten(sorted(header.tensors))}. Expected names such as: "
        f"{', '.join(examples)}. Choose a LoRA that was trained for Allegro."
    )


def _check_parts(path: Path, header: Header, parts: Parts, layers: Shapes) -> None:
    """Every layer has both factors, and they fit the weight and each other."""
    check_storage({name: name for names in parts.values() for name in names.values()}, header.tensors)
    incomplete = [
        f"{layer} has no {' and no '.join(lacking)}"
        for layer, names in sorted(parts.items())
        if (lacking := [part for part in ("down", "up") if part not in names])
    ]
    if incomplete:
        raise CheckpointMismatch(
            f"{path} lacks a factor in {len(incomplete)} of {len(parts)} layers: {shorten(incomplete)}. The file "
            "is damaged or was cut; download it again."
        )
    wrong = [
        problem for layer, names in sorted(parts.items()) for problem in _wrong_shapes(header, names, layers[layer])
    ]
    if wrong:
        raise CheckpointMismatch(
            f"{path} does not fit: {len(wrong)} tensors have other shapes: {shorten(wrong)}. It was trained for "
            "another size of the model; choose the one it belongs to."
        )


def _wrong_shapes(header: Header, names: Mapping[str, str], weight: tuple[int, ...]) -> list[str]:
    """What is wrong with the factors of one weight [out, in, ...]."""
    rank = next(iter(header.shapes[names["down"]]), 0)
    expected = {"down": (rank, math.prod(weight[1:])), "up": (weight[0], rank)}
    problems = [
        f"{names[part]} is {list(header.shapes[names[part]])}, expected {list(shape)}"
        for part, shape in expected.items()
        if not rank or _as_matrix(header.shapes[names[part]]) != shape
    ]
    if "alpha" in names and math.prod(header.shapes[names["alpha"]]) != 1:
        problems.append(f"{names['alpha']} is {list(header.shapes[names['alpha']])}, expected one number")
    return problems


def _as_matrix(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (shape[0], math.prod(shape[1:])) if len(shape) > 2 else shape


# Values


def _read_layers(header: Header, parts: Parts) -> dict[str, LoraLayer]:
    wanted = {name for names in parts.values() for name in names.values()}
    tensors = map_tensors(header, only=wanted.__contains__)
    config = _adapter_config(header)
    layers = {}
    for layer, names in parts.items():
        down, up = tensors[names["down"]], tensors[names["up"]]
        if "alpha" in names:
            alpha: float | None = float(tensors[names["alpha"]].float())
        else:
            alpha = _stated_alpha(config, layer, down.shape[0])
        if alpha is not None and not math.isfinite(alpha):
            raise CheckpointMismatch(
                f"{header.files[0]}: alpha of {layer} is {alpha}, expected a finite number. Download it again."
            )
        layers[f"{layer}.weight"] = LoraLayer(down, up, alpha)
    return layers


def _adapter_config(header: Header) -> dict[str, Any]:
    """peft's description of the LoRA: in the metadata (diffusers), or in the file that peft writes beside it."""
    beside = header.files[0].with_name(_PEFT_CONFIG)
    try:
        if METADATA_KEY in header.metadata:
            config = json.loads(header.metadata[METADATA_KEY])
        elif header.files[0].name == _PEFT_WEIGHTS and beside.is_file():
            config = read_json(beside)
        else:
            return {}
    except (ValueError, RecursionError, CheckpointError) as error:
        logger.warning("%s: its description cannot be read, alpha is taken to be the rank: %s",
                       header.files[0].name, error)  # fmt: skip
        return {}
    config = config if isinstance(config, dict) else {}
    # diffusers puts the name of the model's part in front of each entry.
    return config | {key.removeprefix("transformer."): value for key, value in config.items()}


def _stated_alpha(config: Mapping[str, Any], layer: str, rank: int) -> float | None:
    """alpha of a layer by peft's description; None where it says nothing."""
    patterns = config.get("alpha_pattern")
    patterns = patterns if isinstance(patterns, dict) else {}
    # peft reads these as regular expressions that end a name; trainers write names.
    special = (value for name, value in patterns.items() if f".{layer}".endswith(f".{name.lstrip('^')}"))
    alpha = next(special, config.get("lora_alpha"))
    if isinstance(alpha, bool) or not isinstance(alpha, int | float):
        return None
    # peft's rank-stabilised variant (arXiv 2312.03732) divides by the root of the rank.
    return float(alpha) * (math.sqrt(rank) if config.get("use_rslora") is True else 1.0)
