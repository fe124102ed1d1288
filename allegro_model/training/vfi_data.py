"""Triplets for the frame interpolator: two frames, a position between them, and the frame there, drawn exactly.

Two sources: the captioned clips at fractional times, and plain or textured layers that move in every direction, whose
motion is known, so that the network learns motion and not the palette.
Frames are float32 ``[T, H, W, 3]`` in [0, 1]; lengths are in the units of ``scenes``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from .data import draw_attributes, render
from .palette import combinations
from .scenes import DRAW, UNITS_HIGH, Array, Canvas, Moments, mix

#: Share of the captioned clips, which are what the bundled model draws.
CLIP_SHARE = 0.75
MIDDLE_SHARE = 0.4
#: Clip time between the two frames; 24 frames are 1/23 apart.
GAPS = (0.02, 0.2)
_FASTEST = 14.0  # units between the two frames
_CONTRAST = 0.35
_PLAIN_SHARE = 0.4
_EDGE = 0.05  # positions lie between this and 1 - this


@dataclass(frozen=True)
class Triplet:
    """Two frames and what lies between them.

    Attributes:
        frames: ``[3, H, W, 3]`` float32 in [0, 1]: first, between, second.
        position: of the frame between, in (0, 1).
        flow: ``[H, W, 4]`` pixels, true motion from the frame between into the first and into the second, x and y
            each; None where it is not known.
    """

    frames: Array
    position: float
    flow: Array | None = None


def draw_position(rng: np.random.Generator) -> float:
    """Draw a position: often the middle, else anything."""
    return 0.5 if rng.random() < MIDDLE_SHARE else float(rng.uniform(_EDGE, 1 - _EDGE))


def clip_triplet(size: tuple[int, int], rng: np.random.Generator) -> Triplet:
    """Draw two moments of a training clip, and the moment between; held-out combinations never occur.

    Args:
        size: (width, height) in pixels.
        rng: source of all choices.
    """
    gap = math.exp(rng.uniform(math.log(GAPS[0]), math.log(GAPS[1])))
    start, position = rng.uniform(0, 1 - gap), draw_position(rng)
    times = (start, start + gap * position, start + gap)
    attributes = draw_attributes(rng)
    frames = DRAW[attributes["kind"]](Moments(*size, 3, times), attributes, rng)
    return Triplet(np.clip(frames, 0, 1), position)


def _displacement(fastest: float, rng: np.random.Generator) -> tuple[float, float]:
    """Draw a motion of any direction."""
    angle, length = rng.uniform(0, 2 * math.pi), fastest * rng.random()
    return length * math.cos(angle), length * math.sin(angle)


def _texture(x: Array, y: Array, rng: np.random.Generator) -> Array:
    """Return a colour at ``x, y``, with a trailing colour axis: plain, or three crossed waves, soft to sharp."""
    colour = np.broadcast_to(rng.uniform(0.1, 0.9, 3).astype(np.float32), (*np.broadcast_shapes(x.shape, y.shape), 3))
    for _ in range(3 if rng.random() > _PLAIN_SHARE else 0):
        angle, frequency = rng.uniform(0, math.pi), math.exp(rng.uniform(math.log(0.06), math.log(0.9)))
        wave = np.sin(frequency * (math.cos(angle) * x + math.sin(angle) * y) + rng.uniform(0, 2 * math.pi))
        wave = np.clip(wave * rng.choice([1.0, 4.0]), -1, 1)
        colour = colour + wave[..., None] * rng.uniform(-_CONTRAST, _CONTRAST, 3).astype(np.float32) * rng.random()
    return np.clip(colour, 0, 1)


def _outline(x: Array, y: Array, rng: np.random.Generator) -> Array:
    """Return the signed distance of a random disc, box or triangle around the origin."""
    radius, kind = rng.uniform(5, 22), int(rng.integers(3))
    if kind == 0:
        return np.sqrt(x**2 + y**2) - radius
    if kind == 1:
        return np.maximum(np.abs(x) - radius, np.abs(y) - radius * rng.uniform(0.3, 1.0))
    return np.maximum(y - radius / 2, np.abs(x) * (math.sqrt(3) / 2) - y / 2 - radius / 2)


def draw_layers(canvas: Moments, rng: np.random.Generator) -> tuple[Array, Array]:
    """Draw one to three textured shapes that move and turn over a textured background, which may move too.

    Args:
        canvas: three moments, shares of the drawn motion: 0, the position between, 1.
        rng: source of all choices.

    Returns:
        frames ``[3, H, W, 3]`` and the true motion ``[H, W, 4]``, as in ``Triplet``.
    """
    x, y = canvas.grid()
    time = canvas.time() - 0.5
    ends = time[[0, 2]]
    dx, dy = _displacement(0.6 * _FASTEST, rng) if rng.random() < 0.6 else (0.0, 0.0)
    frames = _texture(x - dx * time, y - dy * time, rng)
    shape = (canvas.height, canvas.width)
    flow = np.stack([np.broadcast_to(d * (end - time[1]), shape) for end in ends for d in (dx, dy)], -1)
    for _ in range(int(rng.integers(1, 4))):
        dx, dy = _displacement(_FASTEST, rng)
        cx, cy = rng.uniform(0, canvas.units_wide), rng.uniform(0, UNITS_HIGH)
        across, down = x - cx - dx * time, y - cy - dy * time
        start, turn = rng.uniform(0, 2 * math.pi), rng.normal(0, 0.15)
        c, s = np.cos(start + turn * time), np.sin(start + turn * time)
        u, v = c * across + s * down, c * down - s * across  # in axes that move and turn with the shape
        covered = canvas.coverage(_outline(u, v, rng), rng.uniform(1, 3))
        frames = mix(frames, _texture(u, v, rng), covered)
        moved = [place for k in (0, 2) for place in (cx + dx * time[k] + c[k] * u[1] - s[k] * v[1] - x[0],
                                                     cy + dy * time[k] + s[k] * u[1] + c[k] * v[1] - y[0])]
        flow = np.where(covered[1, ..., None] > 0.5, np.stack(moved, -1), flow)
    return frames, flow * canvas.height / UNITS_HIGH


def layers_triplet(size: tuple[int, int], rng: np.random.Generator) -> Triplet:
    """Draw textured layers at two moments and between; arguments as ``clip_triplet``."""
    position = draw_position(rng)
    frames, flow = draw_layers(Moments(*size, 3, (0.0, position, 1.0)), rng)
    return Triplet(frames, position, flow)


def held_out_triplets(kind: str, count: int, position: Fraction, seed: int = 910_000) -> list[Triplet]:
    """Draw triplets for a measurement: frames of 24-frame clips of 96 x 64 pixels that training never saw.

    Args:
        kind: of scene; shapes have held-out combinations of attributes.
        count: how many clips, one triplet of each.
        position: 1/2, or another fraction: frames ``denominator`` apart, and the one ``numerator`` after the first.
        seed: of the first clip.
    """
    canvas, pool, triplets = Canvas(), combinations(held_out=True), []
    for number in range(count):
        rng = np.random.default_rng(seed + number)
        if kind == "shape":
            values = pool[int(rng.integers(len(pool)))]
            attributes = {"kind": kind, **dict(zip(("object", "background", "shape", "direction"), values, strict=True))}
        else:
            attributes = draw_attributes(rng)
            while attributes["kind"] != kind:
                attributes = draw_attributes(rng)
        frames = render(attributes, rng, canvas).astype(np.float32) / 255
        first = int(rng.integers(canvas.num_frames - position.denominator))
        chosen = [first, first + position.numerator, first + position.denominator]
        triplets.append(Triplet(frames[chosen], float(position)))
    return triplets
