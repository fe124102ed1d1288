"""Nodes of the image-to-video model: which frames of a clip are given. Any sampler takes what they return."""

from __future__ import annotations

from typing import Any

from ..allegro_model.conditioning import FITS, GivenFrames, resolve_positions
from ..allegro_model.errors import AllegroError, GeometryError
from ..allegro_model.geometry import MAX_FRAMES, TEMPORAL_FACTOR
from .bridge.conditioning import carry_latents, join_images, latent_for, set_given_frames, to_frames
from .bridge.latents import check_clip
from .bridge.vae import check_vae
from .schema import clip_inputs, io, schema

MIN_LENGTH = 2 * TEMPORAL_FACTOR
MAX_TEXT = 10_000  # characters of a list of positions
DIRECTIONS = ("append", "prepend")
MATCHES = {"second to first": "second", "first to second": "first", "off": None}
_SIZES = ("The released model was trained at 1280x720 with 88 frames; other sizes work less well.")


def _prompt_inputs() -> list[Any]:
    return [
        io.Conditioning.Input("positive", tooltip="What the clip shows, from T5 Encode (Allegro)."),
        io.Conditioning.Input("negative", tooltip="What it should not show, from T5 Encode (Allegro)."),
        io.Vae.Input("vae", tooltip="The VideoVAE from Load Allegro VAE; it encodes the given frames."),
    ]


def _fit_input() -> io.Combo.Input:
    return io.Combo.Input("fit", options=list(FITS), default="crop", tooltip=(
        "How pictures of another shape are brought to the clip's: crop cuts what is too much at the edges, as the reference "
        "does; pad keeps the whole picture, with grey bars; stretch distorts it. Start with crop."))


def _outputs() -> list[Any]:
    return [
        io.Conditioning.Output(display_name="positive", tooltip="The prompt with the given frames, for a sampler."),
        io.Conditioning.Output(display_name="negative", tooltip="The negative prompt with the given frames, for a sampler."),
        io.Latent.Output(display_name="latent", tooltip="The latent of the clip's size, for the latent input of a sampler."),
    ]


class AllegroImageToVideo(io.ComfyNode):
    """A clip with a given beginning, end, or both."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="AllegroImageToVideo",
            display_name="Allegro Image to Video",
            category="conditioning",
            description=("A clip that begins with a picture, ends with one, or both; with the same picture at both ends it is "
                         "a loop. Needs the image-to-video model (Allegro-TI2V). " + _SIZES),
            search_aliases=["ti2v", "i2v", "first frame", "last frame", "start image", "end image", "loop"],
            inputs=[
                *_prompt_inputs(),
                *clip_inputs(MIN_LENGTH, image_to_video=True),
                io.Image.Input("start_image", optional=True, tooltip=(
                    "The first frame, any size. Of several pictures all are taken, as the first frames in their order.")),
                io.Image.Input("end_image", optional=True, tooltip=(
                    "The last frame, any size; connect the picture of start_image for a loop. Of several pictures all are "
                    "taken, as the last frames in their order.")),
                _fit_input(),
            ],
            outputs=_outputs(),
        )

    @classmethod
    def validate_inputs(cls, width: int | None = None, height: int | None = None, length: int | None = None,
                        batch_size: int | None = None, fit: str | None = None) -> bool | str:
        """Before anything is loaded. An input that is linked is None here and checked in `execute`."""
        return _problem(width, height, length, batch_size, fit=fit)

    @classmethod
    def execute(cls, positive: list[Any], negative: list[Any], vae: Any, width: int, height: int, length: int, batch_size: int,
                fit: str, start_image: Any = None, end_image: Any = None) -> io.NodeOutput:
        _check(width, height, length, batch_size, fit=fit)
        first, last = (0 if image is None else len(image) for image in (start_image, end_image))
        if first + last >= length:
            raise GeometryError(f"start_image and end_image hold {first} and {last} pictures, the clip has {length} frames: "
                                "nothing would be left to make. Give fewer pictures; one frame of a clip is chosen with Image "
                                "From Batch.")
        frames = to_frames([start_image, end_image], width, height, fit)
        given = GivenFrames.at(frames, [*range(first), *range(length - last, length)], length)
        return _finish(positive, negative, vae, given, batch_size)


class AllegroKeyframes(io.ComfyNode):
    """A clip with given frames anywhere."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="AllegroKeyframes",
            display_name="Allegro Keyframes",
            category="conditioning",
            description=("A clip that passes through pictures at any frames. Needs the image-to-video model (Allegro-TI2V), "
                         "which was trained with the first frame given and often the last; others work less well. " + _SIZES),
            search_aliases=["ti2v", "i2v", "keyframe", "interpolate images"],
            inputs=[
                *_prompt_inputs(),
                io.Image.Input("images", tooltip="The pictures, in the order of the positions; any size, one or a batch."),
                io.String.Input("positions", default="0, -1", tooltip=(
                    "The frame of each picture, separated by commas: 0 is the first, 1 the second; negative numbers count from "
                    "the end, -1 is the last. As many numbers as pictures.")),
                *clip_inputs(MIN_LENGTH, image_to_video=True),
                io.Image.Input("images_2", optional=True, tooltip="More pictures, behind those of images; of any size."),
                io.Image.Input("images_3", optional=True, tooltip="More pictures, behind those of images_2."),
                io.Image.Input("images_4", optional=True, tooltip="More pictures, behind those of images_3."),
                _fit_input(),
            ],
            outputs=_outputs(),
        )

    @classmethod
    def validate_inputs(cls, positions: str | None = None, width: int | None = None, height: int | None = None,
                        length: int | None = None, batch_size: int | None = None, fit: str | None = None) -> bool | str:
        """Before anything is loaded. An input that is linked is None here and checked in `execute`."""
        return _problem(width, height, length, batch_size, fit=fit, positions=positions)

    @classmethod
    def execute(cls, positive: list[Any], negative: list[Any], vae: Any, images: Any, positions: str, width: int, height: int,
                length: int, batch_size: int, fit: str, images_2: Any = None, images_3: Any = None,
                images_4: Any = None) -> io.NodeOutput:
        _check(width, height, length, batch_size, fit=fit, positions=positions)
        frames = to_frames([images, images_2, images_3, images_4], width, height, fit)
        given = GivenFrames.at(frames, parse_positions(positions), length)
        return _finish(positive, negative, vae, given, batch_size)


