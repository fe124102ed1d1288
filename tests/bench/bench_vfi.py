"""Speed of frame interpolation against a plain implementation and the public one, taken in turn. By hand.

    python tests/bench/bench_vfi.py                          # every row, to the terminal
    EMA_VFI_PATH=DIR python tests/bench/bench_vfi.py small   # with the public implementation, a checkout of MCG-NJU/EMA-VFI
    python tests/bench/bench_vfi.py --write docs/benchmarks.md   # replaces the section of the file

All sides run in one process, in turn, on the same clip with the same weights; the table has the medians over the rounds, of which
there are as many as fit in some seconds. bfloat16 is left out where the processor has no instructions for it.
Seconds are those of the processor, which other work on the machine disturbs less than the clock. Nothing here asserts.
"""

import argparse
import os
import re
import statistics
import sys
import time
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor, nn

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from parity.cases import formula  # noqa: E402 (after the path)

from allegro_model.config import VFI_PRESETS  # noqa: E402
from allegro_model.ops import half_is_slow  # noqa: E402
from allegro_model.vfi import EMAVFI, EMAInterpolator, FrameTimes, interpolate_clip  # noqa: E402
from allegro_model.vfi.emavfi import flow as heads  # noqa: E402
from allegro_model.vfi.emavfi import layers, model, refine, tables, warp  # noqa: E402

FRAMES = 5
SIZES = ((448, 256), (640, 384))
BUDGET = 25.0  # seconds of a row, about
TITLE = "## Frame interpolation"
Run = Callable[[Tensor], Tensor]


def clip(width: int, height: int) -> Tensor:
    """[FRAMES, H, W, 3]: smooth colours that move by a few pixels per frame."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand((1, 3, height // 16 + 6, width // 16 + 6), generator=generator)
    big = torch.nn.functional.interpolate(coarse, scale_factor=16, mode="bicubic").clamp(0, 1)[0]
    return torch.stack([big[:, 3 * i : 3 * i + height, 5 * i : 5 * i + width] for i in range(FRAMES)]).movedim(1, -1).contiguous()


def weights(name: str) -> dict[str, Tensor]:
    """Random, with the gains of the reference vectors: flows reach several pixels."""
    empty = EMAVFI(VFI_PRESETS[name], device="meta").state_dict()
    return {key: formula(key, tuple(value.shape), 101) for key, value in empty.items()}


# The sides


def ours(state: dict[str, Tensor], name: str, dtype: torch.dtype) -> Run:
    network = EMAVFI(VFI_PRESETS[name], dtype=dtype).requires_grad_(False).eval()
    network.load_state_dict(state)
    interpolator = EMAInterpolator(network.to(memory_format=torch.channels_last))
    return lambda images: interpolate_clip(images, interpolator, FrameTimes.multiplied(2), scene_threshold=0)[1::2]


def plain(state: dict[str, Tensor], name: str) -> Run:
    """The same network pair by pair, as it is written down: nothing is kept from pair to pair, contiguous layout,
    PyTorch's own layers and grid_sample, tables built when they are needed, in float32."""
    network = EMAVFI(VFI_PRESETS[name]).requires_grad_(False).eval()
    network.load_state_dict(state)

    def run(images: Tensor) -> Tensor:
        frames = images.movedim(-1, 1)
        with as_written(), torch.inference_mode():
            return torch.cat([network(a[None], b[None]) for a, b in pairwise(frames)]).movedim(1, -1)

    return run


@contextmanager
def as_written() -> Iterator[None]:
    """Without everything that makes our side fast."""
    def prelu(self: layers.PReLU, x: Tensor) -> Tensor:
        return nn.functional.prelu(x, self.weight)

    def join(*parts: Tensor) -> Tensor:
        return torch.cat([part.contiguous() for part in parts], dim=1)

    with (patch.object(layers.PReLU, "forward", prelu), patch.object(layers.TokenLinear, "forward", nn.Linear.forward),
          patch.object(model, "network_layout", Tensor.contiguous), patch.object(refine, "join", join),
          patch.object(heads, "join", join), patch.object(warp, "warping", warp._grid_sample),
          patch.object(tables.Tables, "__call__", lambda self, make, *key: make(*key))):
        yield


