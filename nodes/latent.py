"""The empty latent node."""

from __future__ import annotations

from ..allegro_model.errors import AllegroError
from .bridge.latents import check_clip, empty_latent
from .schema import clip_inputs, io, schema


class EmptyAllegroLatentVideo(io.ComfyNode):
    """The size of the clip."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="EmptyAllegroLatentVideo",
            display_name="Empty Allegro Latent",
            category="latent",
            description=("An empty latent of the size of the clip. The released models were trained at 1280x720 with 88 or "
                         "40 frames and at 640x368 with 40 frames; other sizes work less well."),
            search_aliases=["allegro size", "resolution", "frames"],
            inputs=clip_inputs(),
            outputs=[io.Latent.Output(display_name="LATENT", tooltip="The empty latent, for the latent input of a sampler.")],
        )

    @classmethod
    def validate_inputs(cls, width: int | None = None, height: int | None = None, length: int | None = None,
                        batch_size: int | None = None) -> bool | str:
        """Before anything is loaded. An input that is linked is None here and checked in `execute`."""
        try:
            check_clip(width, height, length, batch_size)
        except AllegroError as error:
            return str(error)
        return True

    @classmethod
    def execute(cls, width: int, height: int, length: int, batch_size: int) -> io.NodeOutput:
        check_clip(width, height, length, batch_size)
        return io.NodeOutput(empty_latent(width, height, length, batch_size))
