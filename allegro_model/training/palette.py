"""Colours, shapes and directions of the procedural clips, and which combinations training never sees."""

from __future__ import annotations

import zlib

RGB = tuple[float, float, float]

#: sRGB values in [0, 1]; few, saturated and far apart, so that a small model and an image analysis agree on names.
COLOURS: dict[str, RGB] = {
    "red": (0.88, 0.12, 0.12),
    "yellow": (0.98, 0.84, 0.14),
    "green": (0.13, 0.66, 0.26),
    "blue": (0.14, 0.32, 0.86),
    "pink": (0.96, 0.42, 0.78),
    "white": (0.95, 0.95, 0.95),
    "black": (0.05, 0.05, 0.07),
    "gray": (0.50, 0.50, 0.50),
    "orange": (0.97, 0.50, 0.06),
}
OBJECT_COLOURS = ("red", "yellow", "green", "blue", "pink", "white")
BACKGROUND_COLOURS = ("black", "white", "gray", "blue", "green")
#: No object of the bundled model has it: what the bundled LoRA teaches. The model reads the word of evening skies only.
LORA_COLOUR = "orange"
SHAPES = ("circle", "square", "triangle")
DIRECTIONS = ("left", "right", "up", "down")
#: Pairs (object, background) that are the same or too close to tell apart.
_CONFUSABLE = {("white", "white"), ("blue", "blue"), ("green", "green")}
_HELD_OUT_PERCENT = 14


def colour_pairs() -> list[tuple[str, str]]:
    """Return every usable pair (object colour, background colour)."""
    pairs = [(fg, bg) for fg in OBJECT_COLOURS for bg in BACKGROUND_COLOURS]
    return [pair for pair in pairs if pair not in _CONFUSABLE]


def is_held_out(text: str) -> bool:
    """Return True when training must never see ``text`` (an attribute combination or a whole caption).

    The choice is a fixed hash, so that the semantic tests and the training agree without a list.
    """
    return zlib.crc32(text.encode()) % 100 < _HELD_OUT_PERCENT


def combinations(*, held_out: bool, pairs: list[tuple[str, str]] | None = None) -> list[tuple[str, str, str, str]]:
    """Return the combinations (object colour, background, shape, direction) that training sees, or those it does not.

    Args:
        held_out: True for the combinations reserved for tests.
        pairs: (object colour, background); default those of the bundled model.
    """
    every = [(fg, bg, shape, way) for fg, bg in pairs or colour_pairs() for shape in SHAPES for way in DIRECTIONS]
    return [combo for combo in every if is_held_out(" ".join(combo)) == held_out]