class AllegroContinueVideo(io.ComfyNode):
    """A clip that goes on from another, or leads to it."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="AllegroContinueVideo",
            display_name="Allegro Continue Video",
            category="conditioning",
            description=("A clip that begins with the last frames of another, or ends with its first; Allegro Join Videos "
                         "makes one of both. Needs the image-to-video model (Allegro-TI2V). " + _SIZES),
            search_aliases=["ti2v", "extend video", "long video", "continuation", "prepend"],
            inputs=[
                *_prompt_inputs(),
                io.Image.Input("images", tooltip="The frames of the clip to continue, in order; best of the new clip's size."),
                io.Int.Input("keep_frames", default=8, min=1, max=MAX_FRAMES - 1, step=1, tooltip=(
                    "How many frames of the clip are given, fewer than length. More keeps motion and looks better and leaves "
                    "fewer new frames: length less keep_frames. With samples a multiple of 4. Start with 8.")),
                io.Combo.Input("direction", options=list(DIRECTIONS), default="append", tooltip=(
                    "append: the new clip begins with the last frames of the given one. prepend: it ends with its first "
                    "frames.")),
                *clip_inputs(MIN_LENGTH, image_to_video=True),
                io.Latent.Input("samples", optional=True, tooltip=(
                    "The latents that the clip was decoded from. Those of the kept frames are carried over as they are, which "
                    "the sampler then does not change: less drift than through pixels.")),
                _fit_input(),
            ],
            outputs=_outputs(),
        )

    @classmethod
    def validate_inputs(cls, keep_frames: int | None = None, direction: str | None = None, width: int | None = None,
                        height: int | None = None, length: int | None = None, batch_size: int | None = None,
                        fit: str | None = None) -> bool | str:
        """Before anything is loaded. An input that is linked is None here and checked in `execute`."""
        return _problem(width, height, length, batch_size, fit=fit, keep_frames=keep_frames, direction=direction)

    @classmethod
    def execute(cls, positive: list[Any], negative: list[Any], vae: Any, images: Any, keep_frames: int, direction: str, width: int,
                height: int, length: int, batch_size: int, fit: str, samples: dict[str, Any] | None = None) -> io.NodeOutput:
        _check(width, height, length, batch_size, fit=fit, keep_frames=keep_frames, direction=direction)
        if len(images) < keep_frames:
            raise GeometryError(f"keep_frames={keep_frames}: the clip has {len(images)} frames. Keep at most {len(images)}.")
        at_end = direction == "prepend"
        kept = to_frames([images[:keep_frames] if at_end else images[-keep_frames:]], width, height, fit)
        given = (GivenFrames.end_of if at_end else GivenFrames.start_of)(kept, length)
        latent = latent_for(given, batch_size)
        if samples is not None:
            if keep_frames % TEMPORAL_FACTOR:
                raise GeometryError(f"keep_frames={keep_frames}: with samples it must be a multiple of {TEMPORAL_FACTOR}, the "
                                    "frames of a latent frame. Choose another number or disconnect samples.")
            latent = carry_latents(latent, samples["samples"], keep_frames // TEMPORAL_FACTOR, at_end=at_end)
        return io.NodeOutput(*set_given_frames(positive, negative, check_vae(vae), given), latent)


class AllegroJoinVideos(io.ComfyNode):
    """Two clips that share frames as one."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="AllegroJoinVideos",
            display_name="Allegro Join Videos",
            category="video",
            description=("Joins a clip and its continuation without a repeated frame: the frames that both hold are blended, "
                         "and the colours of one clip are matched to the other's over them. Works with any frames."),
            search_aliases=["concatenate videos", "long video", "append clip", "crossfade"],
            inputs=[
                io.Image.Input("first", tooltip="The frames of the earlier clip."),
                io.Image.Input("second", tooltip="The frames of the later clip, of the same size."),
                io.Int.Input("overlap", default=8, min=0, max=MAX_FRAMES, step=1, tooltip=(
                    "How many frames the end of the first and the beginning of the second have in common: keep_frames of "
                    "Allegro Continue Video. The result has that many frames fewer than both together. 0 puts one behind the "
                    "other.")),
                io.Combo.Input("match_colors", options=list(MATCHES), default="second to first", tooltip=(
                    "Whose mean and contrast of colour are changed over its whole length, so that none jumps. second to first: "
                    "after a continuation. first to second: after prepending. off: neither.")),
            ],
            outputs=[io.Image.Output(display_name="IMAGE", tooltip="The joined frames.")],
        )

    @classmethod
    def validate_inputs(cls, match_colors: str | None = None) -> bool | str:
        """Before anything runs; ComfyUI checks the range of `overlap`. A linked input is None here and checked in `execute`."""
        return True if match_colors in (None, *MATCHES) else _bad_choice("match_colors", match_colors, MATCHES)

    @classmethod
    def execute(cls, first: Any, second: Any, overlap: int, match_colors: str) -> io.NodeOutput:
        if match_colors not in MATCHES:
            raise GeometryError(_bad_choice("match_colors", match_colors, MATCHES))
        return io.NodeOutput(join_images(first, second, overlap, MATCHES[match_colors]))


