"""Time and memory of the transformer against tokens, and how well `allegro estimate` foretells them. By hand.

    python tests/bench/bench_scale.py                            # to the terminal
    python tests/bench/bench_scale.py --write docs/benchmarks.md   # replaces the section of the file

One layer of the released width, float32, 1 thread, processor seconds, which other work disturbs less than the clock. The
estimate and the real evaluation take turns. Seconds are fitted by b N + c N^2, in relative error. Nothing here asserts.
"""

import argparse
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from bench_vfi import replace_section  # noqa: E402 (after the path)

from allegro_model.attention import sdpa  # noqa: E402
from allegro_model.bench.fit import fit_seconds  # noqa: E402
from allegro_model.bench.measure import peak_of, seconds_of  # noqa: E402
from allegro_model.bench.networks import open_networks  # noqa: E402
from allegro_model.bench.speed import dit_run, evaluation_seconds  # noqa: E402
from allegro_model.costs import dit_flops  # noqa: E402
from allegro_model.geometry import LatentShape, estimate_sampling_bytes, token_count  # noqa: E402

TITLE = "## Time against tokens"
FULL = LatentShape(22, 90, 160)
# About 900, 1,800, 3,600, 7,200 and 14,400 tokens.
SHAPES = (LatentShape(1, 46, 80), LatentShape(2, 46, 80), LatentShape(1, 90, 160), LatentShape(2, 90, 160), LatentShape(4, 90, 160))
CPU = torch.device("cpu")
LAYERS = 32
HEADER = """| tokens | seconds | estimated | error | GFLOP/s | memory | formula | rounds |
|---|---|---|---|---|---|---|---|"""


def measure(shape: LatentShape, rounds: int) -> tuple[float, float, int]:
    """(seconds, estimated seconds, peak bytes) of a layer."""
    released = open_networks("88x720P")
    networks = replace(released, dit=replace(released.dit, num_layers=1))
    run = dit_run(networks.random_dit(1, CPU, torch.float32), shape, 1)
    peak = peak_of(run, CPU)
    real, foretold = [], []
    for _ in range(rounds):
        foretold.append(evaluation_seconds(networks, shape, device=CPU, dtype=torch.float32, attention=sdpa).total)
        real.append(seconds_of(run, CPU))
    return statistics.median(real), statistics.median(foretold), peak or 0


def line(shape: LatentShape, real: float, foretold: float, peak: int, rounds: int) -> str:
    config = replace(open_networks("88x720P").dit, num_layers=1)
    flops = dit_flops(config, shape, 128).total
    formula = estimate_sampling_bytes(config, shape, batch=1, dtype_bytes=4)
    return (f"| {token_count(shape):,} | {real:.2f} s | {foretold:.2f} s | {foretold / real - 1:+.0%} | {flops / real / 1e9:.0f} | "
            f"{peak / 2**20:.0f} MiB | {formula / 2**20:.0f} MiB | {rounds} |")


def section(lines: list[str], tokens: list[int], seconds: list[float]) -> str:
    b, c = fit_seconds(tokens, seconds)
    full, flops = token_count(FULL), dit_flops(open_networks("88x720P").dit, FULL, 128)
    layer = b * full + c * full**2
    error = max(abs(b * n + c * n * n - s) / s for n, s in zip(tokens, seconds, strict=True))
    return f"""{TITLE}

Written by `tests/bench/bench_scale.py`: one of the 32 layers of the released model, one prompt, float32, processor seconds of 1
thread, torch {torch.__version__}; estimates and evaluations in turn. "Estimated" is what `allegro estimate` says
after a second or two of measuring, "formula" the working memory that a run is checked against.

{HEADER}
{chr(10).join(lines)}

Fitted: {b * 1e3:.3g} s for each 1,000 tokens and {c * 1e6:.3g} s for the square of 1,000, at most {error:.0%} off. That is {layer:,.0f} s for a layer at 79,200
tokens, {layer * LAYERS / 3600:.1f} hours for an evaluation by one such thread, {c * full**2 / layer:.0%} of it self-attention; by
operations it is {flops.self_attention / flops.total:.0%} of {flops.total:.2g}. A run of 100 steps with guidance has 200 evaluations: it is for GPUs.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--most", type=int, default=7200, help="tokens")
    parser.add_argument("--write", type=Path, help="Markdown file for the table")
    args = parser.parse_args()
    torch.set_num_threads(1)
    lines, tokens, seconds = [], [], []
    print(HEADER)
    with torch.no_grad(), patch("allegro_model.bench.measure.time", SimpleNamespace(perf_counter=time.process_time)):
        for shape in SHAPES:
            if token_count(shape) > args.most:
                continue
            real, foretold, peak = measure(shape, args.rounds)
            tokens.append(token_count(shape))
            seconds.append(real)
            lines.append(line(shape, real, foretold, peak, args.rounds))
            print(lines[-1], flush=True)
    made = section(lines, tokens, seconds)
    print(made.split("\n\n")[-1])
    if args.write:
        args.write.write_text(replace_section(args.write.read_text(encoding="utf-8"), made, TITLE), encoding="utf-8")


if __name__ == "__main__":
    main()
