"""Where the frames of an interpolated clip lie between those of its source. Exact arithmetic: nothing drifts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

from ..errors import InterpolationError
from .halving import halving_levels

# Positions that halving does not reach are moved to the nearest eighth, at most a sixteenth away.
_NEAREST = 8
_MAX_DENOMINATOR = 100_000  # 30000/1001 and its kind are exact
_ABBREVIATED = 0.0005  # 119.88 is that close to 120000/1001
MAX_MULTIPLIER = 64


@dataclass(frozen=True)
class FrameTimes:
    """Frame i of the result lies at `i * step` in the source, counted in source frames.

    Attributes:
        step: source frames per frame of the result.
        hold_last: show the last source frame as long as the others, so that the clip keeps its duration; else the
            result ends with it.
    """

    step: Fraction
    hold_last: bool = False

    @classmethod
    def multiplied(cls, multiplier: int, *, hold_last: bool = False) -> FrameTimes:
        """`multiplier` frames for each: (n - 1) * multiplier + 1 of n, or n * multiplier with `hold_last`.

        Raises:
            InterpolationError: not from 2 to 64.
        """
        if isinstance(multiplier, bool) or not isinstance(multiplier, int) or not 2 <= multiplier <= MAX_MULTIPLIER:
            raise InterpolationError(f"multiplier={multiplier!r}: must be a whole number from 2 to {MAX_MULTIPLIER}.")
        return cls(Fraction(1, multiplier), hold_last)

    @classmethod
    def between_rates(cls, source_fps: float | Fraction, target_fps: float | Fraction, *,
                      hold_last: bool = False) -> FrameTimes:
        """From one rate to another, e.g. 15 to 24, 30 or 60; also down.

        Raises:
            InterpolationError: a rate that is not above 0, or a target above 64 times the source.
        """
        rates = []
        for name, fps in (("source_fps", source_fps), ("target_fps", target_fps)):
            if not math.isfinite(fps) or not _rate(fps) > 0:
                raise InterpolationError(f"{name}={fps}: must be above 0 frames per second.")
            rates.append(_rate(fps))
        if rates[1] > MAX_MULTIPLIER * rates[0]:
            raise InterpolationError(f"target_fps={float(rates[1]):g}: at most {MAX_MULTIPLIER} times the source's "
                                     f"{float(rates[0]):g}, which is {float(MAX_MULTIPLIER * rates[0]):g}.")
        return cls(rates[0] / rates[1], hold_last)

    def count(self, num_frames: int) -> int:
        """Frames of the result for `num_frames` of the source."""
        if num_frames < 1:
            return 0
        if self.hold_last:
            return math.ceil(num_frames / self.step)
        return math.floor((num_frames - 1) / self.step) + 1

    def output_fps(self, source_fps: float) -> float:
        """Frames per second of the result."""
        return float(_rate(source_fps) / self.step)

    def between(self, index: int) -> list[Fraction]:
        """Positions in [0, 1) of the frames of the result that lie at or after source frame `index`, before the next."""
        first = math.ceil(index / self.step)
        last = math.ceil((index + 1) / self.step)
        return [i * self.step - index for i in range(first, last)]

    def at_end(self, num_frames: int) -> int:
        """How often the last of `num_frames` is shown: what lies there, and after it if it is held."""
        positions = self.between(num_frames - 1)
        return len(positions) if self.hold_last else positions.count(Fraction(0))


def _rate(fps: float | Fraction) -> Fraction:
    """The rate that a number stands for: people write 23.976, 29.97 and 59.94 for 24, 30 and 60 times 1000/1001."""
    television = Fraction(1000 * round(fps * 1.001), 1001)
    if fps != round(fps) and abs(float(fps) - float(television)) < _ABBREVIATED:
        return television
    return Fraction(fps).limit_denominator(_MAX_DENOMINATOR)


def is_reached_by_halving(times: FrameTimes) -> bool:
    """Whether a model that knows the middle only can make these frames exactly where they belong."""
    parts = times.step.denominator  # every position is a multiple of 1/parts
    return parts == 1 or halving_levels(Fraction(1, parts)) is not None


def nearest_by_halving(position: Fraction) -> Fraction:
    """The position itself if halving reaches it, else the nearest eighth, from 0 to 1."""
    return position if halving_levels(position) is not None else Fraction(round(position * _NEAREST), _NEAREST)
