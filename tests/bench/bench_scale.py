"""Time and memory of the transformer against tokens, how near that is to the limit of the machine, and how well `allegro estimate`
and the line before the first step foretell runs. By hand.

    python tests/bench/bench_scale.py                            # to the terminal
    python tests/bench/bench_scale.py --most 30000               # one clip of 28,800 tokens more, some minutes
    python tests/bench/bench_scale.py --write docs/benchmarks.md   # replaces the sections of the file

Networks of the released width with one layer, float32, seconds of the clock: on a machine that does nothing else. Estimates and
runs take turns. Seconds are fitted by b N + c N^2, in relative error. Nothing here asserts.
"""

import argparse
import os
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import patch

import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from bench_vfi import replace_section  # noqa: E402 (after the path)

from allegro_model.attention import sdpa  # noqa: E402
from allegro_model.bench import quick  # noqa: E402
from allegro_model.bench.estimate import Machine, estimate_run  # noqa: E402
from allegro_model.bench.fit import fit_seconds  # noqa: E402
from allegro_model.bench.hardware import processor  # noqa: E402
from allegro_model.bench.measure import peak_of, randomise, seconds_of  # noqa: E402
from allegro_model.bench.networks import Networks, open_networks  # noqa: E402
from allegro_model.bench.roofline import convolution_run, matmul_run  # noqa: E402
from allegro_model.bench.speed import TEXT_TOKENS, decode_seconds, dit_run, evaluation_seconds, text_seconds  # noqa: E402
from allegro_model.costs import dit_flops, vae_decode_flops  # noqa: E402
from allegro_model.geometry import LatentShape, estimate_sampling_bytes, token_count  # noqa: E402
from allegro_model.pipeline import AllegroPipeline, SampleSettings  # noqa: E402
from allegro_model.text.encoder import empty_model  # noqa: E402

SCALE, ESTIMATES, ROOFLINE = "## Time against tokens", "## Estimates against runs", "## How near to the limit on a processor"
FULL = LatentShape(22, 90, 160)
# 920, 1,840, 3,600, 7,200, 14,400 and 28,800 tokens.
SHAPES = (LatentShape(1, 46, 80), LatentShape(2, 46, 80), LatentShape(1, 90, 160), LatentShape(2, 90, 160), LatentShape(4, 90, 160),
          LatentShape(8, 90, 160))
LONG = 10_000  # tokens, which need no second round
TILES = (LatentShape(2, 8, 8), LatentShape(2, 16, 16))
CPU = torch.device("cpu")
LAYERS = 32
SCALE_HEADER = """| tokens | seconds | GFLOP/s | of the matrix product | memory | formula | rounds |
|---|---|---|---|---|---|---|"""
ESTIMATES_HEADER = """| what | measured | `allegro estimate` | error | before the first step | error |
|---|---|---|---|---|---|"""
ROOFLINE_HEADER = """| what | GFLOP/s |
|---|---|"""


@dataclass
class Found:
    """Seconds that something took, and those that were said before.

    Attributes:
        name: for people.
        flops: operations; 0 where they are not counted.
        real: of each round.
        estimated: by `allegro estimate`, one for each round.
        said: before the first step; None where nothing is said.
        peak: bytes.
    """

    name: str
    flops: int
    real: list[float]
    estimated: list[float]
    said: float | None = None
    peak: int = 0

    @property
    def seconds(self) -> float:
        return statistics.median(self.real)

    @property
    def speed(self) -> float:
        """GFLOP/s."""
        return self.flops / self.seconds / 1e9

    def estimates_line(self) -> str:
        def cells(seconds: float | None) -> str:
            return "- | -" if seconds is None else f"{seconds:.3g} s | {seconds / self.seconds - 1:+.0%}"

        return f"| {self.name} | {self.seconds:.3g} s | {cells(statistics.median(self.estimated))} | {cells(self.said)} |"


def one_layer() -> Networks:
    released = open_networks("88x720P")
    return replace(released, dit=replace(released.dit, num_layers=1))


def said_before(networks: Networks, shape: LatentShape) -> tuple[float, float]:
    """(seconds of a step for one prompt, of decoding) as the line before the first step has them; it has none for short runs."""
    t, h, w = shape
    settings = SampleSettings(8 * w, 8 * h, 4 * t, 1, 1.0)
    with patch.multiple(quick, _FEW_OPERATIONS=0, _SECONDS=0):
        found = quick.foretell(networks, settings, Machine(CPU, torch.float32, sdpa), 1)
    assert found is not None
    return found


