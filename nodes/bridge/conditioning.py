"""Given frames as ComfyUI's own kind of conditioning, and what the image-to-video model makes of it.

A conditioning node sets two values on positive and negative, which ComfyUI's samplers hand to the model:

    concat_latent_image  [1, 4, t, h, w]  raw latents of the video in which only the given frames are not grey
    concat_mask          [1, 4, t, h, w]  0 = given, 1 = to be made; channel c of latent frame j: frame 4 * j + c

The mask is in order of time here, as for ComfyUI's own video models, so that context windows cut it where they cut the
latents. The network wants the order of its training; `in_training_order` brings it there at the last moment.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import comfy.model_management
import comfy.utils
import node_helpers
import torch
from torch import Tensor

from ...allegro_model.conditioning import GivenFrames, fit_images
from ...allegro_model.errors import GeometryError
from ...allegro_model.geometry import LATENT_CHANNELS, TEMPORAL_FACTOR
from ...allegro_model.joining import Adjust, check_joinable, join_streams
from .latents import empty_latent
from .sampling import check_latents

Conditioning = list[Any]
Latent = dict[str, Any]
_JOINED_AT_ONCE = 16  # frames


# Nodes


def to_frames(images: Sequence[Tensor | None], width: int, height: int, fit: str) -> Tensor:
    """IMAGE inputs, each of its own size, as frames of the clip.

    Args:
        images: [n, h, w, channels] in [0, 1]; None is an input that nothing is connected to.
        width, height, fit: as in `fit_images`.
    Returns:
        [N, 3, height, width] in [-1, 1], where ComfyUI keeps what nodes make: pictures may come from several devices.
    Raises:
        GeometryError: as in `fit_images`.
    """
    device = comfy.model_management.intermediate_device()
    frames = [fit_images(batch.to(device).movedim(-1, 1), width, height, fit) for batch in images if batch is not None]
    return torch.cat(frames) if frames else torch.zeros((0, 3, height, width), device=device)


def join_images(first: Tensor, second: Tensor, overlap: int, adjust: Adjust) -> Tensor:
    """`join_clips` for IMAGE, a few frames at a time: of a long clip there is room for the result, hardly for copies.

    Args:
        first, second: [n, h, w, channels] in [0, 1], of one size; not changed.
        overlap, adjust: as in `join_clips`.
    Returns:
        [n1 + n2 - overlap, h, w, 3] in [0, 1].
    Raises:
        GeometryError: as in `join_clips`.
    """
    check_joinable(overlap, *(torch.empty((3, *clip.shape[:3]), device="meta") for clip in (first, second)))

    def pieces(clip: Tensor) -> Iterator[Tensor]:
        for part in clip.split(_JOINED_AT_ONCE):
            yield to_frames([part], clip.shape[2], clip.shape[1], "stretch").movedim(1, 0)

    count, height, width = len(first) + len(second) - overlap, *first.shape[1:3]
    joined = torch.empty((count, height, width, 3), device=comfy.model_management.intermediate_device())
    position = 0
    for part in join_streams(pieces(first), pieces(second), overlap, adjust=adjust):  # [3, n, h, w] in [-1, 1]
        place = joined[position : position + part.shape[1]]
        position += len(place)
        torch.add(part.movedim(0, -1) * 0.5, 0.5, out=place)
    return joined


def set_given_frames(positive: Conditioning, negative: Conditioning, vae: Any, given: GivenFrames) -> list[Conditioning]:
    """New conditioning that also holds the given frames.

    They are encoded to the mean of the VAE's posterior, the same in every run. The reference draws a sample of it; the
    released VAE's standard deviation is so small that the difference cannot be seen.

    Args:
        positive, negative: not changed.
        vae: of Load Allegro VAE.
        given: the frames.
    Returns:
        positive and negative.
    """
    latents = vae.encode_frames(given.canvas())  # [1, 4, t, h, w]
    mask = in_time_order(given.latent_mask(*latents.shape[-2:])).to(latents)
    values = {"concat_latent_image": latents, "concat_mask": mask}
    return [node_helpers.conditioning_set_values(side, values) for side in (positive, negative)]


def latent_for(given: GivenFrames, batch_size: int) -> Latent:
    """The empty latent of the clip."""
    height, width = given.frames.shape[-2:]
    return empty_latent(width, height, given.num_frames, batch_size)


def carry_latents(latent: Latent, samples: Tensor, count: int, *, at_end: bool) -> Latent:
    """A latent that begins (or ends) with latents of another clip, and a mask that keeps a sampler from changing them.

    Args:
        latent: empty.
        samples: [1, 4, t, h, w] of the other clip: its last `count` latent frames become the first, or the reverse.
        count: latent frames.
        at_end: they become the last of the new clip instead.
    Raises:
        GeometryError: latents of another size, several clips, or fewer frames than are to be kept.
    """
    check_latents(samples)
    shape = latent["samples"].shape
    if len(samples) != 1 or samples.shape[-2:] != shape[-2:] or samples.shape[2] < count:
        raise GeometryError(f"samples of shape {list(samples.shape)}: expected the latents of the clip, [1, {shape[1]}, at "
                            f"least {count}, {shape[3]}, {shape[4]}]. Connect what was decoded to the clip, with the same "
                            "width and height, or nothing.")
    carried = latent["samples"].clone()
    mask = carried.new_ones((1, 1, *shape[2:]))
    place, source = (slice(-count, None), slice(0, count)) if at_end else (slice(0, count), slice(-count, None))
    carried[:, :, place] = samples[:, :, source].to(carried)
    mask[:, :, place] = 0
    return {**latent, "samples": carried, "noise_mask": mask}


# The model


def in_training_order(mask: Tensor) -> Tensor:
    """Mask [B, 4, t, h, w] in order of time -> channel c of latent frame j: frame c * t + j."""
    return mask.transpose(1, 2).flatten(1, 2).unflatten(1, mask.shape[1:3])


def in_time_order(mask: Tensor) -> Tensor:
    """Mask [B, 4, t, h, w] as trained -> channel c of latent frame j: frame 4 * j + c."""
    return mask.flatten(1, 2).unflatten(1, (mask.shape[2], mask.shape[1])).transpose(1, 2)


def has_given_frames(values: Mapping[str, Any]) -> bool:
    """True if a conditioning holds frames that the model is to keep."""
    mask = values.get("concat_mask")
    return values.get("concat_latent_image") is not None and mask is not None and bool((mask < 0.5).any())


def concat_condition(values: Mapping[str, Any], noise: Tensor, scale: Callable[[Tensor], Tensor]) -> Tensor:
    """What joins the noisy latents on the way into the network.

    Args:
        values: of the conditioning.
        noise: [B, 4, t, h, w], for size and device.
        scale: raw latents -> latents of unit variance.
    Returns:
        [1 or B, 8, t, h, w] float32; without given frames zeros and a mask of ones.
    Raises:
        GeometryError: the given frames are for a clip of another length, or for another model.
    """
    image, mask = values.get("concat_latent_image"), values.get("concat_mask")
    if image is None:
        empty = torch.zeros_like(noise[:1], dtype=torch.float32)
        return torch.cat((empty, torch.ones_like(empty)), dim=1)
    mask = torch.ones_like(image[:, :1]) if mask is None else mask
    _check_given(image, mask)
    mask = mask.expand(-1, LATENT_CHANNELS, -1, -1, -1)
    size, wanted = image.shape[2:], noise.shape[2:]
    if size[0] != wanted[0]:
        raise GeometryError(f"the given frames are for a clip of {TEMPORAL_FACTOR * size[0]} frames, the latent has "
                            f"{TEMPORAL_FACTOR * wanted[0]}. Connect the latent output of the node that takes the pictures.")
    video, mask = scale(image.to(noise.device, torch.float32)), mask.to(noise.device, torch.float32)
    if size != wanted:  # a second pass over an enlarged latent
        video, mask = (comfy.utils.common_upscale(part, wanted[2], wanted[1], method, "disabled")
                       for part, method in ((video, "bilinear"), (mask, "nearest-exact")))
    return torch.cat((video, mask), dim=1)


def _check_given(image: Tensor, mask: Tensor) -> None:
    """Nodes for other models set the same values, in forms of their own."""
    fits = image.ndim == mask.ndim == 5 and image.shape[1] == LATENT_CHANNELS and mask.shape[1] in (1, LATENT_CHANNELS)
    if not fits or image.shape[2:] != mask.shape[2:]:
        raise GeometryError(f"the conditioning holds given frames of shape {list(image.shape)} with a mask {list(mask.shape)}, "
                            f"expected [1, {LATENT_CHANNELS}, t, h, w] for both: it was made for another model. Connect Allegro "
                            "Image to Video, Allegro Keyframes or Allegro Continue Video.")
