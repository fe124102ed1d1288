"""Reads colours, shape and motion out of the frames of a clip, to compare them with its prompt.

Works on uint8 ``[T, H, W, 3]`` frames of any size, drawn, decoded by the VAE or read back from a video file.
Every function is plain image analysis; no network is involved.
"""

from __future__ import annotations

import numpy as np

from .palette import BACKGROUND_COLOURS, COLOURS, LORA_COLOUR, OBJECT_COLOURS

Array = np.ndarray
_MINIMUM_AREA = 0.01  # share of the frame that counts as an object


def nearest_colour(rgb: Array, names: tuple[str, ...]) -> str:
    """Return the name of the palette colour nearest to ``rgb`` (three values in [0, 1])."""
    table = np.array([COLOURS[name] for name in names])
    return names[int(np.argmin(((table - rgb) ** 2).sum(1)))]


def _floats(frames: Array) -> Array:
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8:
        raise ValueError(f"expected uint8 frames [T, H, W, 3], got {frames.dtype} {list(frames.shape)}")
    return frames.astype(np.float32) / 255.0


def object_mask(frames: Array, background: Array | None = None) -> Array:
    """Return the pixels ``[T, H, W]`` (bool) that differ from the per-row background colour.

    Args:
        frames: float ``[T, H, W, 3]``.
        background: ``[H, 3]``; by default the median of each row over time and columns.
    """
    rows = np.median(frames, axis=(0, 2)) if background is None else background
    distance = np.sqrt(((frames - rows[None, :, None]) ** 2).sum(-1))
    return distance > max(0.25, 0.5 * float(np.quantile(distance, 0.985)))


def centroids(mask: Array) -> Array:
    """Return the centre ``[T, 2]`` (x, y in shares of the frame) of each mask, NaN where there is no object."""
    _, height, width = mask.shape
    area = mask.sum((1, 2)).astype(np.float64)
    area[area < _MINIMUM_AREA * height * width] = np.nan
    x = (mask.sum(1) * (np.arange(width) + 0.5)).sum(1) / area / width
    y = (mask.sum(2) * (np.arange(height) + 0.5)).sum(1) / area / height
    return np.stack([x, y], 1)


