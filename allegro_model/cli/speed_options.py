"""The options of the commands about speed."""

from __future__ import annotations

import argparse

from ..attention import ATTENTIONS
from ..bench.rows import SECTIONS
from ..config import PRESETS
from ..loading import bundled_models
from ..pipeline import DTYPES, OFFLOADS
from ..sampling import CACHE_LEVELS
from .options import Parser, add_command, add_report, triple

_ESTIMATE = """\
Say what a run would take on this machine: time and memory of each stage. It measures for a few seconds, and needs no
weights: the sizes of a released model are enough.

examples:
  allegro estimate
  allegro estimate --model 40x360P --steps 50 --cache fast
  allegro estimate --model models/Allegro --frames 40 --dtype bf16 --interpolate 2
  allegro estimate --offload stream
"""
_BENCH = """\
Measure the parts of a run on this machine, each variant in turn with a plain one: the device's peak, text encoder,
transformer (every attention that works here, types, both prompts at once, compiled, streamed, quantised), decoder,
interpolation, loading.
Weights are noise of the model's sizes, since times do not depend on them, so that none are needed; of a model folder,
loading is timed as well. On a CPU fewer tokens, layers and pixels are the default; the table says how many.

examples:
  allegro bench
  allegro bench --only dit --layers 32 --json bench.json
  allegro bench --model 40x360P --dtype bf16 --device cuda --size 40x368x640 --profile
"""


def add_bench(commands: argparse._SubParsersAction[Parser]) -> None:
    """`allegro bench`."""
    parser = add_command(commands, "bench", "measure the speed of this machine", _BENCH)
    group = parser.add_argument_group("what to measure")
    group.add_argument("--only", action="append", choices=list(SECTIONS), metavar="PART",
                       help=f"one part, repeatable: {', '.join(SECTIONS)}")
    group.add_argument("--size", type=triple, metavar="FxHxW",
                       help="frames x height x width (default: the model's own on a GPU, 4x368x640 on a CPU)")
    group.add_argument("--layers", type=int, metavar="N", help="of the transformer and the text encoder (default: all on a GPU "
                                                              "that has room for them, else 1)")
    group.add_argument("--rounds", type=int, default=3, metavar="N", help="timed calls of each row (default 3)")
    group.add_argument("--compile", action=argparse.BooleanOptionalAction, help="measure torch.compile, too (default: on a GPU)")
    group.add_argument("--profile", action="store_true", help="also say which share of a step is attention, matrix products and "
                                                              "elementwise work")
    _add_machine(parser)
    parser.add_argument("--force", action="store_true", help="replace an existing report")
    add_report(parser)


def add_estimate(commands: argparse._SubParsersAction[Parser]) -> None:
    """`allegro estimate`."""
    parser = add_command(commands, "estimate", "say what a run would take here", _ESTIMATE)
    group = parser.add_argument_group("the run; default: what the model was made for")
    group.add_argument("--frames", type=int, metavar="N", help="a multiple of 4")
    group.add_argument("--width", type=int, metavar="N", help="pixels, a multiple of 16")
    group.add_argument("--height", type=int, metavar="N", help="pixels, a multiple of 16")
    group.add_argument("--steps", type=int, metavar="N", help="denoising steps")
    group.add_argument("--cfg", type=float, metavar="X", help="guidance; 1 is off and takes half the time")
    group.add_argument("--cache", choices=CACHE_LEVELS, help="step cache (default off)")
    group.add_argument("--interpolate", type=int, metavar="N", help="so many frames for each, 2 to 64")
    group.add_argument("--interpolator", metavar="FILE", help="the model for it; default tiny-vfi, the bundled small one")
    group = _add_machine(parser)
    group.add_argument("--attention", default="auto", choices=ATTENTIONS,
                       help="kernel of the transformer's attention (default auto: the fastest exact one)")
    group.add_argument("--offload", default="auto", choices=OFFLOADS,
                       help="where the weights are, as of `generate` (default auto: streamed where they do not fit)")
    parser.add_argument("--force", action="store_true", help="replace an existing report")
    add_report(parser)


def _add_machine(parser: Parser) -> argparse._ArgumentGroup:
    """The model, of which sizes are enough, and the machine."""
    group = parser.add_argument_group("model and machine")
    first = next(iter(PRESETS))
    group.add_argument("--model", default=first, metavar="NAME|DIR",
                       help=f"the sizes of a released model: {', '.join(PRESETS)} (default {first}); a model folder; "
                            f"or a bundled model: {', '.join(bundled_models())}")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps, ... (default auto)")
    group.add_argument("--dtype", default="auto", choices=list(DTYPES),
                       help="of the transformer (default auto: bf16 for large models on a GPU)")
    return group
