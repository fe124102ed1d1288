"""What step caches and few steps cost and gain, on the bundled model. By hand.

    python tests/bench/bench_cache.py                                # every row, to the terminal
    python tests/bench/bench_cache.py fast draft --cases 12          # rows whose name contains one of these
    python tests/bench/bench_cache.py --write docs/benchmarks.md     # replaces the section of the file
    python tests/bench/bench_cache.py --distances                    # what `CacheCalibration.travelled` of the bundled model was made of

Every row is compared with the exact run of the same prompts and seeds in the same process. Seconds are those of the processor,
which other work on the machine disturbs less than the clock. Nothing here asserts.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from bench_vfi import replace_section
from torch import Tensor

from allegro_model.calibration import ssim
from allegro_model.pipeline import AllegroPipeline, PromptEmbeds, SampleSettings
from allegro_model.sampling import SAMPLERS, Prompt, sigma_to_timestep
from allegro_model.sampling.cache import BROADCAST_STEPS, BROADCAST_TIMESTEPS, BUNDLED
from allegro_model.sampling.schedule import TRAIN_STEPS, reference_sigmas, sigma_table, timestep_to_sigma
from allegro_model.training.evaluate import Case, evaluation_cases, load_models, score, to_frames

TITLE = "## Step caches and few steps"
FEW_STEPS = (20, 12, 8, 5)
MANY_STEPS = 100  # what the released models were made for
# Row -> what the settings of its run are, besides the model's own.
LEVEL_ROWS: dict[str, dict[str, Any]] = {
    "off": {}, **{level: {"cache": level} for level in BUNDLED.levels},
    **{f"{name}, {MANY_STEPS} steps": {"cache": name, "num_steps": MANY_STEPS} for name in BUNDLED.levels if name != "broadcast"}}
# Row -> its steps, and their spacing; another than the reference's is none that the package offers, but ComfyUI does.
FEW_ROWS = {f"{steps} steps": (steps, "reference") for steps in FEW_STEPS}
FEW_ROWS |= {f"{steps} steps, {spacing}": (steps, spacing) for steps in (20, 12) for spacing in ("karras", "trailing")}


def spaced(num_steps: int, spacing: str) -> Tensor:
    """[num_steps + 1] noise levels, descending, last 0.

    Args:
        num_steps: at least 2.
        spacing: "reference"; "karras", even in sigma^(1/7) (arXiv 2206.00364, equation 5); "trailing", even in timesteps with the
            last one above 0 (ComfyUI's sgm_uniform).
    """
    if spacing == "reference":
        return reference_sigmas(num_steps)
    if spacing == "trailing":
        sigmas = timestep_to_sigma(torch.linspace(TRAIN_STEPS - 1, 0, num_steps + 1)[:-1])
    else:
        first, last = sigma_table()[[-1, 0]].double() ** (1 / 7)
        sigmas = ((first + torch.linspace(0, 1, num_steps) * (last - first)) ** 7).float()
    return torch.cat((sigmas, torch.zeros(1)))


@dataclass
class Clips:
    """What the bundled model makes of some prompts.

    Attributes:
        frames: [3, T, H, W] in 0 .. 1 of each.
        seconds: of sampling, all together.
        blocks: evaluations of a transformer block for one prompt, all together; with attention broadcast the share of its parts that ran,
            weighted with their operations at full size.
        right, total: attributes of the prompts that the clips show.
    """

    frames: list[Tensor]
    seconds: float
    blocks: float
    right: int
    total: int


class Bench:
    """The bundled model and the prompts.

    Args:
        count: prompts, evenly drawn from the fixed cases of `allegro_model.training.evaluate`.
    """

    def __init__(self, count: int) -> None:
        cases = evaluation_cases()
        self.cases: list[Case] = [cases[i * len(cases) // count] for i in range(count)]
        self.pipeline = AllegroPipeline.from_pretrained("tiny", device="cpu")
        _, encode, self.vae = load_models(self.pipeline.root)
        with torch.no_grad():
            negative = Prompt(*encode([self.pipeline.defaults.negative_prompt]))
            self.prompts = [PromptEmbeds(Prompt(*encode([case.prompt])), negative) for case in self.cases]

    def settings(self, case: Case, **changes: object) -> SampleSettings:
        return self.pipeline.settings(seed=case.seed, **changes)

    def run(self, **changes: object) -> Clips:
        """All clips with these settings."""
        blocks = Blocks(self.pipeline.dit)
        start = time.process_time()
        latents = [self.pipeline.raw_latents(self.pipeline.sample(prompts, self.pipeline.start(self.settings(case, **changes))))
                   for case, prompts in zip(self.cases, self.prompts, strict=True)]
        seconds = time.process_time() - start
        blocks.remove()
        with torch.no_grad():
            decoded = [self.vae.decode(item)[0] for item in latents]
        found = score([to_frames(clip) for clip in decoded], self.cases)
        return Clips([(clip / 2 + 0.5).clamp(0, 1) for clip in decoded], seconds, blocks.count,
                     sum(right for right, _ in found.values()), sum(total for _, total in found.values()))


class Blocks:
    """Counts evaluations of blocks. Shares of their parts at 79,200 tokens: the arithmetic of one block of the released model."""

    SHARES = {"attn1": 0.88, "attn2": 0.03}  # noqa: RUF012 (self-attention with its projections; cross-attention; the rest is the MLP)

    def __init__(self, dit: torch.nn.Module) -> None:
        self.count = 0.0
        self.hooks = []
        for block in dit.transformer_blocks:
            parts = {name: block.get_submodule(name) for name in self.SHARES}
            self.hooks += [part.register_forward_hook(self.add(self.SHARES[name])) for name, part in parts.items()]
            self.hooks.append(block.register_forward_hook(self.add(1 - sum(self.SHARES.values()))))

    def add(self, share: float) -> Callable[..., None]:
        def hook(module: torch.nn.Module, args: tuple[object, ...], output: Tensor) -> None:
            self.count += share * len(output)

        return hook

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()


# Measures


def psnr(a: Tensor, b: Tensor) -> float:
    """dB, of clips in 0 .. 1."""
    return float(-10 * torch.log10((a - b).square().mean().clamp_min(1e-10)))


def level_row(name: str, clips: Clips, exact: Clips) -> str:
    quality = [psnr(a, b) for a, b in zip(clips.frames, exact.frames, strict=True)]
    likeness = [ssim(a, b) for a, b in zip(clips.frames, exact.frames, strict=True)]
    numbers = ["-", "-", "-", "-", "-"] if clips is exact else [
        f"{exact.blocks / clips.blocks:.2f}", f"{exact.seconds / clips.seconds:.2f}", f"{np.mean(quality):.1f} dB",
        f"{min(quality):.1f} dB", f"{np.mean(likeness):.3f}"]
    return "| " + " | ".join([name, *numbers, f"{clips.right} of {clips.total}", str(len(quality))]) + " |"


def distances(bench: Bench) -> str:
    """For each hundred timesteps, how far the prediction of the exact run is from its end: `CacheCalibration.travelled`."""
    tables = []
    for case, prompts in zip(bench.cases, bench.prompts, strict=True):
        seen: list[tuple[float, Tensor]] = []
        state = bench.pipeline.start(bench.settings(case))
        bench.pipeline.sample(prompts, state, callback=lambda info, seen=seen: seen.append((info.sigma, info.denoised)))
        scale = seen[-1][1].square().mean().sqrt()
        changes = [((b - a).square().mean().sqrt() / scale).sqrt() for (_, a), (_, b) in pairwise(seen)]
        clock = [float(sigma_to_timestep(torch.tensor(sigma))) for sigma, _ in seen]
        left = np.append(np.cumsum(np.array(changes)[::-1])[::-1], 0.0)
        tables.append(np.interp(range(0, 1000, 50), clock[::-1], left[::-1]))
    return "\n".join(f"{t}: {value:.2f}" for t, value in zip(range(0, 1000, 50), np.mean(tables, axis=0), strict=True))


# The section


LEVEL_HEADER = """| level | blocks, times fewer | times faster | PSNR, mean | PSNR, worst clip | SSIM | follows the prompt | clips |
|---|---|---|---|---|---|---|---|"""
FEW_HEADER = """| steps | """ + " | ".join(SAMPLERS) + """ | clips |
|---|""" + "---|" * (len(SAMPLERS) + 1)


def section(lines: dict[str, str]) -> str:
    levels = [lines[name] for name in LEVEL_ROWS if name in lines]
    few = [lines[name] for name in FEW_ROWS if name in lines]
    details = [f"- {name}: threshold {level.threshold:g}, guidance in timesteps {level.guidance[0]:g} to {level.guidance[1]:g}."
               for name, level in BUNDLED.levels.items() if not level.broadcast]
    return f"""{TITLE}

Written by `tests/bench/bench_cache.py`: the bundled model with its own settings (30 steps of euler_ancestral, guidance 2.5) or more steps,
against the exact clips of the same prompts and seeds; processor seconds of sampling, one thread, torch {torch.__version__}. "Follows the
prompt" counts what image analysis finds in the clips. The released weights have not been measured.

{LEVEL_HEADER}
{chr(10).join(levels)}

{chr(10).join(details)}
- broadcast: self-attention at every {BROADCAST_STEPS["self"]}nd step and cross-attention at every {BROADCAST_STEPS["cross"]}th, in timesteps {BROADCAST_TIMESTEPS[0]:g} to
  {BROADCAST_TIMESTEPS[1]:g}. Every block runs, some without their attentions; they are counted with the operations of each part at 720p
  and 88 frames. The bundled model has so few tokens that attention is no large part of its time.
- The levels adapt to the number of steps: the more there are, the more are left out, and with 12 hardly any.
- The change of the first block's output (first block cache), compared at every step instead of the calibrated distance, is no
  better: 33.5 dB at 1.5 and 28.0 dB at 2.2 times fewer blocks, against 32.2 dB at 1.7 and 29.9 dB at 2.7 (6 clips, 30 steps).
  Using the rest of the network's output again there, or the clean latents, makes no difference (28.0 and 26.9 dB at 2.2).

How often clips of few steps follow their prompt, without a cache. Five steps of any sampler are enough for what the bundled model
is asked to draw, so this hardly tells samplers apart; the released models were made for 100. Rows without a word have the
reference's spacing of noise levels, the one that the package has; "karras" and "trailing" (ComfyUI's sgm_uniform) are spacings that
ComfyUI's own sampler nodes offer; they were tried with fewer clips, and counts compare within rows of as many.

