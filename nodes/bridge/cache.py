"""The step cache of `allegro_model.sampling.cache`, on a MODEL through ComfyUI's wrappers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import comfy.model_patcher
import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...allegro_model.dit import AllegroDiT
from ...allegro_model.errors import AllegroError, CheckpointMismatch
from ...allegro_model.pipeline import read_calibration
from ...allegro_model.sampling import StepCache
from ...allegro_model.sampling.cache import BUNDLED, IDLE, CacheCalibration, check_cache

logger = logging.getLogger(__name__)

# In transformer_options: the level on a model, the `StepCache` during a run.
CACHE = "allegro_cache"
# In transformer_options during an evaluation: what `StepCache.reuse` gave, for the blocks.
REUSE = "allegro_cache_reuse"

Executor = Any  # comfy.patcher_extension.WrapperExecutor


def add_cache(model: Any, level: str) -> Any:
    """A copy of a MODEL with a step cache, in place of one that it has.

    Args:
        model: a model patcher; it is not changed.
        level: one of `CACHE_LEVELS`.
    Raises:
        ScheduleError: there is no such level.
        CheckpointMismatch: the model is none of ours.
    """
    check_cache(level)
    check_ours(model, "the cache")
    patched = model.clone()
    wrappers: dict[str, Callable[..., Any]] = {WrappersMP.OUTER_SAMPLE: _run, WrappersMP.CALC_COND_BATCH: _guide,
                                               WrappersMP.APPLY_MODEL: _predict}
    for kind, wrapper in wrappers.items():
        patched.remove_wrappers_with_key(kind, CACHE)
        if level != "off":
            patched.add_wrapper_with_key(kind, CACHE, wrapper)
    options = patched.model_options.setdefault("transformer_options", {})
    options.pop(CACHE, None)
    if level != "off":
        options[CACHE] = level
    return patched


def calibration_of(path: str) -> CacheCalibration:
    """That which lies beside the weights of a transformer, or else the bundled one. A broken file costs no more than itself."""
    try:
        return read_calibration(Path(path))
    except AllegroError as error:
        logger.warning("Allegro: %s The step cache uses the calibration of %s.", error, BUNDLED.name)
        return BUNDLED


def check_ours(model: Any, what: str) -> None:
    """Raises unless a model patcher holds our transformer.

    Args:
        what: what is to be put on it.
    Raises:
        CheckpointMismatch: it is another model.
    """
    network = model.model.diffusion_model
    if not isinstance(network, AllegroDiT):
        raise CheckpointMismatch(f"this model is a {type(network).__name__}; {what} is made for Allegro. Use ComfyUI's own nodes for "
                                 "other models.")


def _run(executor: Executor, *args: Any, **kwargs: Any) -> Any:
    """Round a whole run: a cache of its own, whatever becomes of the run."""
    guider = executor.class_obj
    before = guider.model_options
    options = comfy.model_patcher.create_model_options_clone(before)
    calibration = getattr(guider.model_patcher.model, "cache_calibration", BUNDLED)
    cache = StepCache(options["transformer_options"][CACHE], calibration)
    options["transformer_options"][CACHE] = cache
    guider.model_options = options
    try:
        result = executor(*args, **kwargs)
        if cache.idle:
            logger.warning("Allegro: %s", IDLE)
        return result
    finally:
        guider.model_options = before
        logger.info("Allegro: %s", cache.summary())


def _guide(executor: Executor, model: Any, conds: list[Any], x: Tensor, timestep: Tensor,
           model_options: dict[str, Any]) -> list[Tensor]:
    """Round the conditions of a step: outside the interval of guidance the negative one is not evaluated. Taking the
    positive prediction for it makes every formula of guidance give the positive one."""
    cache = _cache_of(model_options.get("transformer_options"))
    pair = len(conds) == 2 and all(cond is not None for cond in conds)  # other guiders have one or three
    if cache is None or not pair or cache.guided(_clock(model, timestep)):
        return executor(model, conds, x, timestep, model_options)
    positive, *_ = executor(model, [conds[0], None], x, timestep, model_options)
    return [positive, positive]


def _predict(executor: Executor, x: Tensor, t: Tensor, c_concat: Tensor | None = None, c_crossattn: Tensor | None = None,
             control: Any = None, transformer_options: dict[str, Any] | None = None, **kwargs: Any) -> Tensor:
    """Round an evaluation of one or more conditions in a batch: noisy latents -> clean ones."""
    options = transformer_options or {}
    cache = _cache_of(options)
    if cache is None or "uuids" not in options:
        return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)
    timestep = _clock(executor.class_obj, t)
    keys = _keys(x, options)

    def compute() -> Tensor:
        reuse = cache.reuse(keys, timestep)
        inner = options if reuse is None else {**options, REUSE: reuse}
        return executor(x, t, c_concat, c_crossattn, control, inner, **kwargs)

    return cache.predict(keys, timestep, compute)


def _cache_of(options: dict[str, Any] | None) -> StepCache | None:
    """The cache of the run; None outside one."""
    cache = (options or {}).get(CACHE)
    return cache if isinstance(cache, StepCache) else None


def _clock(model: Any, sigmas: Tensor) -> float:
    """The timestep of an evaluation; all items of a batch have the same."""
    return float(model.model_sampling.timestep(sigmas[:1]))


def _keys(x: Tensor, options: dict[str, Any]) -> list[Hashable]:
    """What each part of a batch may share with other steps: the condition, the context window, the size, and the blocks that
    other nodes have replaced, since those evaluate a condition once more with some of them left out."""
    window = options.get("context_window")
    frames = None if window is None else tuple(window.index_list)
    replaced = tuple(sorted(str(place) for places in options.get("patches_replace", {}).values() for place in places))
    shape = (x.shape[0] // len(options["uuids"]), *x.shape[1:])
    return [(uuid, frames, shape, replaced) for uuid in options["uuids"]]


def reuse_of(options: dict[str, Any]) -> Any:
    """What the cache gives the blocks of the network for this evaluation, or None. The compiler cannot follow it."""
    return None if torch.compiler.is_compiling() else options.get(REUSE)
