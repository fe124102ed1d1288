"""Seeded captioned clips: ``make_clip(seed)`` gives frames and attributes, no file is stored or read."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from .captions import Attributes
from .palette import OBJECT_COLOURS, combinations
from .scenes import DRAW, Canvas

#: Share of each kind of scene in the training data.
KIND_SHARES = {"shape": 0.62, "sea": 0.15, "clouds": 0.11, "ball": 0.12}
_TRAINING_COMBINATIONS = combinations(held_out=False)


@dataclass(frozen=True)
class Clip:
    """One procedural clip.

    Attributes:
        frames: uint8 ``[T, H, W, 3]``.
        attributes: ``kind`` and what the caption says (``object``, ``background``, ``shape``, ``direction``, ...).
        seed: the seed the clip was made from.
    """

    frames: np.ndarray
    attributes: Attributes = field(repr=False)
    seed: int = 0


def draw_attributes(rng: np.random.Generator) -> Attributes:
    """Draw the attributes of one training clip; held-out combinations never occur."""
    kind = str(rng.choice(list(KIND_SHARES), p=list(KIND_SHARES.values())))
    if kind == "shape":
        values = _TRAINING_COMBINATIONS[int(rng.integers(len(_TRAINING_COMBINATIONS)))]
        return {"kind": kind, **dict(zip(("object", "background", "shape", "direction"), values, strict=True))}
    if kind == "ball":
        floor = str(rng.choice(["wood", "grass"]))
        hidden = "green" if floor == "grass" else "white"  # too close to the scenery
        colours = [colour for colour in OBJECT_COLOURS if colour != hidden]
        return {"kind": kind, "object": str(rng.choice(colours)), "floor": floor}
    if kind == "sea":
        light = str(rng.choice(["sun", "moon"], p=[0.7, 0.3]))
        return {"kind": kind, "light": light, "direction": str(rng.choice(["up", "down"]))}
    sky = str(rng.choice(["blue", "orange"], p=[0.65, 0.35]))
    return {"kind": kind, "sky": sky, "direction": str(rng.choice(["left", "right"]))}


def render(attributes: Attributes, rng: np.random.Generator, canvas: Canvas) -> np.ndarray:
    """Draw the clip that ``attributes`` describe; returns uint8 ``[T, H, W, 3]``."""
    frames = DRAW[attributes["kind"]](canvas, attributes, rng)
    return np.round(np.clip(frames, 0, 1) * 255).astype(np.uint8)


def make_clip(seed: int, canvas: Canvas | None = None) -> Clip:
    """Make the training clip number ``seed``; the same seed and canvas give the same bytes.

    Args:
        seed: any non-negative integer.
        canvas: size of the clip, default 96 x 64, 24 frames.
    """
    rng = np.random.default_rng(seed)
    attributes = draw_attributes(rng)
    return Clip(render(attributes, rng, canvas or Canvas()), attributes, seed)
