"""The empty latent node."""

from __future__ import annotations

from ..allegro_model.errors import AllegroError
from ..allegro_model.geometry import (
    MAX_FRAMES,
    MAX_PIXELS,
    PIXEL_MULTIPLE,
    TEMPORAL_FACTOR,
    check_multiple,
)
from .bridge.latents import check_fits, empty_latent
from .schema import io, schema

MAX_BATCH = 64


class EmptyAllegroLatentVideo(io.ComfyNode):
    """The size of the clip."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        def size(name: str, default: int, tooltip: str) -> io.Int.Input:
            return io.Int.Input(name, default=default, min=PIXEL_MULTIPLE, max=MAX_PIXELS, step=PIXEL_MULTIPLE,
                                tooltip=tooltip)

        return schema(
            node_id="EmptyAllegroLatentVideo",
            display_name="Empty Allegro Latent",
            category="latent",
            description=("An empty latent of the size of the clip. The released models were trained at 1280x720 with 88 or "
                         "40 frames and at 640x368 with 40 frames; other sizes work less well."),
            search_aliases=["allegro size", "resolution", "frames"],
            inputs=[
                size("width", 1280, "Width in pixels, a multiple of 16. Start with the size the model was trained at: 1280. "
                                    "More takes more time and memory."),
                size("height", 720, "Height in pixels, a multiple of 16. Start with the size the model was trained at: 720. "
                                    "More takes more time and memory."),
                io.Int.Input("length", default=88, min=TEMPORAL_FACTOR, max=MAX_FRAMES, step=TEMPORAL_FACTOR, tooltip=(
                    "Frames, a multiple of 4; 15 are one second. Start with what the model was trained at: 88, about 6 "
                    "seconds. Fewer is faster and often poorer.")),
                io.Int.Input("batch_size", default=1, min=1, max=MAX_BATCH, step=1, tooltip=(
                    "Clips made at once. Each has its own seed, counted up from the sampler's, and comes out as if made "
                    "alone. More takes more memory.")),
            ],
            outputs=[io.Latent.Output(display_name="LATENT", tooltip="The empty latent, for the latent input of a sampler.")],
        )

    @classmethod
    def validate_inputs(cls, width: int | None = None, height: int | None = None, length: int | None = None,
                        batch_size: int | None = None) -> bool | str:
        """Before anything is loaded. An input that is linked is None here and checked in `execute`."""
        try:
            _check(width, height, length, batch_size)
        except AllegroError as error:
            return str(error)
        return True

    @classmethod
    def execute(cls, width: int, height: int, length: int, batch_size: int) -> io.NodeOutput:
        _check(width, height, length, batch_size)
        return io.NodeOutput(empty_latent(width, height, length, batch_size))


def _check(width: int | None, height: int | None, length: int | None, batch_size: int | None) -> None:
    for name, value, multiple, maximum in (("width", width, PIXEL_MULTIPLE, MAX_PIXELS),
                                           ("height", height, PIXEL_MULTIPLE, MAX_PIXELS),
                                           ("length", length, TEMPORAL_FACTOR, MAX_FRAMES),
                                           ("batch_size", batch_size, 1, MAX_BATCH)):
        if value is not None:
            check_multiple(name, value, multiple, maximum)
    if width is not None and height is not None and length is not None:
        check_fits(width, height, length, batch_size or 1)
