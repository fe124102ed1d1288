"""Training objectives of the family: noise prediction for the DiT, reconstruction for the VAE.

The noise schedule is the reference's, ``sampling.schedule.alphas_cumprod``.
Shapes: latents and noise ``[B, 4, t, h, w]``, timesteps ``[B]`` in 0..999, frames ``[B, 3, T, H, W]`` in [-1, 1].
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def _broadcast(values: Tensor, like: Tensor) -> Tensor:
    """Give ``values [B]`` the trailing axes of ``like``."""
    return values.reshape(-1, *[1] * (like.ndim - 1))


def add_noise(latents: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """Return ``sqrt(alpha_bar) latents + sqrt(1 - alpha_bar) noise``.

    Args:
        latents: normalised latents ``[B, 4, t, h, w]``.
        noise: the same shape.
        alpha_bar: ``[B]`` in (0, 1).
    """
    kept = _broadcast(alpha_bar, latents)
    return kept.sqrt() * latents + (1.0 - kept).sqrt() * noise


def offset_noise(shape: torch.Size | tuple[int, ...], offset: float, generator: torch.Generator) -> Tensor:
    """Draw unit noise plus ``offset`` times one constant per sample and channel.

    Args:
        shape: ``[B, C, t, h, w]``.
        offset: 0.02 in the reference training, 0 for plain noise.
        generator: CPU generator.
    """
    noise = torch.randn(shape, generator=generator)
    if offset:
        noise = noise + offset * torch.randn((*shape[:2], *[1] * (len(shape) - 2)), generator=generator)
    return noise


def min_snr_weight(alpha_bar: Tensor, gamma: float) -> Tensor:
    """Return ``min(snr, gamma) / snr`` with ``snr = alpha_bar / (1 - alpha_bar)``, shape ``[B]``."""
    snr = alpha_bar / (1.0 - alpha_bar)
    return snr.clamp(max=gamma) / snr


def velocity_weight(alpha_bar: Tensor, cap: float) -> Tensor:
    """Return ``min(1 / alpha_bar, cap)``, shape ``[B]``.

    An error of eps divided by ``sqrt(alpha_bar)`` is the error of v: the weight makes a prompt count at the high
    noise levels where only the prompt says what the clip shows. The cap bounds it where almost no signal is left.
    """
    return (1.0 / alpha_bar).clamp(max=cap)


def eps_loss(prediction: Tensor, noise: Tensor, *, sample_weight: Tensor | None = None,
             cell_weight: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
    """Return the mean squared error of predicted noise in float32.

    Args:
        prediction: eps ``[B, 4, t, h, w]``.
        noise: what was added, same shape.
        sample_weight: ``[B]``, for instance ``min_snr_weight``; default 1.
        cell_weight: broadcastable to the latents, for instance ``object_weight``; default 1.
        mask: broadcastable to the latents, 1 for positions that count; the mean is taken over them. Default all.
    """
    error = (prediction.float() - noise.float()) ** 2
    if cell_weight is not None:
        error = error * cell_weight
    if sample_weight is not None:
        error = error * _broadcast(sample_weight, error)
    if mask is None:
        return error.mean()
    mask = mask.to(error).expand_as(error)
    return (error * mask).sum() / mask.sum().clamp(min=1.0)


def object_weight(latents: Tensor, *, distance: float = 0.6, extra: float = 4.0) -> Tensor:
    """Return ``[B, 1, t, h, w]`` weights with mean 1 that count cells near an object ``1 + extra`` times.

    An object is where the latent is farther than ``distance`` from the clip's median latent, grown by one cell.

    Args:
        latents: normalised latents ``[B, 4, t, h, w]``.
        distance: Euclidean over the channels.
        extra: additional weight of the object.
    """
    median = latents.flatten(2).median(dim=2).values[:, :, None, None, None]
    far = ((latents - median).square().sum(1, keepdim=True).sqrt() > distance).to(latents.dtype)
    grown = torch.nn.functional.max_pool3d(far, 3, stride=1, padding=1)
    weight = 1.0 + extra * grown
    return weight / weight.mean(dim=(1, 2, 3, 4), keepdim=True)


def given_frames(mask: Tensor) -> Tensor:
    """Return ``[B, 1, t, 1, 1]``, 1 for latent frames in which a picture is given.

    Args:
        mask: ``[B, 4, t]``, 0 = given; channel c of latent frame j belongs to pixel frame ``c t + j``.
    """
    groups, length = mask.shape[1:]
    pixels = mask.flatten(1).unflatten(1, (length, groups))  # latent frame j holds pixel frames 4 j .. 4 j + 3
    return 1.0 - pixels.amin(dim=2)[:, None, :, None, None]


def given_weight(given: Tensor, *, extra: float = 8.0) -> Tensor:
    """Return ``[B, 1, t, 1, 1]`` weights with mean 1 that count given latent frames ``1 + extra`` times.

    Their neighbours count ``1 + extra / 2`` times: the decoder of the VAE mixes them into the given frame.

    Args:
        given: of ``given_frames``.
        extra: additional weight of given frames, which must come back exactly.
    """
    near = torch.nn.functional.max_pool3d(given, (3, 1, 1), stride=1, padding=(1, 0, 0))
    weight = 1.0 + extra * 0.5 * (given + near)
    return weight / weight.mean(dim=2, keepdim=True)


def kl_to_standard_normal(mean: Tensor, logvar: Tensor) -> Tensor:
    """Return the KL divergence of N(mean, exp(logvar)) from N(0, 1), averaged over all elements."""
    return 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).mean()


def vae_loss(reconstruction: Tensor, frames: Tensor, mean: Tensor, logvar: Tensor, *, kl_weight: float = 5e-4,
             mse_weight: float = 0.0, lpips: Callable[[Tensor, Tensor], Tensor] | None = None,
             lpips_weight: float = 0.1) -> Tensor:
    """Return L1 + ``mse_weight`` MSE + ``kl_weight`` KL (+ ``lpips_weight`` LPIPS), every term a mean.

    Args:
        reconstruction: decoded frames ``[B, 3, T, H, W]``.
        frames: the originals in [-1, 1].
        mean: posterior means ``[B, 4, t, h, w]``.
        logvar: posterior log variances.
        kl_weight: weight of the KL term.
        mse_weight: weight of the squared error; 0 in the reference.
        lpips: perceptual distance of two image batches ``[B * T, 3, H, W]`` in [-1, 1]; none by default.
        lpips_weight: 0.1 in the reference.
    """
    difference = reconstruction.float() - frames
    loss = difference.abs().mean() + kl_weight * kl_to_standard_normal(mean.float(), logvar.float())
    if mse_weight:
        loss = loss + mse_weight * difference.square().mean()
    if lpips is not None:
        images = [clip.transpose(1, 2).flatten(0, 1) for clip in (reconstruction.float(), frames)]
        loss = loss + lpips_weight * lpips(images[0], images[1]).mean()
    return loss


def drop_captions(captions: list[str], probability: float, replacement: str, generator: torch.Generator) -> list[str]:
    """Replace each caption by ``replacement`` with the given probability, for classifier-free guidance."""
    dropped = torch.rand(len(captions), generator=generator) < probability
    return [replacement if drop else caption for caption, drop in zip(captions, dropped.tolist(), strict=True)]


def laplacian_loss(prediction: Tensor, target: Tensor, levels: int = 4, *, softness: float = 0.01) -> Tensor:
    """Return the mean absolute error of every level of the Laplacian pyramid, added up.

    Each level counts what is lost by halving, the last one what is left. Coarse levels see a shape that is in the
    wrong place come nearer, where the plain error does not. EMA-VFI trains with the same idea. Drawn backgrounds are
    exact from the start, so that the sharp minimum of a plain absolute value would keep every correction at zero.

    Args:
        prediction: ``[B, 3, H, W]``.
        target: the same shape.
        levels: halvings.
        softness: errors below it count by their square.
    """
    def size(error: Tensor) -> Tensor:
        return ((error.square() + softness**2).sqrt() - softness).mean()

    left, total = prediction - target, prediction.new_zeros(())  # the pyramid is linear
    for _ in range(levels):
        half = torch.nn.functional.avg_pool2d(left, 2)
        total = total + size(left - torch.nn.functional.interpolate(half, size=left.shape[2:], mode="bilinear"))
        left = half
    return total + size(left)


def vfi_loss(prediction: Tensor, merged: Tensor, target: Tensor, *, merged_weight: float = 0.5) -> Tensor:
    """Return the Laplacian loss of an interpolated frame, and of the merged warped frames it was refined from.

    Args:
        prediction: ``[B, 3, H, W]`` in [0, 1].
        merged: the same frame before refinement; it alone teaches the flow.
        target: the frame between.
        merged_weight: of the second term, 0.5 in the paper's code.
    """
    return laplacian_loss(prediction, target) + merged_weight * laplacian_loss(merged, target)
