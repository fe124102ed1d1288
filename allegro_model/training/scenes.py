"""Drawing of the procedural clips: signed distances with analytic anti-aliasing, any size, numpy only.

Axes: ``T`` frames, ``H`` rows, ``W`` columns. Lengths are in units of 1/64 of the frame height, so that one
description of a scene serves every resolution. Colours are floats in [0, 1].
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from .palette import COLOURS, RGB

Array = np.ndarray
UNITS_HIGH = 64.0


@dataclass(frozen=True)
class Canvas:
    """Size of a clip: ``num_frames`` frames of ``height`` x ``width`` pixels."""

    width: int = 96
    height: int = 64
    num_frames: int = 24

    @property
    def units_wide(self) -> float:
        """Frame width in units."""
        return UNITS_HIGH * self.width / self.height

    def grid(self) -> tuple[Array, Array]:
        """Return pixel-centre coordinates ``x [1, 1, W]`` and ``y [1, H, 1]`` in units."""
        unit = UNITS_HIGH / self.height
        x = (np.arange(self.width, dtype=np.float32) + 0.5) * unit
        y = (np.arange(self.height, dtype=np.float32) + 0.5) * unit
        return x[None, None, :], y[None, :, None]

    def time(self) -> Array:
        """Return the clip time ``[T, 1, 1]`` from 0 (first frame) to 1 (last frame)."""
        return np.linspace(0.0, 1.0, self.num_frames, dtype=np.float32)[:, None, None]

    def coverage(self, distance: Array, softness: float = 1.0) -> Array:
        """Turn a signed distance in units (negative inside) into pixel coverage in [0, 1]."""
        pixel = softness * UNITS_HIGH / self.height
        return np.clip(0.5 - distance / pixel, 0.0, 1.0)


@dataclass(frozen=True)
class Moments(Canvas):
    """A canvas whose frames are taken at chosen clip times, not evenly spaced; ``num_frames`` is their number."""

    times: tuple[float, ...] = ()

    def time(self) -> Array:
        """Return the chosen clip times ``[T, 1, 1]``."""
        return np.asarray(self.times, np.float32)[:, None, None]


def mix(base: Array, colour: Array | RGB, alpha: Array) -> Array:
    """Lay ``colour`` over ``base [T, H, W, 3]`` with opacity ``alpha [T, H, W]``."""
    return base + (np.asarray(colour, np.float32) - base) * alpha[..., None]


def _disc(x: Array, y: Array, cx: Array | float, cy: Array | float, radius: Array | float) -> Array:
    return np.sqrt((x - cx) ** 2 + (y - cy) ** 2) - radius


def _box(x: Array, y: Array, cx: Array, cy: Array, half: float) -> Array:
    return np.maximum(np.abs(x - cx), np.abs(y - cy)) - half


def _triangle(x: Array, y: Array, cx: Array, cy: Array, radius: float) -> Array:
    """Signed distance bound of an upright equilateral triangle with the given circumradius."""
    dx, dy = np.abs(x - cx), y - cy
    return np.maximum(dy - radius / 2, dx * (math.sqrt(3) / 2) - dy / 2 - radius / 2)


def jitter(colour: RGB, rng: np.random.Generator, amount: float = 0.03) -> Array:
    """Return ``colour`` with a small random change of each channel."""
    return np.clip(np.asarray(colour, np.float32) + rng.uniform(-amount, amount, 3), 0, 1).astype(np.float32)


def _flat_background(canvas: Canvas, colour: Array, rng: np.random.Generator) -> Array:
    """Return a background ``[T, H, W, 3]`` with a slight vertical gradient."""
    slope = rng.uniform(-0.05, 0.05)
    rows = 1.0 + slope * np.linspace(-1, 1, canvas.height, dtype=np.float32)
    frame = np.clip(colour[None, None, :] * rows[:, None, None], 0, 1)
    return np.broadcast_to(frame, (canvas.num_frames, canvas.height, canvas.width, 3)).astype(np.float32)


def shape_track(canvas: Canvas, direction: str, rng: np.random.Generator) -> tuple[Array, Array]:
    """Return the centre ``(cx, cy)``, each ``[T, 1, 1]`` in units, of an object that crosses the frame."""
    wide, time = canvas.units_wide, canvas.time()
    if direction in ("left", "right"):
        start, end = rng.uniform(0.13, 0.20) * wide, rng.uniform(0.80, 0.87) * wide
        along = start + (end - start) * (time if direction == "right" else 1 - time)
        return along, np.full_like(time, rng.uniform(28, 36))
    start, end = rng.uniform(2, 9), rng.uniform(55, 62)
    along = start + (end - start) * (time if direction == "down" else 1 - time)
    return np.full_like(time, rng.uniform(0.34, 0.66) * wide), along


def draw_shape(canvas: Canvas, attributes: dict[str, str], rng: np.random.Generator) -> Array:
    """Draw a flat circle, square or triangle crossing a plain background; return ``[T, H, W, 3]``."""
    frames = _flat_background(canvas, jitter(COLOURS[attributes["background"]], rng), rng)
    x, y = canvas.grid()
    cx, cy = shape_track(canvas, attributes["direction"], rng)
    radius = rng.uniform(17.5, 20.5)
    shape = attributes["shape"]
    if shape == "circle":
        distance = _disc(x, y, cx, cy, radius)
    elif shape == "square":
        distance = _box(x, y, cx, cy, 1.04 * radius)  # well larger than the circle, so that it is not mistaken for one
    elif shape == "triangle":
        distance = _triangle(x, y, cx, cy + 0.25 * radius, 1.3 * radius)
    else:
        raise ValueError(f"unknown shape {shape!r}")
    return mix(frames, jitter(COLOURS[attributes["object"]], rng), canvas.coverage(distance))


def draw_ball(canvas: Canvas, attributes: dict[str, str], rng: np.random.Generator) -> Array:
    """Draw a shaded ball that falls, bounces once and rises again over its shadow; return ``[T, H, W, 3]``."""
    x, y = canvas.grid()
    time = canvas.time()
    grass = attributes["floor"] == "grass"
    wall, floor = ((0.55, 0.78, 0.96), (0.30, 0.62, 0.25)) if grass else ((0.93, 0.88, 0.78), (0.60, 0.40, 0.22))
    edge = rng.uniform(43, 46)
    frames = _flat_background(canvas, jitter(wall, rng), rng)
    shade = 1.0 - 0.25 * np.clip((y - edge) / 20.0, 0, 1)
    floor_colour = jitter(floor, rng) * shade[..., None]
    frames = mix(frames, floor_colour, np.broadcast_to(canvas.coverage(edge - y), frames.shape[:3]))
    radius, ground = rng.uniform(11, 13), rng.uniform(53, 56)
    cx = canvas.units_wide * rng.uniform(0.3, 0.7)
    height = rng.uniform(22, 26) * np.abs(np.cos(math.pi * (time + rng.uniform(-0.08, 0.08))))
    cy = ground - radius - height
    near = 1.0 - height / 30.0
    shadow = canvas.coverage(np.sqrt(((x - cx) / 1.6) ** 2 + ((y - ground) / 0.45) ** 2) - radius * (0.4 + 0.5 * near), 6)
    frames = mix(frames, (0.05, 0.05, 0.05), shadow * (0.25 + 0.35 * near))
    light = np.clip(1.0 - np.sqrt((x - cx + 0.35 * radius) ** 2 + (y - cy + 0.4 * radius) ** 2) / (1.9 * radius), 0, 1)
    colour = jitter(COLOURS[attributes["object"]], rng)
    shaded = colour * (0.62 + 0.48 * light[..., None]) + 0.25 * np.clip(light[..., None] - 0.75, 0, 1)
    return mix(frames, np.clip(shaded, 0, 1), canvas.coverage(_disc(x, y, cx, cy, radius)))


def _ramp(value: Array, stops: list[tuple[float, RGB]]) -> Array:
    """Interpolate colours at ``value``; the result has a trailing colour axis."""
    where = [s for s, _ in stops]
    return np.stack([np.interp(value, where, [c[i] for _, c in stops]) for i in range(3)], -1).astype(np.float32)


_SKY_TOP = [(-0.2, (0.10, 0.08, 0.25)), (0.3, (0.25, 0.30, 0.60)), (1.0, (0.25, 0.55, 0.92))]
_SKY_LOW = [(-0.2, (0.55, 0.20, 0.28)), (0.3, (0.98, 0.55, 0.25)), (1.0, (0.98, 0.85, 0.60))]
_SUN = [(-0.2, (1.0, 0.35, 0.15)), (0.4, (1.0, 0.72, 0.20)), (1.0, (1.0, 0.95, 0.60))]
_SEA = [(-0.2, (0.08, 0.08, 0.22)), (0.4, (0.15, 0.25, 0.48)), (1.0, (0.10, 0.38, 0.66))]
_NIGHT = {
    "top": [(-0.2, (0.01, 0.01, 0.06)), (1.0, (0.03, 0.05, 0.18))],
    "low": [(-0.2, (0.05, 0.06, 0.18)), (1.0, (0.12, 0.17, 0.38))],
    "disc": [(-0.2, (0.95, 0.85, 0.65)), (1.0, (0.96, 0.96, 0.90))],
    "sea": [(-0.2, (0.01, 0.02, 0.08)), (1.0, (0.03, 0.08, 0.22))],
}


def draw_sea(canvas: Canvas, attributes: dict[str, str], rng: np.random.Generator) -> Array:
    """Draw the sun or the moon rising or setting over the sea, with glow, waves and reflection."""
    x, y = canvas.grid()
    time = canvas.time()
    moon = attributes["light"] == "moon"
    horizon = rng.uniform(39, 42)
    progress = time if attributes["direction"] == "up" else 1 - time
    cy = horizon + 6 - (horizon - 6) * progress * rng.uniform(0.85, 1.0)
    cx = canvas.units_wide * rng.uniform(0.3, 0.7)
    height = (horizon - cy) / (horizon - 8)  # 0 at the horizon, about 1 at the top
    tables = _NIGHT if moon else {"top": _SKY_TOP, "low": _SKY_LOW, "disc": _SUN, "sea": _SEA}
    down = np.clip(y / horizon, 0, 1)[..., None]
    sky = _ramp(height, tables["top"]) * (1 - down) + _ramp(height, tables["low"]) * down
    frames = np.broadcast_to(sky, (canvas.num_frames, canvas.height, canvas.width, 3)).astype(np.float32)
    disc_colour = _ramp(height, tables["disc"])
    distance = _disc(x, y, cx, cy, rng.uniform(8, 10))
    glow = np.exp(-np.clip(distance, 0, None) / 9.0) * (0.25 if moon else 0.5)
    frames = mix(frames, disc_colour, glow)
    frames = mix(frames, disc_colour, canvas.coverage(distance))
    depth = np.clip((y - horizon) / (UNITS_HIGH - horizon), 0, 1)
    waves = np.sin(y * 1.3 + 2.0 * np.sin(x * 0.09 + 1.7) + 2 * math.pi * time * 1.0)
    sea = _ramp(height, tables["sea"]) * (1.0 + 0.18 * waves * (0.3 + depth))[..., None] * (1.15 - 0.3 * depth)[..., None]
    visible = np.clip(height * 4 + 0.8, 0, 1)
    beam = np.exp(-(((x - cx) / (5 + 9 * depth)) ** 2)) * (0.55 + 0.35 * waves) * visible * (0.55 if moon else 0.8)
    sea = mix(sea, disc_colour, beam)
    return mix(frames, np.clip(sea, 0, 1), np.broadcast_to(canvas.coverage(horizon - y), frames.shape[:3]))


def draw_clouds(canvas: Canvas, attributes: dict[str, str], rng: np.random.Generator) -> Array:
    """Draw clouds drifting left or right over green hills under a blue or an orange evening sky."""
    x, y = canvas.grid()
    time = canvas.time()
    wide = canvas.units_wide
    evening = attributes["sky"] == "orange"
    top, low = ((0.85, 0.40, 0.20), (1.0, 0.75, 0.40)) if evening else ((0.22, 0.50, 0.92), (0.62, 0.84, 0.98))
    down = np.clip(y / 46, 0, 1)[..., None]
    sky = jitter(top, rng) * (1 - down) + jitter(low, rng) * down
    frames = np.broadcast_to(sky, (canvas.num_frames, canvas.height, canvas.width, 3)).astype(np.float32)
    cloud = (1.0, 0.90, 0.80) if evening else (0.98, 0.98, 1.0)
    travel = rng.uniform(0.45, 0.55) * wide
    starts = (rng.uniform(0.05, 0.18) * wide, rng.uniform(0.55, 0.68) * wide)
    for index, start in enumerate(starts):
        centre = start + travel * time  # the second cloud leaves the frame
        centre = centre if attributes["direction"] == "right" else wide - centre
        base, size = rng.uniform(14, 26) + 2 * index, rng.uniform(8, 10) - index
        parts = [(-1.1, 0.2, 0.75), (0.0, -0.15, 1.0), (1.15, 0.25, 0.7)]
        distance = np.minimum.reduce([_disc(x, y, centre + a * size, base + b * size, c * size) for a, b, c in parts])
        distance = np.maximum(distance, y - base - 0.6 * size)
        frames = mix(frames, cloud, canvas.coverage(distance, 3.0) * 0.95)
    phase = rng.uniform(0, 2 * math.pi, 2)
    far = 47 + 3 * np.sin(x * 0.07 + phase[0])
    near = 53 + 3 * np.sin(x * 0.05 + phase[1])
    dim = 0.7 if evening else 1.0
    for line, colour in ((far, (0.35, 0.62, 0.30)), (near, (0.20, 0.48, 0.18))):
        alpha = np.broadcast_to(canvas.coverage(line - y), frames.shape[:3])
        frames = mix(frames, np.asarray(colour, np.float32) * dim, alpha)
    return frames


DRAW = {"shape": draw_shape, "ball": draw_ball, "sea": draw_sea, "clouds": draw_clouds}
