"""Two clips that share frames -> one clip, without a repeated frame and without a jump in colour.

    longer = join_clips(clip, continuation, 8)                     # the first 8 frames of the second are the last 8 of the first
    longer = join_clips(opening, clip, 8, adjust="first")          # put in front: the given clip keeps its colours

A generated clip repeats the frames it was given only as well as the VAE can, and its colours drift a little with
every continuation. So the mean and contrast of each channel are matched over the shared frames, and these are
blended from one clip to the other. Frames are [3, T, H, W] or [B, 3, T, H, W] in [-1, 1] here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .errors import GeometryError

# Contrast is changed by a quarter at most: of nearly flat pictures it says nothing, and the noise in them would grow.
GAIN_RANGE = (0.8, 1.25)

Adjust = Literal["first", "second"] | None


class ColourMatch(NamedTuple):
    """What makes the colours of one clip those of another: frames * gain + shift, each [..., 3, 1, 1, 1]."""

    gain: Tensor
    shift: Tensor

    @classmethod
    def between(cls, frames: Tensor, target: Tensor) -> ColourMatch:
        """From `frames` to `target`, both [..., 3, n, H, W]: two versions of the same pictures."""
        (mean, std), (target_mean, target_std) = _statistics(frames), _statistics(target)
        gain = torch.where(std > 0, target_std / std, 1.0).clamp(*GAIN_RANGE)
        return cls(gain, target_mean - gain * mean)

    def apply(self, frames: Tensor) -> Tensor:
        """[..., 3, n, H, W] in [-1, 1] -> the same with the other colours."""
        return (frames * self.gain.to(frames)).add_(self.shift.to(frames)).clamp_(-1, 1)


def join_clips(first: Tensor, second: Tensor, overlap: int, *, adjust: Adjust = "second") -> Tensor:
    """Joins two clips whose last and first frames show the same.

    Args:
        first: [3, T1, H, W] or [B, 3, T1, H, W] in [-1, 1].
        second: the same with T2 frames; its first `overlap` frames are the last ones of `first` once more.
        overlap: frames that both hold, from 0 to the shorter length. 0 puts one behind the other, unchanged.
        adjust: whose colours are matched to the other's: "second" after a continuation, "first" when a new clip
            was put in front of a given one, None for neither.
    Returns:
        [..., 3, T1 + T2 - overlap, H, W]; outside of the overlap the clip that is not adjusted is unchanged.
    Raises:
        GeometryError: clips of different sizes, or an overlap longer than one of them.
    """
    check_joinable(overlap, first, second)
    shape = list(first.shape)
    shape[-3] += second.shape[-3] - overlap
    joined = first.new_empty(shape)
    position = 0
    for part in join_streams([first], [second], overlap, adjust=adjust):
        joined[..., position : position + part.shape[-3], :, :] = part
        position += part.shape[-3]
    return joined


def join_streams(first: Iterable[Tensor], second: Iterable[Tensor], overlap: int, *,
                 adjust: Adjust = "second") -> Iterator[Tensor]:
    """`join_clips` for clips that arrive in pieces, as `decode_stream` and `stream_frames` deliver them.

    Holds the shared frames; all of the first clip when that is the one to be adjusted, since how is known only
    after its last frame.

    Args:
        first, second: pieces [..., 3, n, H, W] in order of time.
        overlap, adjust: as in `join_clips`.
    Yields:
        the pieces of the joined clip, in order.
    Raises:
        GeometryError: as in `join_clips`; when pieces were yielded already, if a stream ends too early.
    """
    if overlap < 1:
        check_joinable(overlap)
        yield from first
        yield from second
        return
    shared, rest = _take(iter(second), overlap)
    if adjust == "first":
        whole = _whole(first)
        check_joinable(overlap, whole, shared)
        first = [ColourMatch.between(whole[..., -overlap:, :, :], shared).apply(whole)]
    tail: Tensor | None = None
    for piece in first:
        held = piece if tail is None else torch.cat((tail, piece), dim=-3)
        ready = max(0, held.shape[-3] - overlap)
        if ready:
            yield held[..., :ready, :, :]
        tail = held[..., ready:, :, :]
    if tail is None:
        raise _empty("first")
    check_joinable(overlap, tail, shared)
    match = ColourMatch.between(shared, tail) if adjust == "second" else None
    yield _blend(tail, shared if match is None else match.apply(shared))
    for piece in rest:
        yield piece if match is None else match.apply(piece)


def _statistics(frames: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel, [..., 3, 1, 1, 1]."""
    dims = (-3, -2, -1)
    return frames.float().mean(dims, keepdim=True), frames.float().std(dims, correction=0, keepdim=True)


def _blend(first: Tensor, second: Tensor) -> Tensor:
    """Fades from one version of the shared frames to the other; the frames before and after continue both ends."""
    overlap = first.shape[-3]
    weights = torch.arange(1, overlap + 1, device=first.device, dtype=first.dtype) / (overlap + 1)
    return first + (second.to(first) - first) * weights[:, None, None]


def _take(pieces: Iterator[Tensor], count: int) -> tuple[Tensor, Iterator[Tensor]]:
    """(the first `count` frames, or fewer if there are no more; an iterator over the rest)."""
    taken: list[Tensor] = []
    while sum(piece.shape[-3] for piece in taken) < count and (piece := next(pieces, None)) is not None:
        taken.append(piece)
    if not taken:
        raise _empty("second")
    frames = torch.cat(taken, dim=-3)
    rest = frames[..., count:, :, :]
    return frames[..., :count, :, :], chain([rest] if rest.shape[-3] else [], pieces)


def check_joinable(overlap: int, first: Tensor | None = None, second: Tensor | None = None) -> None:
    """Raises unless clips of these shapes can be joined; what is not given is not known yet.

    Raises:
        GeometryError: clips of different sizes, or an overlap longer than one of them.
    """
    if overlap < 0:
        raise GeometryError(f"overlap={overlap}: must be 0 or more frames.")
    if first is None or second is None:
        return
    lengths = first.shape[-3], second.shape[-3]
    if min(lengths) < overlap:
        raise GeometryError(f"overlap={overlap}: the clips have {lengths[0]} and {lengths[1]} frames to share. Use an overlap of "
                            f"at most {min(lengths)}.")
    if first.shape[:-3] != second.shape[:-3] or first.shape[-2:] != second.shape[-2:]:
        raise GeometryError(f"clips of shapes {list(first.shape)} and {list(second.shape)}: expected the same size. Resize one "
                            "of them.")


def _whole(pieces: Iterable[Tensor]) -> Tensor:
    parts = list(pieces)
    if not parts:
        raise _empty("first")
    return torch.cat(parts, dim=-3)


def _empty(which: str) -> GeometryError:
    return GeometryError(f"the {which} clip holds no frame: there is nothing to join. Use another clip.")
