"""Reaching positions between two frames with a model that knows the middle only: middles of middles."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import TypeVar

from torch import Tensor

from ..errors import InterpolationError

Features = TypeVar("Features")

# Each level adds the errors of one more interpolation.
MAX_LEVELS = 6


def halving_levels(position: Fraction | float) -> int | None:
    """How often a pair has to be halved to reach a position in (0, 1): 1 for 1/2, 2 for 3/4; None if it never is."""
    exact = Fraction(position)
    levels = exact.denominator.bit_length() - 1
    return levels if 0 < exact < 1 and exact.denominator == 2**levels and levels <= MAX_LEVELS else None


def by_halving(positions: Sequence[Fraction | float], first: Features, second: Features, *,
               middle: Callable[[Features, Features], Tensor], features: Callable[[Tensor], Features]) -> list[Tensor]:
    """The frames at several positions, every middle computed once.

    Args:
        positions: in (0, 1), fractions with a power of two below the line.
        first, second: features of the frames at 0 and 1.
        middle: the frame in the middle of two.
        features: what `middle` wants to know of a frame that it has made.
    Returns:
        one frame per position, in their order.
    Raises:
        InterpolationError: a position that halving does not reach.
    """
    wanted = [Fraction(p) for p in positions]
    for p in wanted:
        if halving_levels(p) is None:
            raise InterpolationError(
                f"position {float(p):g} between two frames: this model knows the middle only, which reaches 1/2, 1/4, "
                f"3/4, ..., {2**MAX_LEVELS - 1}/{2**MAX_LEVELS}. Choose a multiplier of 2, 4, 8, ..., or a model "
                "for arbitrary positions (_t).")
    found: dict[Fraction, Tensor] = {}

    def fill(low: Fraction, high: Fraction, left: Features, right: Features) -> None:
        mid = (low + high) / 2
        frame = found[mid] = middle(left, right)
        before, after = any(low < p < mid for p in wanted), any(mid < p < high for p in wanted)
        if before or after:
            known = features(frame)
            if before:
                fill(low, mid, left, known)
            if after:
                fill(mid, high, known, right)

    if wanted:
        fill(Fraction(0), Fraction(1), first, second)
    return [found[p] for p in wanted]
