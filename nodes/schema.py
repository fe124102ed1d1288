"""ComfyUI's node interface and the inputs that several nodes share; with the bridge the only import of the host."""

from __future__ import annotations

import inspect
from typing import Any

from comfy_api.latest import ComfyExtension, io, ui

from ..allegro_model.geometry import MAX_FRAMES, MAX_PIXELS, PIXEL_MULTIPLE, TEMPORAL_FACTOR
from ..allegro_model.loading.sizes import trained_sizes
from .bridge.latents import MAX_BATCH
from .bridge.paths import BUNDLED

__all__ = ["MAX_TILE", "MAX_TILE_FRAMES", "ComfyExtension", "clip_inputs", "fraction", "io", "preview_image", "schema",
           "seed", "tile_inputs"]

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


def preview_image(images: Any, node: type[io.ComfyNode]) -> dict[str, Any]:
    """What shows images [B, H, W, 3] on a node in the browser."""
    return ui.PreviewImage(images, cls=node).as_dict()


def seed(tooltip: str) -> io.Int.Input:
    """A seed with ComfyUI's control widget behind it."""
    return io.Int.Input("seed", default=42, min=0, max=2**64 - 1, control_after_generate=True, tooltip=tooltip)


def fraction(name: str, default: float, tooltip: str) -> io.Float.Input:
    """A share above 0, at most 1."""
    return io.Float.Input(name, default=default, min=0.01, max=1.0, step=0.01, tooltip=tooltip)


def clip_inputs(min_length: int = TEMPORAL_FACTOR, *, image_to_video: bool = False) -> list[io.Int.Input]:
    """width, height, length and batch_size of the clip to be made.

    Args:
        min_length: frames.
        image_to_video: whether the clip is one of the image-to-video models.
    """
    def size(name: str, default: int, tooltip: str) -> io.Int.Input:
        return io.Int.Input(name, default=default, min=PIXEL_MULTIPLE, max=MAX_PIXELS, step=PIXEL_MULTIPLE, tooltip=tooltip)

    length = io.Int.Input("length", default=88, min=min_length, max=MAX_FRAMES, step=TEMPORAL_FACTOR, tooltip=(
        "Frames, a multiple of 4; 15 are one second. Start with what the model was trained at: 88, about 6 seconds. Fewer is "
        "faster and often poorer."))
    # Part of the definition that the browser gets: web/js/sizes.js offers these sizes and estimates others.
    length.extra_dict = {"allegro_sizes": {**trained_sizes(image_to_video=image_to_video), "bundled": list(BUNDLED)}}
    return [
        size("width", 1280, "Width in pixels, a multiple of 16. Start with the size the model was trained at: 1280. More takes "
                            "more time and memory."),
        size("height", 720, "Height in pixels, a multiple of 16. Start with the size the model was trained at: 720. More takes "
                            "more time and memory."),
        length,
        io.Int.Input("batch_size", default=1, min=1, max=MAX_BATCH, step=1, tooltip=(
            "Clips made at once. Each has its own seed, counted up from the sampler's, and comes out as if made alone. More "
            "takes more memory.")),
    ]


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