def parse_positions(text: str) -> list[int]:
    """ "0, 24, -1" -> [0, 24, -1].

    Raises:
        GeometryError: something else than whole numbers, or none.
    """
    if len(text) > MAX_TEXT:
        raise GeometryError(f"positions has {len(text)} characters, expected at most {MAX_TEXT}.")
    positions = []
    for part in text.replace(",", " ").split():
        try:
            positions.append(int(part))
        except ValueError:
            raise GeometryError(f"positions={text!r}: {part!r} is not a whole number. Write the frame of each picture, "
                                "separated by commas, e.g. 0, 24, -1.") from None
    if not positions:
        raise GeometryError("positions is empty: write the frame of each picture, separated by commas, e.g. 0, 24, -1.")
    return positions


def _finish(positive: list[Any], negative: list[Any], vae: Any, given: GivenFrames, batch_size: int) -> io.NodeOutput:
    return io.NodeOutput(*set_given_frames(positive, negative, check_vae(vae), given), latent_for(given, batch_size))


def _check(width: int | None, height: int | None, length: int | None, batch_size: int | None, *, fit: str | None = None,
           positions: str | None = None, keep_frames: int | None = None, direction: str | None = None) -> None:
    """Raises on illegal values; None is not known yet."""
    check_clip(width, height, length, batch_size)
    if length is not None and length < MIN_LENGTH:
        raise GeometryError(f"length={length}: image to video needs at least {MIN_LENGTH} frames.")
    for name, choice, choices in (("fit", fit, FITS), ("direction", direction, DIRECTIONS)):
        if choice not in (None, *choices):
            raise GeometryError(_bad_choice(name, choice, choices))
    if positions is not None:
        parsed = parse_positions(positions)
        if length is not None:
            resolve_positions(parsed, length)
    if keep_frames is not None and not 1 <= keep_frames < (length or MAX_FRAMES):
        raise GeometryError(f"keep_frames={keep_frames}: must be at least 1 and less than length, {length or MAX_FRAMES}.")


def _bad_choice(name: str, choice: Any, choices: Any) -> str:
    return f"{name}={choice!r}: must be one of {', '.join(choices)}."


def _problem(*sizes: int | None, **values: Any) -> bool | str:
    """True, or what is wrong."""
    try:
        _check(*sizes, **values)
    except AllegroError as error:
        return str(error)
    return True
