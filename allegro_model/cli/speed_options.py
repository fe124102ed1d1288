"""The options of the commands about speed."""

from __future__ import annotations

import argparse

from ..attention import ATTENTIONS
from ..config import PRESETS
from ..loading import bundled_models
from ..pipeline import DTYPES
from ..sampling import CACHE_LEVELS
from .options import Parser, add_command, add_report

_ESTIMATE = """\
Say what a run would take on this machine: time and memory of each stage. It measures for a few seconds, and needs no
weights: the sizes of a released model are enough.

examples:
  allegro estimate
  allegro estimate --model 40x360P --steps 50 --cache fast
  allegro estimate --model models/Allegro --frames 40 --dtype bf16 --interpolate 2
"""


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
