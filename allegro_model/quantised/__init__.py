"""Matrices that are kept in few bits: how their bytes are laid out, and layers that compute with them."""

from .layers import (
    QuantisedEmbedding,
    QuantisedLayer,
    QuantisedLinear,
    can_stay_packed,
    install,
    stack_low_rank,
    weight_shapes,
)
from .layouts import BY_GGML_TYPE, BY_NAME, Layout, unpack

__all__ = [
    "BY_GGML_TYPE",
    "BY_NAME",
    "Layout",
    "QuantisedEmbedding",
    "QuantisedLayer",
    "QuantisedLinear",
    "can_stay_packed",
    "install",
    "stack_low_rank",
    "unpack",
    "weight_shapes",
]