def public(state: dict[str, Tensor], name: str, folder: str) -> Run:
    """The public implementation; of timm it needs three trivial helpers, which are stood in for."""
    helpers = types.ModuleType("timm.models.layers")
    helpers.__dict__.update(DropPath=nn.Identity, to_2tuple=lambda x: (x, x), trunc_normal_=nn.init.trunc_normal_)
    sys.modules |= {"timm": types.ModuleType("timm"), "timm.models": types.ModuleType("timm.models"),
                    "timm.models.layers": helpers}
    sys.path.insert(0, folder)
    preset = VFI_PRESETS[name]
    backbone, flow = import_module("config").init_model_config(F=preset.base_channels, W=7, depth=list(preset.depth))
    package = import_module("model")
    network = package.flow_estimation(package.feature_extractor(**backbone), **flow).requires_grad_(False).eval()
    network.load_state_dict(state)

    def run(images: Tensor) -> Tensor:
        frames = images.movedim(-1, 1)
        with torch.inference_mode(), patch.object(Tensor, "cuda", lambda self: self):  # it has this device built in
            made = [network(torch.cat((a[None], b[None]), 1), timestep=0.5)[3]
                    for a, b in pairwise(frames)]
        return torch.cat(made).movedim(1, -1)

    return run


# The table


def measure(name: str, size: tuple[int, int], rounds: int) -> str:
    state, images = weights(name), clip(*size)
    sides = {"plain": plain(state, name), "float32": ours(state, name, torch.float32)}
    if not half_is_slow(torch.bfloat16):
        sides["bfloat16"] = ours(state, name, torch.bfloat16)
    if folder := os.environ.get("EMA_VFI_PATH"):
        sides["public"] = public(state, name, folder)
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    made, spent, took, first = {}, 0.0, 0.0, True
    # The first turn warms up, unless it is so long that this does not show.
    while first or (len(seconds["plain"]) < rounds and spent + took < BUDGET) or not seconds["plain"]:
        took = 0.0
        for side, run in sides.items():
            start = time.process_time()
            made[side] = run(images)
            now = time.process_time() - start
            took += now
            seconds[side].append(now / (FRAMES - 1))
        if first and took < BUDGET / 2:
            seconds = {side: [] for side in sides}
        spent, first = spent + took, False
    median = {side: statistics.median(values) for side, values in seconds.items()}
    cells = [title(name, size)]
    for side in ("public", "plain", "float32", "bfloat16"):
        cells.append(f"{median[side]:.3f} s" if side in median else "-")
    for side in ("float32", "bfloat16"):
        cells.append(f"{median['plain'] / median[side]:.2f}" if side in median else "-")
        cells.append(f"{(made[side].float() - made['plain']).abs().mean():.1e}" if side in median else "-")
    if "public" in made:
        cells[1] += f" ({(made['public'] - made['plain']).abs().max():.0e})"
    return "| " + " | ".join([*cells, str(len(seconds["plain"]))]) + " |"


HEADER = """| what | public (largest difference) | plain | ours, float32 | ours, bfloat16 | times faster, float32 | mean error | times faster, bfloat16 | mean error | rounds |
|---|---|---|---|---|---|---|---|---|---|"""


def title(name: str, size: tuple[int, int]) -> str:
    return f"{name}, {size[0]}x{size[1]}"


def section(lines: list[str], threads: int) -> str:
    return f"""{TITLE}

Written by `tests/bench/bench_vfi.py`: processor seconds per new frame of a clip of {FRAMES} frames, {threads}
{"thread" if threads == 1 else "threads"}, same random weights, all sides in turn in one process; torch {torch.__version__}. "Public" is
MCG-NJU/EMA-VFI, "plain" the same network of ours pair by pair, as it is written down. "Times faster" and the mean error, a share of
the full range, are against "plain".{" This processor has no bfloat16 instructions." * half_is_slow(torch.bfloat16)}

{HEADER}
{chr(10).join(lines)}

What makes the difference: a frame's own features are computed once, not once per pair; one memory layout throughout; warps fetch
whole pixels; linear layers and narrow activations in forms that the processor's vectors fit; tables are kept.
"""


def replace_section(text: str, new: str, title: str = TITLE) -> str:
    """Puts the section in place of the old one, or at the end."""
    old = re.search(rf"^{title}$.*?(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    if not old:
        return text.rstrip("\n") + "\n\n" + new
    following = text[old.end():]
    return text[: old.start()] + new + ("\n" + following if following else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="run the rows whose name contains one of these; the others stay in the file")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--write", type=Path, help="Markdown file for the table")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    text = args.write.read_text(encoding="utf-8") if args.write else ""
    rows = [(name, size) for name in ("ours_small", "ours") for size in SIZES]
    lines = {title(*row): line for row in rows for line in text.splitlines() if line.startswith(f"| {title(*row)} |")}
    print(HEADER)
    for row in rows:
        if not args.words or any(word in title(*row) for word in args.words):
            lines[title(*row)] = measure(*row, args.rounds)
            print(lines[title(*row)], flush=True)
    if args.write:
        kept = [lines[title(*row)] for row in rows if title(*row) in lines]
        args.write.write_text(replace_section(text, section(kept, args.threads)), encoding="utf-8")


if __name__ == "__main__":
    main()