def _ends(track: Array) -> Array | None:
    """Return last minus first position, each the mean over a sixth of the frames with an object."""
    seen = track[~np.isnan(track).any(1)]
    if len(seen) < 4:
        return None
    count = max(1, len(seen) // 6)
    return seen[-count:].mean(0) - seen[:count].mean(0)


def motion(track: Array, aspect: float) -> str:
    """Name the main direction of a track of centres, or ``"none"`` when it moves less than 8 % of the height.

    Args:
        track: ``[T, 2]`` shares of width and height.
        aspect: width / height of the frames.
    """
    change = _ends(track)
    if change is None:
        return "none"
    x, y = change[0] * aspect, change[1]
    if max(abs(x), abs(y)) < 0.08:
        return "none"
    if abs(x) >= abs(y):
        return "right" if x > 0 else "left"
    return "down" if y > 0 else "up"


def _run(counts: Array) -> Array:
    """Return the indices of the unbroken run of occupied lines around the fullest one."""
    empty = np.flatnonzero(counts <= 1)
    fullest = int(np.argmax(counts))
    before, after = empty[empty < fullest], empty[empty > fullest]
    return np.arange(before[-1] + 1 if len(before) else 0, after[0] if len(after) else len(counts))


def _fill(mask: Array) -> float | None:
    """Return area / bounding box of the object in one mask, or None when it is empty or cut by the frame edge."""
    if mask.sum() < _MINIMUM_AREA * mask.size:
        return None
    rows = _run(mask.sum(1))
    columns = _run(mask[rows].sum(0))
    top, bottom, left, right = rows[0], rows[-1], columns[0], columns[-1]
    if top == 0 or left == 0 or bottom == mask.shape[0] - 1 or right == mask.shape[1] - 1:
        return None
    return float(mask[top:bottom + 1, left:right + 1].mean())


def shape_name(mask: Array) -> str:
    """Name the shape by the median share of its bounding box that it fills.

    Drawn triangles, circles and squares fill 0.5, 0.79 and 1; after the bundled VideoVAE, which rounds corners, 0.61,
    0.78 and 0.95. The limits lie half-way between the latter.
    """
    fills = [fill for fill in map(_fill, mask) if fill is not None]
    if not fills:
        return "none"
    fill = float(np.median(fills))
    return "triangle" if fill < 0.70 else "circle" if fill < 0.86 else "square"


def analyse_shape(frames: Array) -> dict[str, str]:
    """Read a clip of one object on a plain background.

    Args:
        frames: uint8 ``[T, H, W, 3]``.

    Returns:
        ``background``, ``object`` (colour names), ``direction`` (left, right, up, down, none) and ``shape``.
    """
    pixels = _floats(frames)
    background = np.median(pixels, axis=(0, 1, 2))
    mask = object_mask(pixels)
    colour = np.median(pixels[mask], axis=0) if mask.any() else background
    return {
        "background": nearest_colour(background, BACKGROUND_COLOURS),
        "object": nearest_colour(colour, (*OBJECT_COLOURS, LORA_COLOUR)),
        "direction": motion(centroids(mask), frames.shape[2] / frames.shape[1]),
        "shape": shape_name(mask),
    }


def analyse_sea(frames: Array) -> dict[str, str]:
    """Read a clip of the sun or the moon over the sea: ``light`` (sun, moon) and ``direction`` (up, down, none)."""
    pixels = _floats(frames)
    sky = pixels[:, : int(0.60 * pixels.shape[1])]
    brightness = sky.max(-1) + sky.mean(-1)
    bright = brightness >= np.quantile(brightness, 0.985, axis=(1, 2), keepdims=True)
    track = centroids(bright)
    change = _ends(track)
    step = 0.0 if change is None else float(change[1])
    warm = float(np.median(sky[..., 0] + sky[..., 1] + sky[..., 2]))
    return {"light": "sun" if warm > 0.75 else "moon",
            "direction": "none" if abs(step) < 0.08 else "down" if step > 0 else "up"}


def analyse_clouds(frames: Array) -> dict[str, str]:
    """Read a clip of clouds over hills: ``sky`` (blue, orange) and ``direction`` (left, right, none)."""
    pixels = _floats(frames)
    sky = pixels[:, : int(0.62 * pixels.shape[1])]
    colour = np.median(sky, axis=(0, 1, 2))
    cover = sky[..., 2] if colour[0] > colour[2] else sky[..., 0]  # the channel in which clouds stand out
    cover = cover - np.median(cover, axis=(0, 2))[None, :, None]
    return {"sky": "orange" if colour[0] > colour[2] else "blue", "direction": _drift(cover)}


def _drift(cover: Array) -> str:
    """Name the horizontal drift of a pattern ``[T, H, W]`` by correlating frames a sixth of the clip apart."""
    gap, width = max(1, len(cover) // 6), cover.shape[2]
    reach = width // 4
    scores = np.zeros(2 * reach + 1)
    for shift in range(-reach, reach + 1):
        before = cover[:-gap, :, max(0, -shift):width - max(0, shift)]
        after = cover[gap:, :, max(0, shift):width - max(0, -shift)]
        scores[shift + reach] = -np.mean((before - after) ** 2)
    best = int(np.argmax(scores)) - reach
    return "none" if abs(best) < 0.02 * width else "right" if best > 0 else "left"


def analyse_ball(frames: Array) -> dict[str, str]:
    """Read a clip of a bouncing ball: ``object`` colour, ``floor`` (wood, grass) and ``motion`` (bounce, none).

    A bounce is a centre that comes down by at least 12 % of the height and goes up again.
    """
    pixels = _floats(frames)
    height = pixels.shape[1]
    floor = np.median(pixels[:, int(0.9 * height):], axis=(0, 1, 2))
    upper = pixels[:, : int(0.66 * height)]
    mask = object_mask(upper)
    colour = np.median(upper[mask], axis=0) if mask.any() else floor
    y = centroids(mask)[:, 1]
    y = y[~np.isnan(y)] * 0.66
    bounce = len(y) > 8 and y.max() - y[:3].mean() > 0.12 and y.max() - y[-3:].mean() > 0.12
    return {"object": nearest_colour(colour, OBJECT_COLOURS), "floor": "grass" if floor[1] > floor[0] else "wood",
            "motion": "bounce" if bounce else "none"}


_READERS = {"shape": analyse_shape, "sea": analyse_sea, "clouds": analyse_clouds, "ball": analyse_ball}


def analyse(frames: Array, kind: str) -> dict[str, str]:
    """Read the attributes of a clip whose kind is known.

    Args:
        frames: uint8 ``[T, H, W, 3]``.
        kind: ``shape``, ``sea``, ``clouds`` or ``ball``.
    """
    return _READERS[kind](frames)


def compare(frames: Array, attributes: dict[str, str]) -> dict[str, bool]:
    """Compare a clip with the attributes its prompt names; the result has one entry per attribute that can be read."""
    expected = dict(attributes)
    kind = expected.pop("kind")
    if kind == "ball":
        expected["motion"] = "bounce"
    found = analyse(frames, kind)
    return {name: found[name] == value for name, value in expected.items()}
