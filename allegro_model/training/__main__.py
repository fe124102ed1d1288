"""Command line of the training: ``python -m allegro_model.training --out DIR``."""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path

from . import __doc__ as documentation
from .distributed import launch
from .evaluate import evaluate_folder
from .evaluate_ti2v import evaluate_ti2v_folder
from .export import export, export_ti2v
from .recipe import RECIPE, scaled
from .stages import TRAINERS, run_stages
from .tokenizer import save_tokenizer
from .vfi_evaluate import evaluate_vfi, export_vfi

STAGES = ("tokenizer", "vae", "latents", "dit", "decoder", "ti2v_latents", "ti2v", "vfi", "export", "evaluate")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m allegro_model.training", description=documentation,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR",
                        help="model folder to write, and DIR-ti2v beside it; DIR/work keeps checkpoints and latent caches")
    parser.add_argument("--processes", type=int, default=2, help="data-parallel processes, one thread each (default 2)")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), help="default: all, in this order")
    parser.add_argument("--scale", type=float, default=1.0,
                        help="multiply the length of every stage, for instance 0.01 to try the command (default 1)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Run the chosen stages; finished ones return at once, interrupted ones continue."""
    options = parse(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    logger = logging.getLogger(__name__)
    recipe = scaled(RECIPE, options.scale)
    work, ti2v = options.out / "work", options.out.with_name(f"{options.out.name}-ti2v")
    chosen = [stage for stage in STAGES if stage in options.stages]
    if "tokenizer" in chosen:
        save_tokenizer(work / "tokenizer")
    if trained := [stage for stage in chosen if stage in TRAINERS]:
        launch(run_stages, options.processes, trained, recipe, work)
    if "export" in chosen:
        size = export(work, options.out) + export_ti2v(work, ti2v, options.out)
        logger.info("weights: %.2f MB", size / 1e6)
    if "evaluate" in chosen:
        logger.info("scores (right, total): %s", json.dumps(evaluate_folder(options.out), indent=2))
        logger.info("image to video: %s", json.dumps(evaluate_ti2v_folder(ti2v), indent=2))
    if "vfi" in chosen:
        path = options.out.with_name(f"{options.out.name}-vfi") / "model.safetensors"
        logger.info("frame interpolator: %.2f MB", export_vfi(work, path) / 1e6)
        logger.info("PSNR (model, repeated, blended): %s", json.dumps(evaluate_vfi(path), indent=2))


if __name__ == "__main__":
    main()
