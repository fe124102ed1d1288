"""First stages: the VideoVAE on crops of procedural clips, then its decoder alone on whole clips."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ..vae import VideoVAE
from .data import make_clip
from .distributed import Workers
from .initialise import initialise_vae
from .loop import Loop, mixed_precision
from .losses import vae_loss
from .recipe import CANVAS, TINY_VAE, Recipe

_INPUT_NOISE = 0.02  # a perfectly flat region has no variance, and gradients through stacked norms explode
_BLANK_SHARE = 0.05  # clips with blank frames after the first, as image-to-video feeds them
_NEAR_OBJECT = 0.85


def to_tensor(frames: np.ndarray) -> Tensor:
    """uint8 ``[T, H, W, 3]`` -> float32 ``[3, T, H, W]`` in [-1, 1]."""
    return torch.from_numpy(frames).permute(3, 0, 1, 2).float() / 127.5 - 1.0


def crop_clip(frames: np.ndarray, size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Cut ``(frames, edge)`` out of ``[T, H, W, 3]``, mostly around a pixel that differs from the clip's median."""
    length, edge = size
    total, height, width, _ = frames.shape
    first = int(rng.integers(total - length + 1))
    part = frames[first : first + length]
    y, x = int(rng.integers(height)), int(rng.integers(width))
    if rng.random() < _NEAR_OBJECT:
        still = part[int(rng.integers(length))].astype(np.int16)
        rows, columns = np.nonzero(np.abs(still - np.median(still, axis=(0, 1))).sum(-1) > 90)
        if len(rows):
            index = int(rng.integers(len(rows)))
            y, x = int(rows[index]), int(columns[index])
    top = min(max(0, y - edge // 2), height - edge)
    left = min(max(0, x - edge // 2), width - edge)
    return part[:, top : top + edge, left : left + edge]


def _batch(count: int, crop: tuple[int, int] | None, rng: np.random.Generator) -> Tensor:
    """Draw ``count`` training clips, ``[B, 3, T, H, W]``; whole clips without ``crop``."""
    clips = []
    for _ in range(count):
        frames = make_clip(int(rng.integers(2**40)), CANVAS).frames
        part = frames if crop is None else crop_clip(frames, crop, rng)
        clip = to_tensor(np.ascontiguousarray(part))
        if rng.random() < _BLANK_SHARE:
            clip[:, 1:] = 0.0
        clips.append(clip)
    return torch.stack(clips)


class _Autoencoder:
    """Loss of one step of the VAE stages."""

    def __init__(self, vae: VideoVAE, recipe: Recipe, *, decoder_only: bool) -> None:
        self.vae, self.recipe, self.decoder_only = vae, recipe, decoder_only

    def _moments(self, frames: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        noisy = frames + _INPUT_NOISE * torch.randn(frames.shape, generator=generator)
        moments = per_frame(self.vae.quant_conv, self.vae.encode_tile(noisy))
        mean, logvar = moments.float().chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)

    def __call__(self, step: int, generator: torch.Generator) -> Tensor:
        rng = np.random.default_rng(int(torch.randint(2**62, (1,), generator=generator)))
        whole = self.decoder_only or step >= self.recipe.vae.steps * (1 - self.recipe.vae_full_share)
        frames = _batch(1, None, rng) if whole else _batch(self.recipe.vae_batch, self.recipe.vae_crop, rng)
        with mixed_precision():
            with torch.set_grad_enabled(not self.decoder_only):
                mean, logvar = self._moments(frames, generator)
            latents = mean + (0.5 * logvar).exp() * torch.randn(mean.shape, generator=generator)
            decoded = self.vae.decode_tile(per_frame(self.vae.post_quant_conv, latents))
        return vae_loss(decoded, frames, mean, logvar, mse_weight=2.0)


def per_frame(layer: nn.Module, latents: Tensor) -> Tensor:
    """Apply a 2-D layer to every frame of ``[B, C, t, h, w]``."""
    out = layer(latents.transpose(1, 2).flatten(0, 1))
    return out.unflatten(0, (latents.shape[0], latents.shape[2])).transpose(1, 2)


def psnr(vae: VideoVAE, seeds: range) -> float:
    """Return the mean PSNR in dB of reconstructed whole clips."""
    values = []
    for seed in seeds:
        frames = to_tensor(make_clip(seed, CANVAS).frames)[None]
        with torch.no_grad(), mixed_precision():
            mean = per_frame(vae.quant_conv, vae.encode_tile(frames))[:, : TINY_VAE.latent_channels]
            decoded = vae.decode_tile(per_frame(vae.post_quant_conv, mean)).float().clamp(-1, 1)
        values.append(float(-10 * torch.log10((decoded - frames).square().mean() / 4)))
    return float(np.mean(values))


def train_vae(workers: Workers, recipe: Recipe, folder: Path) -> None:
    """Train encoder and decoder together; writes ``vae.pt``."""
    torch.manual_seed(recipe.seed)
    vae = VideoVAE(TINY_VAE)
    initialise_vae(vae)
    Loop({"vae": vae}, recipe.vae, workers, folder / "vae.pt").run(_Autoencoder(vae, recipe, decoder_only=False))


def load_averaged(module: nn.Module, path: Path, name: str) -> None:
    """Load the averaged weights of module ``name`` out of a checkpoint."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    module.load_state_dict(state["ema"][name])


def train_decoder(workers: Workers, recipe: Recipe, folder: Path) -> None:
    """Go on with the decoder alone, on whole clips; starts from ``vae.pt`` and writes ``decoder.pt``."""
    vae = VideoVAE(TINY_VAE)
    load_averaged(vae, folder / "vae.pt", "vae")
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)
    Loop({"vae": vae}, recipe.decoder, workers, folder / "decoder.pt").run(
        _Autoencoder(vae, recipe, decoder_only=True))
