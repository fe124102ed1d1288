"""Seconds of the transformer as a function of its tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def fit_seconds(tokens: Sequence[int], seconds: Sequence[float]) -> tuple[float, float]:
    """(b, c) of b N + c N^2, linear parts and self-attention, with the least relative error.

    What does not depend on N is left out: it is some microseconds for each layer.

    Args:
        tokens: N of at least two measurements.
        seconds: of each.
    """
    n, s = (np.asarray(values, dtype=np.float64) for values in (tokens, seconds))
    b, c = np.linalg.lstsq(np.stack((n / s, n * n / s), axis=1), np.ones(len(n)), rcond=None)[0]
    return float(b), float(c)
