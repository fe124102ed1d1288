"""Reads indices of reference vectors. The format is described in README.md beside this file."""

import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn


@dataclass(frozen=True)
class Case:
    """One entry of an index."""

    name: str
    kind: str
    entry: Mapping[str, Any]
    folder: Path

    @property
    def id(self) -> str:
        return f"{self.folder.parent.name}/{self.folder.name}/{self.name}"

    @property
    def config(self) -> Mapping[str, Any]:
        return self.entry.get("config", {})

    def tolerance(self, name: str) -> Mapping[str, float]:
        """`rtol` and `atol` of an output."""
        return self.entry["tolerance"]

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the case's file; float16 holds exact values and is computed with in float32."""
        return as_float32(load_file(self.folder / self.entry["file"]))

    def part(self, prefix: str) -> dict[str, Tensor]:
        """Tensors below `prefix`, without it."""
        return {k[len(prefix):]: v for k, v in self.tensors.items() if k.startswith(prefix)}

    @property
    def inputs(self) -> dict[str, Tensor]:
        return self.part("in.")

    @property
    def outputs(self) -> dict[str, Tensor]:
        return self.part("out.")

    @property
    def expected(self) -> dict[str, Tensor]:
        """Outputs that must be met: not the intermediate values, nor those stored for information."""
        return {k: v for k, v in self.outputs.items()
                if not k.startswith("mid_") and not k.endswith("_bf16_reference")}

    def fill(self, module: nn.Module, *, prefix: str = "", aliases: Mapping[str, str] | None = None) -> nn.Module:
        """Loads the case's weights into `module`: from its file, from a shared file, or from the recipe.

        Args:
            module: float32; every parameter must be covered, and nothing may be left over.
            prefix: part of the stored names in front of the module's own.
            aliases: second name of a tensor -> name it is stored under, for names the file may leave out.
        """
        note = str(self.entry.get("weights", ""))
        if note == "recipe":
            seed = int(self.entry["weight_seed"])
            half = bool(self.entry.get("round_to_half", False))
            weights = {k: recipe(k, tuple(v.shape), seed) for k, v in module.state_dict().items()}
            weights = {k: v.half().float() if half else v for k, v in weights.items()}
        elif own := self.part("weights." + prefix):
            weights = own
        else:
            shared = [word for word in note.split() if word.endswith(".safetensors")]
            assert shared, f"{self.id}: no weights in the file and none named: {note!r}"
            weights = as_float32(load_file(self.folder / shared[0]))
            weights = {k.removeprefix("weights."): v for k, v in weights.items()}
        for name, stored in (aliases or {}).items():
            weights.setdefault(name, weights[stored])
        module.load_state_dict(weights, strict=True)
        return module.eval()


@dataclass(frozen=True)
class InterpolationCase(Case):
    """The dialect of the frame interpolation index.

    Tensors are called `<case>/<name>`, a case may borrow another's inputs, and every output has its own tolerance.
    """

    index: Mapping[str, Any]

    @property
    def config(self) -> Mapping[str, Any]:
        """Sizes of a network whose weights are a formula."""
        return self.index["formula_weights"][f"{self.entry['variant']}@{self.entry['weight_seed']}"]["config"]

    def tolerance(self, name: str) -> Mapping[str, float]:
        return {"rtol": 0.0, "atol": self.entry["outputs"][name]["atol"]}

    @property
    def inputs(self) -> dict[str, Tensor]:
        """Pictures, stored as bytes, are in [0, 1]."""
        lender = self.entry.get("inputs_from", self.name)
        entry = next(e for e in self.index["cases"] if e["name"] == lender)
        found = {name: self.part(f"{lender}/")[name] for name in entry["inputs"]}
        return {k.removesuffix("_u8"): v / 255 if k.endswith("_u8") else v for k, v in found.items()}

    @property
    def outputs(self) -> dict[str, Tensor]:
        return {name: self.part(f"{self.name}/")[name] for name in self.entry["outputs"]}

    def fill(self, module: nn.Module, *, prefix: str = "", aliases: Mapping[str, str] | None = None) -> nn.Module:
        if self.entry["weights"] == "formula":
            seed = int(self.entry["weight_seed"])
            weights = {k: formula(k, tuple(v.shape), seed) for k, v in module.state_dict().items()}
        else:
            stored = as_float32(load_file(self.folder / self.entry["weights"]))
            weights = {k.removeprefix(prefix): v for k, v in stored.items() if k.startswith(prefix)}
        module.load_state_dict(weights, strict=True)
        return module.eval()


