"""VAE nodes with the tile settings in view. ComfyUI's own VAE nodes use the trained tiles."""

from __future__ import annotations

from typing import Any

from ..allegro_model.errors import GeometryError
from ..allegro_model.geometry import SPATIAL_FACTOR, TEMPORAL_FACTOR, check_multiple
from ..allegro_model.vae import Tiling
from .bridge.vae import check_vae
from .schema import MAX_TILE, MAX_TILE_FRAMES, io, schema, tile_inputs


class VideoVAEEncode(io.ComfyNode):
    """Images to latents."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="AllegroVideoVAEEncode",
            display_name="Video VAE Encode (Allegro)",
            category="vae",
            description=("Encodes a clip, tile by tile as the VideoVAE was trained. Frames are filled up to a multiple of 4 "
                         "with the last one, height and width cropped to multiples of 8."),
            search_aliases=["video to latent"],
            inputs=[
                io.Image.Input("pixels", tooltip="The frames of the clip, in order."),
                io.Vae.Input("vae", tooltip="The VideoVAE from Load Allegro VAE."),
                *tile_inputs(),
            ],
            outputs=[io.Latent.Output(display_name="LATENT", tooltip=(
                "The encoded clip, 4 times fewer frames and 8 times smaller, for a sampler with denoise below 1."))],
        )

    @classmethod
    def validate_inputs(cls, tile_size: int | None = None, overlap: int | None = None, temporal_size: int | None = None,
                        temporal_overlap: int | None = None) -> bool | str:
        """Before anything is loaded. An input that is linked is None here and checked in `execute`."""
        return _problem(tile_size, overlap, temporal_size, temporal_overlap)

    @classmethod
    def execute(cls, pixels: Any, vae: Any, tile_size: int, overlap: int, temporal_size: int,
                temporal_overlap: int) -> io.NodeOutput:
        tiling = _tiling(vae, tile_size, overlap, temporal_size, temporal_overlap)
        return io.NodeOutput({"samples": vae.encode_with(pixels, tiling)})


class VideoVAEDecode(io.ComfyNode):
    """Latents to images."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="AllegroVideoVAEDecode",
            display_name="Video VAE Decode (Allegro)",
            category="vae",
            description=("Decodes latents to frames, tile by tile as the VideoVAE was trained, in bounded memory. A batch of "
                         "clips comes out one clip after the other."),
            search_aliases=["latent to video"],
            inputs=[
                io.Latent.Input("samples", tooltip="The latents of a sampler or of Video VAE Encode (Allegro)."),
                io.Vae.Input("vae", tooltip="The VideoVAE from Load Allegro VAE."),
                *tile_inputs(),
            ],
            outputs=[io.Image.Output(display_name="IMAGE", tooltip=(
                "The frames, for Create Video (15 frames per second) or any image node."))],
        )

    @classmethod
    def validate_inputs(cls, tile_size: int | None = None, overlap: int | None = None, temporal_size: int | None = None,
                        temporal_overlap: int | None = None) -> bool | str:
        """Before anything is loaded. An input that is linked is None here and checked in `execute`."""
        return _problem(tile_size, overlap, temporal_size, temporal_overlap)

    @classmethod
    def execute(cls, samples: dict[str, Any], vae: Any, tile_size: int, overlap: int, temporal_size: int,
                temporal_overlap: int) -> io.NodeOutput:
        tiling = _tiling(vae, tile_size, overlap, temporal_size, temporal_overlap)
        images = vae.decode_with(samples["samples"], tiling)
        return io.NodeOutput(images.flatten(0, 1))


def _tiling(vae: Any, tile_size: int, overlap: int, temporal_size: int, temporal_overlap: int) -> Tiling:
    check_vae(vae)
    _check(tile_size, overlap, temporal_size, temporal_overlap)
    return vae.tiling(tile_size, overlap, temporal_size, temporal_overlap)


def _check(tile_size: int | None, overlap: int | None, temporal_size: int | None, temporal_overlap: int | None) -> None:
    """Raises on values that fit no VAE; 0 and None are always right."""
    for names, tile, shared, multiple, maximum in (
            (("tile_size", "overlap"), tile_size, overlap, SPATIAL_FACTOR, MAX_TILE),
            (("temporal_size", "temporal_overlap"), temporal_size, temporal_overlap, TEMPORAL_FACTOR, MAX_TILE_FRAMES)):
        if tile:
            check_multiple(names[0], tile, multiple, maximum)
        if shared:
            check_multiple(names[1], shared, multiple, max(multiple, (tile or maximum) - multiple))


def _problem(*values: int | None) -> bool | str:
    """True, or what is wrong."""
    try:
        _check(*values)
    except GeometryError as error:
        return str(error)
    return True
