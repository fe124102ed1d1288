"""What the worker processes run; a module of its own, because a process finds its function by module and name."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from .distributed import Workers
from .dit_stage import train_dit
from .latents import cache_latents
from .recipe import Recipe
from .ti2v_cache import cache_ti2v_latents
from .ti2v_stage import train_ti2v
from .vae_stage import train_decoder, train_vae
from .vfi_stage import train_vfi

logger = logging.getLogger(__name__)
TRAINERS = {"vae": train_vae, "latents": cache_latents, "dit": train_dit, "decoder": train_decoder,
            "ti2v_latents": cache_ti2v_latents, "ti2v": train_ti2v, "vfi": train_vfi}


def run_stages(workers: Workers, stages: Sequence[str], recipe: Recipe, work: Path) -> None:
    """Run some of the stages above, one after the other, in one process of the group."""
    level = logging.INFO if workers.rank == 0 else logging.WARNING
    logging.basicConfig(level=level, format="%(asctime)s %(message)s")
    for stage in stages:
        logger.info("stage %s", stage)
        TRAINERS[stage](workers, recipe, work)
        workers.barrier()  # the next one reads what this one has written
