"""The video transformer."""

from .model import AllegroDiT, Prepared
from .ti2v import AllegroTI2V

__all__ = ["AllegroDiT", "AllegroTI2V", "Prepared"]