{FEW_HEADER}
{chr(10).join(few)}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="run the rows whose name contains one of these; the others stay in the file")
    parser.add_argument("--cases", type=int, default=72, help="prompts, 1 to 72")
    parser.add_argument("--distances", action="store_true", help="only print the table of distances")
    parser.add_argument("--write", type=Path, help="Markdown file for the tables")
    args = parser.parse_args()
    torch.set_num_threads(1)
    bench = Bench(args.cases)
    if args.distances:
        print(distances(bench))
        return
    names = [*LEVEL_ROWS, *FEW_ROWS]
    wanted = [name for name in names if not args.words or any(word in name for word in args.words)]
    text = args.write.read_text(encoding="utf-8") if args.write else ""
    lines = {name: line for name in names for line in text.splitlines() if line.startswith(f"| {name} |")}
    exact: dict[int | None, Clips] = {}  # by the number of steps
    for name in wanted:
        if name in FEW_ROWS:
            steps, spacing = FEW_ROWS[name]
            with patch("allegro_model.pipeline.reference_sigmas", lambda count, denoise, spacing=spacing: spaced(count, spacing)):
                runs = [bench.run(num_steps=steps, sampler=sampler) for sampler in SAMPLERS]
            lines[name] = "| " + " | ".join([name, *(f"{run.right} of {run.total}" for run in runs), str(args.cases)]) + " |"
        else:
            steps = LEVEL_ROWS[name].get("num_steps")
            if steps not in exact:
                exact[steps] = bench.run(num_steps=steps)
            clips = exact[steps] if name == "off" else bench.run(**LEVEL_ROWS[name])
            lines[name] = level_row(name, clips, exact[steps])
        print(lines[name], flush=True)
    if args.write:
        args.write.write_text(replace_section(text, section(lines), TITLE), encoding="utf-8")


if __name__ == "__main__":
    main()
