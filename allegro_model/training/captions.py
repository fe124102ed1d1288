"""Plain captions of the procedural clips, with paraphrases; the wording survives the cleaning rules unchanged."""

from __future__ import annotations

import re

import numpy as np

from .palette import is_held_out

Attributes = dict[str, str]

_TRIES = 200
_OPPOSITE = {"left": "right", "right": "left", "up": "down", "down": "up"}
_MOVING = {
    "left": ("moving left", "moving to the left", "sliding left", "sliding to the left", "gliding left"),
    "right": ("moving right", "moving to the right", "sliding right", "sliding to the right", "gliding right"),
    "up": ("moving up", "rising", "moving upward", "floating up", "going up"),
    "down": ("moving down", "falling", "moving downward", "falling down", "going down"),
}
_MOVES = {
    "left": ("moves left", "moves to the left", "slides left", "slides to the left"),
    "right": ("moves right", "moves to the right", "slides right", "slides to the right"),
    "up": ("moves up", "rises", "moves upward", "goes up"),
    "down": ("moves down", "falls", "moves downward", "goes down"),
}
_CROSSING = {
    "left": "from right to left",
    "right": "from left to right",
    "up": "from bottom to top",
    "down": "from top to bottom",
}
_SHAPE = {"circle": ("circle", "circle", "disc"), "square": ("square", "square", "box"), "triangle": ("triangle",)}
_COLOUR = {"gray": ("gray", "grey")}
_SEA = ("sea", "sea", "ocean")
_PLACE = {"wood": ("a wooden floor", "the wooden floor"), "grass": ("the grass", "green grass")}


