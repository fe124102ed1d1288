"""Raw latents <-> normalised latents: the only home of the scale factor.

Raw latents leave the VAE and travel between programs and files; normalised latents have about unit
variance and exist only inside sampling. Released models: scale_factor 0.13235, no shift.
"""

from torch import Tensor


def normalise(latents: Tensor, scale_factor: float) -> Tensor:
    """Raw latents [B, C, t, h, w] -> normalised ones of the same shape."""
    return latents * scale_factor


def denormalise(latents: Tensor, scale_factor: float) -> Tensor:
    """Normalised latents [B, C, t, h, w] -> raw ones of the same shape."""
    return latents / scale_factor
