"""How far the formats of `allegro convert` move what the networks give: the table of docs/formats.md.

    python tests/bench/bench_formats.py

Every format is written to a file and loaded again. Takes about a minute on two cores.
"""

from __future__ import annotations

import math
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))

from allegro_model.config import DIT_88X720P
from allegro_model.dit import AllegroDiT
from allegro_model.loading import bundled_model, load_dit, load_text_encoder
from allegro_model.loading.convert import FORMATS, convert_checkpoint, suffix_of

# Rows of all matrices divide into blocks of 256, as those of the released model do.
DIT = replace(DIT_88X720P, num_layers=4, num_attention_heads=8, caption_channels=256)
PROMPTS = ("a red circle moves right over a blue background", "the sun rises over the sea", "clouds drift over green hills")


def random_dit(path: Path, generator: torch.Generator) -> None:
    """Writes a transformer with normally distributed weights."""
    with torch.device("meta"):
        shapes = {name: x.shape for name, x in AllegroDiT(DIT).state_dict().items()}
    scales = {name: 1 / math.sqrt(math.prod(shape[1:])) if len(shape) > 1 else 0.1 for name, shape in shapes.items()}
    save_file({name: torch.randn(shape, generator=generator) * scales[name] for name, shape in shapes.items()}, path)


def error(found: Tensor, exact: Tensor) -> float:
    """Root of the mean square of the difference, relative to that of the exact result."""
    return float((found - exact).square().mean().sqrt() / exact.square().mean().sqrt())


@torch.no_grad()
def main() -> None:
    """Prints the table."""
    generator, tiny = torch.Generator().manual_seed(0), bundled_model("tiny")
    inputs = (torch.randn(2, 4, 4, 16, 16, generator=generator), torch.tensor([300.0, 800.0]),
              torch.randn(2, 20, DIT.caption_channels, generator=generator))

    def text(path: Path) -> Tensor:
        embeds, mask = load_text_encoder(path, dtype=torch.float32, tokenizer=tiny / "tokenizer").encode(PROMPTS)
        return embeds[mask]

    def dit(path: Path) -> Tensor:
        return load_dit(path, dtype=torch.float32)(*inputs)

    with tempfile.TemporaryDirectory() as folder:
        random = Path(folder) / "dit.safetensors"
        random_dit(random, generator)
        sources = ((random, dit), (tiny / "text_encoder", text))
        exact = [run(source) for source, run in sources]
        print("| format | DiT, random weights | T5, bundled |\n|---|---|---|")
        for kind in FORMATS:
            file, errors = Path(folder) / f"packed{suffix_of(kind)}", []
            for (source, run), expected in zip(sources, exact, strict=True):
                convert_checkpoint(source, file, kind, force=True)
                errors.append(error(run(file), expected))
            print(f"| {kind} | {errors[0]:.4f} | {errors[1]:.4f} |", flush=True)


if __name__ == "__main__":
    main()