def _pick(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    return options[int(rng.integers(len(options)))]


def _colour(rng: np.random.Generator, name: str) -> str:
    return _pick(rng, _COLOUR.get(name, (name,)))


def _shape_caption(a: Attributes, rng: np.random.Generator) -> str:
    back = f"{_colour(rng, a['background'])} {_pick(rng, ('background', 'background', 'backdrop'))}"
    thing = f"{_colour(rng, a['object'])} {_pick(rng, _SHAPE[a['shape']])}"
    way = a["direction"]
    moving, moves = _pick(rng, _MOVING[way]), _pick(rng, _MOVES[way])
    if rng.random() < 0.15:
        moving, moves = f"moving {_CROSSING[way]}", f"moves {_CROSSING[way]}"
    orders = (
        f"a {thing} {moving} on a {back}",
        f"a {thing} {moving} over a {back}",
        f"a {thing} {moves} across a {back}",
        f"on a {back}, a {thing} {moves}",
        f"a {back} with a {thing} {moving}",
        f"{thing} {moving}, {back}",
    )
    return re.sub(r"\ba (?=[aeiou])", "an ", _pick(rng, orders))


def _ball_caption(a: Attributes, rng: np.random.Generator) -> str:
    ball, place = f"{_colour(rng, a['object'])} ball", _pick(rng, _PLACE[a["floor"]])
    orders = (
        f"a {ball} bouncing on {place}",
        f"a {ball} bounces on {place}",
        f"a bouncing {ball} on {place}",
        f"on {place}, a {ball} is bouncing",
        f"a {ball} bouncing up and down on {place}",
    )
    return _pick(rng, orders)


def _sea_caption(a: Attributes, rng: np.random.Generator) -> str:
    sea, rising = _pick(rng, _SEA), a["direction"] == "up"
    verb = ("rising", "rises") if rising else ("setting", "sets")
    if a["light"] == "moon":
        moonlit = (
            f"the moon {verb[0]} over the {sea}",
            f"the moon {verb[1]} over the {sea} at night",
            f"the moon {verb[0]} over a dark {sea}",
            f"at night, the moon is {verb[0]} over the {sea}",
            f"the moon slowly {verb[0]} above the {sea}",
        )
        return _pick(rng, moonlit)
    noun = "sunrise" if rising else "sunset"
    orders = (
        f"the sun {verb[0]} over the {sea}",
        f"the sun {verb[1]} over the {sea}",
        f"a {noun} over the {sea}",
        f"a beautiful {noun} at the {sea}",
        f"the sun slowly {verb[0]} above the {sea}",
        f"{noun} over a calm {sea}",
    )
    return _pick(rng, orders)


def _clouds_caption(a: Attributes, rng: np.random.Generator, *, reserved: bool = False) -> str:
    way, sky = a["direction"], "an orange" if a["sky"] == "orange" else "a blue"
    side = _pick(rng, (way, f"to the {way}"))
    orders = (
        f"clouds drifting {side} over green hills under {sky} sky",
        f"white clouds drifting {side} in {sky} sky",
        f"clouds drift {side} across {sky} sky over green hills",
        f"{sky} sky with clouds moving {side} above green hills",
        f"clouds moving {side} in {sky} sky",
        f"white clouds moving {side} across {sky} sky",
        f"{sky} sky, clouds drifting {side}, green hills",
        f"green hills under {sky} sky with clouds drifting {side}",
    )
    tests = (
        f"over green hills, clouds drift {side} in {sky} sky",
        f"{sky} sky above green hills with clouds drifting {side}",
        f"clouds moving {side} under {sky} sky above green hills",
    )
    return _pick(rng, tests if reserved else orders)


_WRITERS = {"shape": _shape_caption, "ball": _ball_caption, "sea": _sea_caption}


def write_caption(attributes: Attributes, rng: np.random.Generator, *, held_out: bool = False) -> str:
    """Return one of the many captions of a clip.

    Some wordings are reserved for tests: of the sea and the ball those that a hash of the text selects, of clouds
    whole word orders. For shapes the attribute combination itself is held out (``palette.combinations``).

    Args:
        attributes: as made by ``data.draw_attributes``; ``kind`` selects the wording.
        rng: source of the choice.
        held_out: True for the wordings reserved for tests.

    Raises:
        LookupError: these attributes have no wording on the wanted side of the split.
    """
    kind = attributes["kind"]
    if kind == "clouds":
        return _clouds_caption(attributes, rng, reserved=held_out)
    for _ in range(_TRIES):
        caption = _WRITERS[kind](attributes, rng)
        if kind == "shape" or is_held_out(caption) == held_out:
            return caption
    raise LookupError(f"no {'held-out' if held_out else 'training'} wording for {attributes}")


def write_motion(attributes: Attributes, rng: np.random.Generator) -> str:
    """Return a caption that says how things move and leaves colours and scenery to a given picture.

    Args:
        attributes: as made by ``data.draw_attributes``.
        rng: source of the choice.
    """
    kind, way = attributes["kind"], attributes.get("direction", "")
    if kind == "ball":
        return _pick(rng, ("a ball bouncing", "a bouncing ball", "the ball bounces up and down"))
    if kind == "sea":
        verb = ("rising", "rises") if way == "up" else ("setting", "sets")
        return _pick(rng, (verb[0], f"the {attributes['light']} {verb[0]}", f"the {attributes['light']} {verb[1]}"))
    if kind == "clouds":
        return _pick(rng, (f"clouds drifting {way}", f"clouds moving to the {way}", f"clouds drift {way}", f"drifting {way}"))
    moving, moves = _pick(rng, _MOVING[way]), _pick(rng, _MOVES[way])
    thing = _pick(rng, _SHAPE[attributes["shape"]])
    return _pick(rng, (moving, moving, f"a {thing} {moving}", f"the {thing} {moves}", f"moving {_CROSSING[way]}"))


def opposite(attributes: Attributes) -> Attributes:
    """Return the attributes with the direction of motion reversed (unchanged when there is none)."""
    if "direction" not in attributes:
        return dict(attributes)
    return {**attributes, "direction": _OPPOSITE[attributes["direction"]]}
