"""The loop over a clip: which frames are made, held or passed on; for streams and for whole clips.

Frames of the source come out as they went in, bit for bit. Memory does not grow with the length of a stream.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import islice
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import InterpolationError
from .scenes import DEFAULT_THRESHOLD, is_cut, is_still, thumbnail
from .times import FrameTimes, is_reached_by_halving, nearest_by_halving

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]


class Interpolator(Protocol):
    """A model as the loop sees it.

    Attributes:
        arbitrary_time: takes every position in (0, 1); False: those that halving reaches, see `halving`.
    """

    arbitrary_time: bool

    def features(self, frame: Tensor) -> Any:
        """What depends on one frame alone, [3, H, W] in [0, 1]; asked for once per frame."""
        ...

    def between(self, first: Sequence[Any], second: Sequence[Any], positions: Sequence[float]) -> list[Tensor]:
        """The frames between pairs.

        Args:
            first, second: features of the frames before and after, one of each per pair.
            positions: in (0, 1), for every pair.
        Returns:
            for every position [pairs, 3, H, W] in [0, 1].
        """
        ...


def interpolate_stream(
    frames: Iterable[Tensor], interpolator: Interpolator, times: FrameTimes, *,
    scene_threshold: float = DEFAULT_THRESHOLD, pairs_per_batch: int = 1, num_frames: int = 0,
    progress: Progress | None = None,
) -> Iterator[Tensor]:
    """Interpolates a clip of any length, frame by frame.

    Args:
        frames: [3, H, W] in [0, 1] each, in order; never changed.
        interpolator: the model.
        times: where the frames of the result lie.
        scene_threshold: where the scene changes nothing is blended, the nearer frame is held: pairs with a
            similarity below this, from 0 (off) to 1; see `scenes.similarity`.
        pairs_per_batch: pairs at once; more needs more memory and may be faster on a GPU. Halved when memory runs
            out.
        num_frames: how many `frames` there are, for `progress`, if it is known.
        progress: called after each pair with (pairs done, all pairs, 0 if unknown); it may raise to cancel.
    Yields:
        [3, H, W] float32 on the frames' device. Frames of the source are passed on as they are.
    Raises:
        InterpolationError: there is no frame, frames of different sizes, or a threshold outside 0 to 1.
    """
    if not 0 <= scene_threshold <= 1:
        raise InterpolationError(f"scene_threshold={scene_threshold}: must be from 0 (off) to 1.")
    loop = _Loop(interpolator, scene_threshold, max(1, pairs_per_batch), _positions(interpolator, times))
    pairs = _pairs(frames, times, interpolator)
    done = 0
    end: _Frame | None = None
    while batch := list(islice(pairs, loop.pairs_per_batch)):
        if batch[-1].second is None:
            end = batch.pop().first
        for made in loop.run(batch):
            yield from made
            done += 1
            if progress is not None:
                progress(done, max(num_frames - 1, 0))
        if end is not None:
            break
    if end is None:
        raise InterpolationError("there is no frame to interpolate. Give at least two.")
    if not done:
        logger.warning("There is only one frame, and nothing to interpolate: it is returned as it is.")
    for _ in range(times.at_end(done + 1)):
        yield end.picture


def interpolate_clip(
    images: Tensor, interpolator: Interpolator, times: FrameTimes, *, scene_threshold: float = DEFAULT_THRESHOLD,
    pairs_per_batch: int = 1, progress: Progress | None = None,
) -> Tensor:
    """Interpolates a whole clip into one tensor that is allocated once.

    Args:
        images: [N, H, W, C] in [0, 1]; the first three channels are used.
        interpolator, times, scene_threshold, pairs_per_batch, progress: see `interpolate_stream`.
    Returns:
        [times.count(N), H, W, 3] float32 on the images' device.
    Raises:
        InterpolationError: see `interpolate_stream`; or the images have fewer than three channels, or are whole numbers.
    """
    if images.ndim != 4 or images.shape[3] < 3:
        raise InterpolationError(f"images {list(images.shape)}: expected [frames, height, width, 3].")
    if not images.is_floating_point():
        raise InterpolationError(f"images of {images.dtype}: expected numbers from 0 to 1. Divide whole ones by 255.")
    out = torch.empty((times.count(len(images)), *images.shape[1:3], 3), dtype=torch.float32, device=images.device)
    frames = (image[..., :3].movedim(-1, 0) for image in images)
    stream = interpolate_stream(frames, interpolator, times, scene_threshold=scene_threshold,
                                pairs_per_batch=pairs_per_batch, num_frames=len(images), progress=progress)
    for index, frame in enumerate(stream):
        out[index] = frame.movedim(0, -1)
    return out


# The pairs


class _Frame:
    """One frame of the source, and what is worked out about it at most once."""

    def __init__(self, picture: Tensor, interpolator: Interpolator) -> None:
        self.picture = picture
        self.interpolator = interpolator

    @cached_property
    def features(self) -> Any:
        return self.interpolator.features(self.picture)

    @cached_property
    def thumbnail(self) -> Tensor:
        return thumbnail(self.picture)


@dataclass(frozen=True)
class _Pair:
    """Two frames in a row; the last frame of a clip has no second one.

    Attributes:
        positions: in [0, 1), of the frames of the result.
    """

    first: _Frame
    second: _Frame | None
    positions: list[Fraction]


def _pairs(frames: Iterable[Tensor], times: FrameTimes, interpolator: Interpolator) -> Iterator[_Pair]:
    previous: _Frame | None = None
    for index, picture in enumerate(frames):
        if previous is not None and previous.picture.shape != picture.shape:
            raise InterpolationError(f"frame {index} is {list(picture.shape)}, the one before {list(previous.picture.shape)}: "
                                     "frames of one clip have one size. Resize them first.")
        frame = _Frame(picture, interpolator)
        if previous is not None:
            yield _Pair(previous, frame, times.between(index - 1))
        previous = frame
    if previous is not None:
        yield _Pair(previous, None, [])


def _positions(interpolator: Interpolator, times: FrameTimes) -> Callable[[Fraction], Fraction]:
    """What the model is asked for instead of a position."""
    if interpolator.arbitrary_time or is_reached_by_halving(times):
        return lambda position: position
    logger.warning("This model knows the middle between two frames only, and halving does not reach every frame of the "
                   "wanted rate: those are made at the nearest eighth. Motion will be slightly uneven; a model for "
                   "arbitrary positions (_t), or a multiplier of 2, 4 or 8, has no such error.")
    return nearest_by_halving


class _Loop:
    """Makes the frames of a few pairs at a time.

    Args:
        interpolator: the model.
        scene_threshold: see `interpolate_stream`.
        pairs_per_batch: halved for good when memory runs out.
        position: what the model is asked for instead of a position.
    """

    def __init__(self, interpolator: Interpolator, scene_threshold: float, pairs_per_batch: int,
                 position: Callable[[Fraction], Fraction]) -> None:
        self.interpolator = interpolator
        self.scene_threshold = scene_threshold
        self.pairs_per_batch = pairs_per_batch
        self.position = position

    def run(self, pairs: Sequence[_Pair]) -> Iterator[list[Tensor]]:
        """The frames of each pair; pairs in a row with equal positions go through the model together."""
        moving = [self._is_moving(pair) for pair in pairs]
        start = 0
        while start < len(pairs):
            end = start + 1
            if not moving[start]:
                yield [_held(pairs[start], p) for p in pairs[start].positions]
            else:
                while end < len(pairs) and moving[end] and pairs[end].positions == pairs[start].positions:
                    end += 1
                yield from self._made(pairs[start:end])
            start = end

    def _is_moving(self, pair: _Pair) -> bool:
        """Whether the model is needed."""
        assert pair.second is not None
        if not any(self.position(p) % 1 for p in pair.positions) or is_still(pair.first.picture, pair.second.picture):
            return False
        return self.scene_threshold == 0 or not is_cut(pair.first.thumbnail, pair.second.thumbnail, self.scene_threshold)

    def _made(self, pairs: Sequence[_Pair]) -> Iterator[list[Tensor]]:
        """The frames of pairs with equal positions."""
        asked = {p: self.position(p) for p in pairs[0].positions}
        wanted = sorted({p for p in asked.values() if p % 1})
        made = dict(zip(wanted, self._between(pairs, [float(p) for p in wanted]), strict=True))
        for index, pair in enumerate(pairs):
            yield [made[asked[p]][index] if asked[p] in made else _held(pair, asked[p]) for p in pair.positions]

    def _between(self, pairs: Sequence[_Pair], positions: Sequence[float]) -> list[Tensor]:
        """For every position [pairs, 3, H, W]; in smaller portions when memory runs out."""
        device = pairs[0].first.picture.device
        try:
            found = self.interpolator.between([pair.first.features for pair in pairs],
                                              [pair.second.features for pair in pairs if pair.second], positions)
            return [frames.to(device=device, dtype=torch.float32) for frames in found]
        except torch.OutOfMemoryError:
            if len(pairs) == 1:
                raise
        half = len(pairs) // 2
        self.pairs_per_batch = min(self.pairs_per_batch, half)
        logger.info("Memory ran out for %d pairs of frames at once; trying %d.", len(pairs), half)
        halves = (self._between(part, positions) for part in (pairs[:half], pairs[half:]))
        return [torch.cat(parts) for parts in zip(*halves, strict=True)]


def _held(pair: _Pair, position: Fraction) -> Tensor:
    """The nearer frame of a pair; exactly in the middle the second, with which the new scene begins."""
    assert pair.second is not None
    return (pair.first if position < Fraction(1, 2) else pair.second).picture
