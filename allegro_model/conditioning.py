"""Given frames -> the condition of the image-to-video model.

    given = GivenFrames.at(frames, positions, num_frames)        # which picture belongs where
    mean, logvar = vae.encode(given.canvas())                    # grey wherever nothing is given
    condition = build_condition(normalise(mean, ...), given)     # [1, 8, t, h, w], joined to the noisy latents

Frames are [N, 3, H, W] in [-1, 1] here; `fit_images` makes them from pictures of any size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import GeometryError
from .geometry import LATENT_CHANNELS, TEMPORAL_FACTOR

FITS = ("crop", "pad", "stretch")


def fit_images(images: Tensor, width: int, height: int, fit: str = "crop") -> Tensor:
    """Pictures of any size -> frames of the clip's size.

    Args:
        images: [N, C, h, w] in [0, 1]; C = 1 is grey, 3 RGB; of 2 or 4 the last is alpha, laid over black.
        width, height: of the clip, pixels.
        fit: "crop" cuts to the clip's aspect at the centre, as the reference does; "pad" keeps the whole
            picture on a grey ground, which is what the model sees where nothing is given; "stretch" changes
            the aspect.
    Returns:
        [N, 3, height, width] float32 in [-1, 1].
    Raises:
        GeometryError: another number of dimensions or channels, an empty picture, whole numbers, an unknown `fit`.
    """
    if fit not in FITS:
        raise GeometryError(f"fit={fit!r}: must be one of {', '.join(FITS)}.")
    if images.ndim != 4 or not 1 <= images.shape[1] <= 4 or 0 in images.shape:
        raise GeometryError(f"images of shape {list(images.shape)}: expected [N, 1 to 4 channels, height, width].")
    if not images.is_floating_point():
        raise GeometryError(f"images of {images.dtype}: expected numbers from 0 to 1. Divide whole ones by 255.")
    rgb = _to_rgb(images.float())
    if fit == "crop":
        rgb = _centre_crop(rgb, height / width)
    if fit == "pad":
        return _pad(rgb, width, height)
    return _resize(rgb, width, height) * 2 - 1


def _to_rgb(images: Tensor) -> Tensor:
    if images.shape[1] in (2, 4):
        images = images[:, :-1] * images[:, -1:]
    return images.expand(-1, 3, -1, -1)


def _centre_crop(images: Tensor, ratio: float) -> Tensor:
    """Cuts to height / width = `ratio`. Offsets are rounded half to even, as the reference rounds."""
    full_height, full_width = images.shape[-2:]
    height, width = full_height, full_width
    if full_height / full_width > ratio:
        height = max(1, int(full_width * ratio))
    else:
        width = max(1, int(full_height / ratio))
    top, left = round((full_height - height) / 2), round((full_width - width) / 2)
    return images[..., top : top + height, left : left + width]


def _pad(images: Tensor, width: int, height: int) -> Tensor:
    full_height, full_width = images.shape[-2:]
    scale = min(width / full_width, height / full_height)
    inner_width, inner_height = (max(1, round(n * scale)) for n in (full_width, full_height))
    frames = images.new_zeros((len(images), 3, height, width))
    top, left = (height - inner_height) // 2, (width - inner_width) // 2
    frames[..., top : top + inner_height, left : left + inner_width] = _resize(images, inner_width, inner_height) * 2 - 1
    return frames


def _resize(images: Tensor, width: int, height: int) -> Tensor:
    """Bilinear with anti-aliasing and aligned corners, both: that is what the reference asks torch for."""
    if images.shape[-2:] == (height, width):
        return images
    return F.interpolate(images, (height, width), mode="bilinear", align_corners=True, antialias=True).clamp(0, 1)


@dataclass(frozen=True)
class GivenFrames:
    """Frames of a clip that are given; the others are to be made.

    Attributes:
        frames: [N, 3, H, W] in [-1, 1], N may be 0.
        positions: frame indices, one per frame, distinct, 0 .. num_frames - 1.
        num_frames: of the clip, a multiple of 4, at least 8.
    """

    frames: Tensor
    positions: tuple[int, ...]
    num_frames: int

    @classmethod
    def at(cls, frames: Tensor, positions: Sequence[int], num_frames: int) -> GivenFrames:
        """Frames at any positions; negative ones count from the end.

        Raises:
            GeometryError: not one position per frame, a position outside the clip or given twice, a clip of a
                length that the model cannot make.
        """
        if num_frames < 2 * TEMPORAL_FACTOR or num_frames % TEMPORAL_FACTOR:
            raise GeometryError(f"num_frames={num_frames}: image to video needs a multiple of {TEMPORAL_FACTOR}, "
                                f"at least {2 * TEMPORAL_FACTOR}.")
        if len(frames) != len(positions):
            raise GeometryError(f"{len(frames)} images and {len(positions)} positions ({list(positions)}): expected one "
                                "position per image.")
        return cls(frames, resolve_positions(positions, num_frames), num_frames)

    @classmethod
    def fitted(cls, images: Mapping[int, Tensor], width: int, height: int, num_frames: int, *,
               fit: str = "crop") -> GivenFrames:
        """Pictures of any sizes at any positions.

        Args:
            images: position -> [C, h, w] in [0, 1]; see `fit_images`. Empty when nothing is given.
            width, height, num_frames: of the clip.
            fit: "crop", "pad" or "stretch".
        Raises:
            GeometryError: as in `at` and `fit_images`.
        """
        frames = [fit_images(image[None], width, height, fit) for image in images.values()]
        return cls.at(torch.cat(frames) if frames else torch.zeros(0, 3, height, width), list(images), num_frames)

    @classmethod
    def start_of(cls, frames: Tensor, num_frames: int) -> GivenFrames:
        """The clip begins with `frames`; to go on from a clip, give its last frames."""
        return cls.at(frames, range(len(frames)), num_frames)

    @classmethod
    def end_of(cls, frames: Tensor, num_frames: int) -> GivenFrames:
        """The clip ends with `frames`; to put something in front of a clip, give its first frames."""
        return cls.at(frames, range(num_frames - len(frames), num_frames), num_frames)

    @classmethod
    def loop(cls, frame: Tensor, num_frames: int) -> GivenFrames:
        """The clip begins and ends with the one `frame` [1, 3, H, W]."""
        return cls.at(frame.expand(2, -1, -1, -1), (0, -1), num_frames)

    def canvas(self) -> Tensor:
        """[1, 3, T, H, W]: the given frames in their places, mid grey (0) elsewhere; what the VAE encodes."""
        clip = self.frames.new_zeros((1, 3, self.num_frames, *self.frames.shape[-2:]))
        if self.positions:
            clip[0, :, list(self.positions)] = self.frames.transpose(0, 1)
        return clip

    def latent_mask(self, height: int, width: int) -> Tensor:
        """The mask at the latents' size.

        Channel c of latent frame j belongs to pixel frame c * (T / 4) + j. That is not a grouping of
        neighbours, but what the model was trained with.

        Args:
            height, width: of the latents, cells.
        Returns:
            [1, 4, T / 4, height, width] float32, 0 = given, 1 = to be made.
        """
        mask = torch.ones(self.num_frames)
        mask[list(self.positions)] = 0
        mask = mask.view(1, TEMPORAL_FACTOR, self.num_frames // TEMPORAL_FACTOR, 1, 1)
        return mask.expand(-1, -1, -1, height, width).contiguous()


def resolve_positions(positions: Sequence[int], num_frames: int) -> tuple[int, ...]:
    """Counts negative positions from the end: -1 is the last frame.

    Raises:
        GeometryError: a position outside the clip, or two for one frame.
    """
    resolved: list[int] = []
    for position in positions:
        if not -num_frames <= position < num_frames:
            raise GeometryError(f"position {position}: the clip has {num_frames} frames, positions 0 to {num_frames - 1}, or "
                                f"-{num_frames} to -1 from its end.")
        frame = position % num_frames
        if frame in resolved:
            raise GeometryError(f"positions {list(positions)}: frame {frame} is given twice. Remove one of the images.")
        resolved.append(frame)
    return tuple(resolved)


def build_condition(masked_latents: Tensor, given: GivenFrames) -> Tensor:
    """Joins the latents of the canvas and the mask, as `AllegroTI2V` takes them behind the noisy latents.

    Args:
        masked_latents: [B, 4, t, h, w], the encoded `canvas`, normalised; the posterior's mean, or a sample of it
            as the reference takes (`sample_posterior`).
        given: what is encoded in them.
    Returns:
        [B, 8, t, h, w].
    """
    batch, channels, frames, height, width = masked_latents.shape
    if channels != LATENT_CHANNELS or frames * TEMPORAL_FACTOR != given.num_frames:
        raise GeometryError(f"latents of shape {list(masked_latents.shape)} for a clip of {given.num_frames} frames: expected "
                            f"[B, {LATENT_CHANNELS}, {given.num_frames // TEMPORAL_FACTOR}, h, w].")
    mask = given.latent_mask(height, width).to(masked_latents)
    return torch.cat((masked_latents, mask.expand(batch, -1, -1, -1, -1)), dim=1)


def sample_posterior(mean: Tensor, logvar: Tensor, noise: Tensor) -> Tensor:
    """mean + standard deviation * noise, all [B, 4, t, h, w]."""
    return mean + torch.exp(0.5 * logvar) * noise
