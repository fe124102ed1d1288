"""The VAE's memory against diffusers, counted, and what bfloat16 costs it in precision. By hand: `make bench`.

    python tests/bench/bench_vae.py                              # to the terminal
    python tests/bench/bench_vae.py --write docs/benchmarks.md   # replaces the section of the file

Memory is that of all living tensors at the worst moment, weights left out, by one method for both sides on the meta device, where
nothing is computed. Nothing here asserts.
"""

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from bench_vfi import replace_section  # noqa: E402 (after the path)
from live_bytes import LiveBytes  # noqa: E402
from sides import random_weights  # noqa: E402

from allegro_model.bench.networks import META  # noqa: E402
from allegro_model.config import VAE_720P, VAEConfig  # noqa: E402
from allegro_model.pipeline import AllegroPipeline  # noqa: E402
from allegro_model.vae import Tiling, VideoVAE  # noqa: E402

TITLE = "## Memory and precision of the VAE"
TILE = (24, 320, 320)
DTYPES = (torch.float32, torch.bfloat16)
MEMORY_HEADER = """| a tile of 24x320x320 | ours | diffusers | ratio |
|---|---|---|---|"""
PRECISION_HEADER = """| bfloat16 against float32 | seconds, float32 | seconds, bfloat16 | relative difference | PSNR | rounds |
|---|---|---|---|---|---|"""


# Memory


def ours(dtype: torch.dtype) -> tuple[Callable[[Tensor], Any], Callable[[Tensor], Any]]:
    """(encode, decode) of the released sizes."""
    vae = VideoVAE(VAE_720P, device=META, dtype=dtype)
    tiling = Tiling.from_config(VAE_720P)
    return lambda x: vae.encode(x, tiling=tiling), lambda x: vae.decode(x, tiling=tiling)


def theirs(dtype: torch.dtype) -> tuple[Callable[[Tensor], Any], Callable[[Tensor], Any]]:
    """The same of diffusers, which has its tiles built in."""
    from diffusers import AutoencoderKLAllegro

    with META:
        vae = AutoencoderKLAllegro(scaling_factor=VAE_720P.scale_factor).to(dtype)
    vae.enable_tiling()
    return vae.encode, vae.decode


def memory_lines() -> list[str]:
    t, h, w = TILE
    found = []
    for dtype in DTYPES:
        inputs = {"encode": (1, 3, *TILE), "decode": (1, 4, t // 4, h // 8, w // 8)}
        for number, (direction, shape) in enumerate(inputs.items()):
            peaks = []
            for side in (ours, theirs):
                run, x = side(dtype)[number], torch.empty(shape, device=META, dtype=dtype)
                with LiveBytes() as live:
                    run(x)
                peaks.append(live.peak)
            found.append(f"| {direction}, {str(dtype)[6:]} | {peaks[0] / 2**30:.2f} GiB | {peaks[1] / 2**30:.2f} GiB | "
                         f"{peaks[0] / peaks[1]:.2f} |")
    return found


# Precision


def clip_latents(pipeline: AllegroPipeline) -> Tensor:
    """A clip of the bundled model -> raw latents."""
    prompts = pipeline.encode_prompt("a red circle moves right over a blue background", guidance_scale=2.5)
    return pipeline.raw_latents(pipeline.sample(prompts, pipeline.start(pipeline.settings(seed=1, num_steps=12))))


def precision_line(name: str, config: VAEConfig, state: dict[str, Tensor], latents: Tensor, peak: float | None, rounds: int) -> str:
    """Both types in turn.

    Args:
        name: of the line.
        config, state: of the network.
        latents: raw, of one tile.
        peak: the range that values can have; None for the range of the exact ones.
        rounds: of each.
    """
    networks = {}
    for dtype in DTYPES:
        networks[dtype] = VideoVAE(config, device=META).to_empty(device="cpu")
        networks[dtype].load_state_dict(state)
        networks[dtype].to(dtype).eval()
    seconds: dict[torch.dtype, list[float]] = {dtype: [] for dtype in DTYPES}
    made = {}
    for _ in range(rounds):
        for dtype in DTYPES:
            start = time.perf_counter()
            made[dtype] = networks[dtype].decode_tile(latents.to(dtype)).float()
            seconds[dtype].append(time.perf_counter() - start)
    exact, rounded = made.values()
    if peak is not None:
        exact, rounded = exact.clamp(-1, 1), rounded.clamp(-1, 1)
    error = (exact - rounded).square().mean().sqrt()
    decibels = 20 * math.log10((float(exact.max() - exact.min()) if peak is None else peak) / float(error))
    times = " | ".join(f"{statistics.median(seconds[dtype]):.3g} s" for dtype in DTYPES)
    return f"| {name} | {times} | {float(error / exact.square().mean().sqrt()):.1e} | {decibels:.1f} dB | {rounds} |"


def precision_lines(rounds: int) -> list[str]:
    pipeline = AllegroPipeline.from_pretrained("tiny", device="cpu")
    bundled = precision_line("bundled model, a clip of 24x64x96", pipeline.vae_config, pipeline.vae.state_dict(),
                             clip_latents(pipeline), 2.0, rounds)
    noise = torch.randn(1, 4, 2, 8, 8, generator=torch.Generator().manual_seed(1))
    released = VideoVAE(VAE_720P)
    random_weights(released)
    return [bundled, precision_line("released sizes, random weights, a tile of 8x64x64", VAE_720P, released.state_dict(), noise,
                                    None, rounds)]


def section(memory: list[str], precision: list[str]) -> str:
    return f"""{TITLE}

Written by `tests/bench/bench_vae.py`, torch {torch.__version__}. Counted, not measured: the tensors that are alive at the worst moment
of encoding and decoding, weights left out, the same way for both sides.

{MEMORY_HEADER}
{chr(10).join(memory)}

PSNR is of the range -1 to 1 for the bundled model, whose weights are trained, and of the range of the exact values for random
weights, which draw no pictures.

{PRECISION_HEADER}
{chr(10).join(precision)}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--write", type=Path, help="Markdown file for the tables")
    args = parser.parse_args()
    with torch.no_grad():
        made = section(memory_lines(), precision_lines(args.rounds))
    print(made)
    if args.write:
        args.write.write_text(replace_section(args.write.read_text(encoding="utf-8"), made, TITLE), encoding="utf-8")


if __name__ == "__main__":
    main()