def in_turn(name: str, flops: int, run: Callable[[], object], estimate: Callable[[], float], rounds: int) -> Found:
    """An estimate, then the run, and so on. The first run tells the memory, and is timed if there is no other."""
    first: list[float] = []
    peak = peak_of(lambda: first.append(seconds_of(run, CPU)), CPU) or 0
    found = Found(name, flops, [], [], peak=peak)
    for _ in range(rounds):
        found.estimated.append(estimate())
        found.real.append(seconds_of(run, CPU) if rounds > 1 else first[0])
    return found


def step(shape: LatentShape, rounds: int) -> Found:
    """An evaluation of one layer."""
    networks = one_layer()
    run = dit_run(networks.random_dit(1, CPU, torch.float32), shape, 1)

    def estimate() -> float:
        return evaluation_seconds(networks, shape, device=CPU, dtype=torch.float32, attention=sdpa).total

    tokens = token_count(shape)
    found = in_turn(f"DiT, a layer, {tokens:,} tokens", dit_flops(networks.dit, shape, TEXT_TOKENS).total, run, estimate,
                    1 if tokens > LONG else rounds)
    found.said = said_before(networks, shape)[0]
    return found


def decoding(tile: LatentShape, rounds: int) -> Found:
    """A tile of the released VAE."""
    networks, (t, h, w) = one_layer(), tile
    decoder, latents = networks.random_decoder(CPU), torch.randn(1, 4, *tile)
    found = in_turn(f"VAE, decoding a tile of {4 * t}x{8 * h}x{8 * w}", vae_decode_flops(networks.vae, tile), lambda: decoder.decode_tile(latents),
                    lambda: decode_seconds(networks, tile, device=CPU), rounds)
    found.said = said_before(networks, tile)[1]
    return found


def reading(rounds: int) -> Found:
    """A layer of T5 v1.1 XXL."""
    config = {**open_networks("88x720P").text, "num_layers": 1}
    model = randomise(empty_model(config), CPU, torch.float32)
    ids = torch.ones((1, TEXT_TOKENS), dtype=torch.long)
    return in_turn(f"T5, a layer, {TEXT_TOKENS} tokens", 0, lambda: model(input_ids=ids),
                   lambda: text_seconds(config, device=CPU, dtype=torch.float32), rounds)


def whole_run() -> list[Found]:
    """The stages of a run of the bundled model; files are read before."""
    pipeline, networks = AllegroPipeline.from_pretrained("tiny", device="cpu"), open_networks("tiny")
    settings, encoder = pipeline.settings(seed=1), pipeline.load_text_encoder()
    machine = Machine(CPU, None, pipeline.kernel(settings).run)
    prompts = pipeline.encode_prompt("a red circle moves right", guidance_scale=settings.guidance_scale)
    before = estimate_run(networks, settings, machine)
    made: list[torch.Tensor] = []
    real = [seconds_of(lambda: encoder.encode(["a red circle moves right", pipeline.defaults.negative_prompt]), CPU),
            seconds_of(lambda: made.append(pipeline.raw_latents(pipeline.sample(prompts, pipeline.start(settings)))), CPU)]
    real.append(seconds_of(lambda: list(pipeline.decode_stream(made[0])), CPU))
    after = estimate_run(networks, settings, machine)
    found = [Found(f"bundled model, {first.name}", 0, [seconds], [first.seconds, second.seconds])
             for first, second, seconds in zip(before.stages, after.stages, real, strict=True)]
    return [*found, Found("bundled model, in all", 0, [sum(real)], [before.seconds, after.seconds])]


def peaks() -> dict[str, float]:
    """GFLOP/s of a matrix product and of a convolution, the best of some calls."""
    found = {}
    for name, (run, flops) in {"matrix product": matmul_run(CPU, torch.float32),
                               "convolution 3x3": convolution_run(CPU, torch.float32)}.items():
        found[name] = flops / min(seconds_of(run, CPU) for _ in range(10)) / 1e9
    return found


# The sections


def where(threads: int) -> str:
    return f"{processor()}, {threads} threads, float32, torch {torch.__version__}"


