"""The sizes that models were trained at, and what a step costs at others, as plain data for a page in the browser."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..config import PRESETS, DiTConfig, SamplingConfig
from ..costs import dit_flops
from ..geometry import PIXEL_MULTIPLE, TEMPORAL_FACTOR, LatentShape, estimate_sampling_bytes
from .defaults import bundled_model, bundled_models, load_sampling_defaults
from .files import read_json

RELEASED, BUNDLED = "released", "bundled"
# Image to video was published at one size.
_SIZES = {False: tuple(PRESETS), True: ("88x720P",)}
_BUNDLED = {False: "tiny", True: "tiny-ti2v"}


def trained_sizes(*, image_to_video: bool = False) -> dict[str, Any]:
    """What a page needs to offer the trained sizes and to estimate any size without asking again.

    Args:
        image_to_video: those of the image-to-video models.
    Returns:
        JSON-able. "sizes": {width, height, length, fps, model} each, of the models "released" and "bundled".
        "models": {model: {"flops", "bytes"}}, each the coefficients [c0, c1, c2] of a polynomial in the tokens of one clip:
        operations of one evaluation for one prompt, and the working memory of it in bytes.
        "pixels", "frames": the sides and the frames of a token.
    """
    released = [PRESETS[name] for name in _SIZES[image_to_video]]
    sizes = [_size(preset.sampling, RELEASED) for preset in released]
    models = {RELEASED: _costs(released[0].dit, released[0].sampling, 2)}  # bf16
    name = _BUNDLED[image_to_video]
    if name in bundled_models():  # a copy may have been made without
        path = bundled_model(name)
        own = load_sampling_defaults(path)
        sizes.append(_size(own, BUNDLED))
        models[BUNDLED] = _costs(DiTConfig.from_dict(read_json(path / "transformer" / "config.json")), own, 4)
    return {"sizes": sizes, "models": models, "pixels": PIXEL_MULTIPLE, "frames": TEMPORAL_FACTOR}


def _size(sampling: SamplingConfig, model: str) -> dict[str, Any]:
    return {"width": sampling.width, "height": sampling.height, "length": sampling.num_frames, "fps": sampling.fps,
            "model": model}


def _costs(config: DiTConfig, sampling: SamplingConfig, dtype_bytes: int) -> dict[str, list[int]]:
    return {
        "flops": _polynomial(config, lambda shape: dit_flops(config, shape, sampling.text_length).total),
        "bytes": _polynomial(config, lambda shape: estimate_sampling_bytes(config, shape, batch=1, dtype_bytes=dtype_bytes)),
    }


def _polynomial(config: DiTConfig, cost: Callable[[LatentShape], int]) -> list[int]:
    """The coefficients of a formula of second degree in the tokens, from its values at 1, 2 and 3 tokens."""
    one, two, three = (cost(LatentShape(tokens, config.patch_size, config.patch_size)) for tokens in (1, 2, 3))
    square = (three - 2 * two + one) // 2
    slope = two - one - 3 * square
    return [one - slope - square, slope, square]
