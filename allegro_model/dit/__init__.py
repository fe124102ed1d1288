"""The diffusion transformer: predicts the noise in a video latent from the latent, the time and the prompt."""

from .model import AllegroDiT, Prepared

__all__ = ["AllegroDiT", "Prepared"]