def as_float32(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.float() if v.is_floating_point() else v for k, v in tensors.items()}


def recipe(key: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """The weight called `key` of a case whose weights are a formula instead of data.

    Standard normal numbers from NumPy's frozen legacy generator, seeded with the CRC-32 of the name plus the
    case's seed; scaled to 0.3 for modulation tables, 1/sqrt(fan-in) for matrices and kernels, 1 +- 0.2 for
    gains, 0.1 for biases.
    """
    generator = np.random.RandomState((zlib.crc32(key.encode()) + seed) % 2**32)
    x = torch.from_numpy(generator.standard_normal(size=shape).astype(np.float32))
    if key.endswith("scale_shift_table"):
        return x * torch.tensor(0.3)
    if len(shape) >= 2:
        return x / torch.tensor(float(np.sqrt(np.float64(np.prod(shape[1:]))))).float()
    return 1 + 0.2 * x if key.endswith(".weight") else 0.1 * x


def formula(key: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """As `recipe`, for frame interpolation: the gains of a network whose flows reach several pixels."""
    generator = np.random.RandomState((zlib.crc32(key.encode()) + 1000003 * seed) % 2**32)
    x = generator.standard_normal(size=shape)
    if key.endswith(".bias"):
        x = 0.05 * x
    elif len(shape) == 1:
        x = 1 + 0.1 * x if "norm" in key else 0.25 + 0.05 * x
    else:
        fan_in = 4 * shape[0] if key.startswith("unet.up") else np.prod(shape[1:])
        x = _gain(key, len(shape)) / np.sqrt(fan_in) * x
    return torch.from_numpy(x.astype(np.float32))


def _gain(key: str, ndim: int) -> float:
    if key.startswith("unet.conv."):
        return 0.25
    if key.startswith("block.") and key.endswith(".conv.2.0.weight"):
        return 2.0
    if ".attn.q." in key or ".attn.kv." in key:
        return 1.5
    return 1.3 if ndim == 4 else 1.0


def indices(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Every `*.json` of `folder` that has cases."""
    assert folder.is_dir(), f"--golden {folder}: not a folder"
    found = False
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict) and "cases" in content:
            found = True
            yield path, content
    assert found, f"--golden {folder}: no *.json with \"cases\" in it"


def is_text_index(content: Mapping[str, Any]) -> bool:
    """Caption-cleaning cases are a list of inputs and expected outputs, without files."""
    cases = content["cases"]
    return isinstance(cases, list) and bool(cases) and "input" in cases[0]


def tensor_cases(folder: Path) -> list[Case]:
    """Every case of `folder` with tensors in it; the index lists them by name, or as a list with names inside."""
    found: list[Case] = []
    for _, content in indices(folder):
        if is_text_index(content):
            continue
        listed = content["cases"]
        if "formula_weights" in content:
            found += [InterpolationCase(entry["name"], entry["kind"], entry, folder, content) for entry in listed]
            continue
        entries = listed.items() if isinstance(listed, dict) else ((e["name"], e) for e in listed)
        found += [Case(name, entry["kind"], entry, folder) for name, entry in entries]
    return found


def text_cases(folder: Path) -> list[Mapping[str, str]]:
    """Every caption-cleaning case of `folder`."""
    return [case for _, content in indices(folder) if is_text_index(content) for case in content["cases"]]
