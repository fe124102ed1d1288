"""What the worker processes run; a module of its own, because a process finds its function by module and name."""

from __future__ import annotations

import logging
from pathlib import Path

from .distributed import Workers
from .dit_stage import train_dit
from .latents import cache_latents
from .recipe import Recipe
from .ti2v_cache import cache_ti2v_latents
from .ti2v_stage import train_ti2v
from .vae_stage import train_decoder, train_vae
from .vfi_stage import train_vfi

_TRAINERS = {"vae": train_vae, "latents": cache_latents, "dit": train_dit, "decoder": train_decoder,
             "ti2v_latents": cache_ti2v_latents, "ti2v": train_ti2v, "vfi": train_vfi}


def run_stage(workers: Workers, stage: str, recipe: Recipe, work: Path) -> None:
    """Run one of the stages above in one process of the group."""
    level = logging.INFO if workers.rank == 0 else logging.WARNING
    logging.basicConfig(level=level, format="%(asctime)s %(message)s")
    _TRAINERS[stage](workers, recipe, work)