def scale_line(shape: LatentShape, found: Found, product: float) -> str:
    formula = estimate_sampling_bytes(one_layer().dit, shape, batch=1, dtype_bytes=4)
    return (f"| {token_count(shape):,} | {found.seconds:.2f} s | {found.speed:.0f} | {found.speed / product:.0%} | "
            f"{found.peak / 2**20:.0f} MiB | {formula / 2**20:.0f} MiB | {len(found.real)} |")


def scale_section(shapes: list[LatentShape], steps: list[Found], product: float, threads: int) -> str:
    tokens, seconds = [token_count(shape) for shape in shapes], [found.seconds for found in steps]
    b, c = fit_seconds(tokens, seconds)
    full, flops = token_count(FULL), dit_flops(open_networks("88x720P").dit, FULL, TEXT_TOKENS)
    layer = b * full + c * full**2
    error = max(abs(b * n + c * n * n - s) / s for n, s in zip(tokens, seconds, strict=True))
    lines = [scale_line(shape, found, product) for shape, found in zip(shapes, steps, strict=True)]
    return f"""{SCALE}

Written by `tests/bench/bench_scale.py`: one of the 32 layers of the released model, which are all alike, and one prompt;
{where(threads)}. Memory is the peak above weights and
inputs, "formula" the working memory that a run is checked against; a processor's library takes some besides.

{SCALE_HEADER}
{chr(10).join(lines)}

Fitted: {b * 1e3:.3g} s for each 1,000 tokens and {c * 1e6:.3g} s for the square of 1,000, at most {error:.0%} off. That is {layer:,.0f} s for a layer at 79,200
tokens, {layer * LAYERS / 3600:.1f} hours for an evaluation, {c * full**2 / layer:.0%} of it self-attention; by operations it is {flops.self_attention / flops.total:.0%} of {flops.total:.2g}.
A run of 100 steps with guidance has 200 evaluations: it is for GPUs. Memory grows with the tokens: by the formula, {estimate_sampling_bytes(one_layer().dit, FULL, batch=1, dtype_bytes=4) / 2**30:.1f} GiB.
"""


def estimates_section(found: list[Found], threads: int) -> str:
    return f"""{ESTIMATES}

Written by `tests/bench/bench_scale.py`, estimates and runs in turn; {where(threads)}.
`allegro estimate` measures for some seconds, the line before the first step of a long run for less, and says nothing of short ones.

{ESTIMATES_HEADER}
{chr(10).join(one.estimates_line() for one in found)}
"""


def roofline_section(most: dict[str, float], dit: Found, vae: Found, threads: int) -> str:
    product, convolution = most.values()
    return f"""{ROOFLINE}

Written by `tests/bench/bench_scale.py`; {where(threads)}.

{ROOFLINE_HEADER}
| {next(iter(most))} | {product:.0f} |
| {list(most)[1]} | {convolution:.0f} |
| {dit.name} | {dit.speed:.0f} |
| {vae.name} | {vae.speed:.0f} |

- DiT: {dit.speed / product:.0%} of what a matrix product alone reaches, attention, norms and activations included. At the speed of the product it
  would be {product / dit.speed:.2f} times faster, which is the most that float32 allows.
- VAE: {vae.speed / convolution:.0%} of a convolution, with operations counted as those of plain convolutions; ours take fewer multiplications.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--most", type=int, default=14_400, help="tokens")
    parser.add_argument("--write", type=Path, help="Markdown file for the tables")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    shapes = [shape for shape in SHAPES if token_count(shape) <= args.most]
    with torch.no_grad():
        most = peaks()
        print(most)
        steps, others = [], []
        for shape in shapes:
            steps.append(step(shape, args.rounds))
            print(steps[-1].estimates_line(), flush=True)
        for make in (lambda: [decoding(tile, args.rounds) for tile in TILES], lambda: [reading(args.rounds)], whole_run):
            others += (new := make())
            print("\n".join(one.estimates_line() for one in new), flush=True)
        most = {name: max(speed, again) for (name, speed), again in zip(most.items(), peaks().values(), strict=True)}
    made = {SCALE: scale_section(shapes, steps, most["matrix product"], args.threads),
            ESTIMATES: estimates_section([*steps, *others], args.threads),
            ROOFLINE: roofline_section(most, steps[-1], others[len(TILES) - 1], args.threads)}
    print("\n".join(made.values()))
    if args.write:
        text = args.write.read_text(encoding="utf-8")
        for title, section in made.items():
            text = replace_section(text, section, title)
        args.write.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
