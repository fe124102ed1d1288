"""ComfyUI's node interface and the inputs that several nodes share; with the bridge the only import of the host."""

from __future__ import annotations

import inspect
from typing import Any

from comfy_api.latest import ComfyExtension, io

__all__ = ["MAX_TILE", "MAX_TILE_FRAMES", "ComfyExtension", "fraction", "io", "schema", "seed", "tile_inputs"]

CATEGORY = "Allegro"
MAX_TILE = 2048  # pixels
MAX_TILE_FRAMES = 512


def schema(*, node_id: str, category: str, **fields: Any) -> io.Schema:
    """A node definition; fields that the running version does not know yet are left out.

    Args:
        node_id: frozen once released.
        category: below "Allegro", e.g. "loaders".
        fields: everything else of `io.Schema`.
    """
    known = inspect.signature(io.Schema).parameters
    return io.Schema(node_id=node_id, category=f"{CATEGORY}/{category}",
                     **{name: value for name, value in fields.items() if name in known})


def seed(tooltip: str) -> io.Int.Input:
    """A seed with ComfyUI's control widget behind it."""
    return io.Int.Input("seed", default=42, min=0, max=2**64 - 1, control_after_generate=True, tooltip=tooltip)


def fraction(name: str, default: float, tooltip: str) -> io.Float.Input:
    """A share above 0, at most 1."""
    return io.Float.Input(name, default=default, min=0.01, max=1.0, step=0.01, tooltip=tooltip)


def tile_inputs() -> list[io.Int.Input]:
    """The four tile settings of the VAE nodes, in pixels and frames; 0 stands for what the VAE was trained with."""
    return [
        io.Int.Input("tile_size", default=0, min=0, max=MAX_TILE, step=8, tooltip=(
            "Height and width of a tile in pixels. 0 = as trained (320 for the 720p model): the best picture. "
            "Smaller needs less memory and may show seams.")),
        io.Int.Input("overlap", default=0, min=0, max=MAX_TILE // 2, step=8, tooltip=(
            "Pixels that neighbouring tiles share in height and width; less than tile_size. 0 = as trained (120 in "
            "height and 80 in width for the 720p model). More hides seams better and takes longer.")),
        io.Int.Input("temporal_size", default=0, min=0, max=MAX_TILE_FRAMES, step=4, tooltip=(
            "Frames of a tile. 0 = as trained (24), which the model needs for its best picture; change it only if "
            "memory runs out.")),
        io.Int.Input("temporal_overlap", default=0, min=0, max=MAX_TILE_FRAMES // 2, step=4, tooltip=(
            "Frames that successive tiles share; less than temporal_size. 0 = as trained (8). More is smoother in "
            "time and takes longer.")),
    ]
