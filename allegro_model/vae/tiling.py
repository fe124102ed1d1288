"""Overlapping tiles in space and time: where they lie, how they blend, and how they stream.

The network only ever sees tiles of the size it was trained on. Along an axis tiles start every
`tile - overlap`; the last one is shifted back to end with the data, so that every frame and pixel is
covered at any size. In an overlap a tile's weight ramps linearly, and weights are divided by their sum. At
sizes of the form tile + k * stride with overlaps up to half a tile the ramps sum to 1 by themselves, and the
result is the reference's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from ..config import VAEConfig
from ..errors import GeometryError

Progress = Callable[[int, int], None]
Handover = Callable[[Tensor], Callable[[], Tensor]]  # of frames: what it returns copies them
Triple = tuple[int, int, int]


@dataclass(frozen=True)
class Tiling:
    """Tile and overlap sizes, in frames and pixels, and the tiles that go through the network at once.

    Attributes:
        tile_frames, tile_height, tile_width: size of a tile; frames a multiple of 4, pixels of 8.
        overlap_frames, overlap_height, overlap_width: shared with the next tile; same multiples, less than
            the tile.
        tiles_per_batch: tiles through the network at once; more needs more memory, and is faster on a device that one
            does not fill. None: see `tiles_at_once`.
    """

    tile_frames: int
    tile_height: int
    tile_width: int
    overlap_frames: int
    overlap_height: int
    overlap_width: int
    tiles_per_batch: int | None = None

    def __post_init__(self) -> None:
        for axis, multiple in (("frames", 4), ("height", 8), ("width", 8)):
            tile, overlap = getattr(self, f"tile_{axis}"), getattr(self, f"overlap_{axis}")
            if tile < multiple or tile % multiple:
                raise GeometryError(f"tile_{axis}={tile}: must be a positive multiple of {multiple}; nearest: "
                                    f"{max(multiple, tile // multiple * multiple)}.")
            if overlap % multiple or not 0 <= overlap < tile:
                raise GeometryError(f"overlap_{axis}={overlap}: must be a multiple of {multiple} from 0 to "
                                    f"{tile - multiple}, less than tile_{axis}={tile}.")
        if self.tiles_per_batch is not None and self.tiles_per_batch < 1:
            raise GeometryError(f"tiles_per_batch={self.tiles_per_batch}: must be at least 1.")

    @classmethod
    def from_config(cls, config: VAEConfig, tiles_per_batch: int | None = None) -> Tiling:
        """The tiles the checkpoint was trained on."""
        return cls(config.tile_frames, config.tile_size, config.tile_size, config.overlap_frames,
                   *config.tile_overlap, tiles_per_batch=tiles_per_batch)

    def plan(self, shape: Triple) -> tuple[Axis, Axis, Axis]:
        """Tile positions for latents of (t, h, w) cells."""
        t, h, w = shape
        return (plan_axis(t, self.tile_frames // 4, self.overlap_frames // 4),
                plan_axis(h, self.tile_height // 8, self.overlap_height // 8),
                plan_axis(w, self.tile_width // 8, self.overlap_width // 8))


class Axis(NamedTuple):
    """Tiles along one axis, in latent cells: their starts, their common length, the overlap, the extent."""

    starts: tuple[int, ...]
    tile: int
    overlap: int
    size: int


def plan_axis(size: int, tile: int, overlap: int) -> Axis:
    """Places tiles so that they cover `size` cells; a size below one tile is a single smaller tile."""
    tile = min(tile, size)
    starts = list(range(0, size - tile + 1, tile - overlap if overlap < tile else tile))
    if starts[-1] + tile < size:
        starts.append(size - tile)
    return Axis(tuple(starts), tile, min(overlap, tile - 1), size)


def blend_weights(axis: Axis, scale: int) -> list[Tensor]:
    """Weight of every sample of every tile along one axis.

    Args:
        axis: tile positions, in cells.
        scale: samples per cell.
    Returns:
        one [tile * scale] float32 tensor per tile; where tiles overlap their weights sum to 1.
    """
    length, overlap = axis.tile * scale, axis.overlap * scale
    ramp = torch.arange(overlap, dtype=torch.float32) / max(overlap, 1)
    weights, total = [], torch.zeros(axis.size * scale)
    for i, start in enumerate(axis.starts):
        weight = torch.ones(length)
        if i > 0:
            weight[:overlap] *= ramp
        if i < len(axis.starts) - 1:
            weight[length - overlap:] *= 1 - ramp
        weights.append(weight)
        total[start * scale : start * scale + length] += weight
    return [w / total[s * scale : s * scale + length] for w, s in zip(weights, axis.starts, strict=True)]


class _Window:
    """The frames that tiles are blended into: as many as a tile has, at full size, float32.

    Args:
        batch: clips.
        plan: tile positions along t, h, w, in cells.
        scale: samples per cell.
    """

    def __init__(self, batch: int, plan: tuple[Axis, Axis, Axis], scale: Triple) -> None:
        self._batch, self._plan, self._scale = batch, plan, scale
        self._weights = [blend_weights(axis, s) for axis, s in zip(plan, scale, strict=True)]
        self._frames = torch.empty(0)

    def move_to(self, i: int, tiles: Tensor) -> None:
        """Begins where the tiles of time `i` do. In new memory: whoever took frames of the old may still use them."""
        times, rows, columns = self._plan
        sizes = (times.tile * self._scale[0], self._batch, tiles.shape[1], rows.size * self._scale[1],
                 columns.size * self._scale[2])
        # One frame after the other, so that those which leave first are one piece.
        frames = torch.zeros(sizes, dtype=torch.float32, device=tiles.device).movedim(0, 2)
        if i == 0:
            self._weights = [[weight.to(tiles.device) for weight in weights] for weights in self._weights]
        else:
            by = self._advance(i - 1)
            frames[:, :, : frames.shape[2] - by] = self._frames[:, :, by:]
        self._frames = frames

    def add(self, tile: Tensor, b: int, index: Triple) -> None:
        """Blends tile `index` of clip `b` in."""
        _, y, x = _box(self._plan, index, self._scale)
        t, h, w = (weights[i] for weights, i in zip(self._weights, index, strict=True))
        self._frames[b, :, :, y, x].addcmul_(tile.float(), t[:, None, None] * (h[:, None] * w))

    def ready(self, i: int) -> Tensor:
        """Frames that no tile after those of time `i` touches."""
        return self._frames[:, :, : self._advance(i)]

    def _advance(self, i: int) -> int:
        """Frames from one time to the next."""
        times = self._plan[0]
        following = times.starts[i + 1] if i + 1 < len(times.starts) else times.size
        return (following - times.starts[i]) * self._scale[0]


def stream_tiles(source: Tensor, plan: tuple[Axis, Axis, Axis], network: Callable[[Tensor], Tensor], *,
                 source_scale: Triple, output_scale: Triple, tiles_per_batch: int, progress: Progress | None,
                 handover: Handover | None = None) -> Iterator[Tensor]:
    """Runs a network over tiles and yields the blended result along time.

    Memory beyond the source: one window of a tile's frames at full size, and one batch of tiles; a second window while
    the time moves on, and for as long as the caller keeps frames.

    Args:
        source: [B, C, T, H, W]; items of the batch are tiles like any other, so that one item's result does
            not depend on the others.
        plan: tile positions along t, h, w, in cells.
        network: a batch of tiles [n, C, T', H', W'] -> [n, C', ...].
        source_scale, output_scale: samples per cell along t, h, w in the source and in the result.
        tiles_per_batch: n.
        progress: called with (tiles done, tiles in all), first with 0; raising in it cancels.
        handover: copies what is ready while the next tiles are computed; None yields the frames themselves.
    Yields:
        [B, C', k, H, W] float32 in order of time, on the network's output device or where `handover` copies them;
        their sizes along time add up to the whole.
    """
    progress = progress or (lambda done, total: None)
    times, rows, columns = plan
    jobs = list(product(range(source.shape[0]), range(len(rows.starts)), range(len(columns.starts))))
    total = len(times.starts) * len(jobs)
    window = _Window(source.shape[0], plan, output_scale)
    leaving: Callable[[], Tensor] | None = None
    progress(0, total)
    for i in range(len(times.starts)):
        for first in range(0, len(jobs), tiles_per_batch):
            batch = jobs[first : first + tiles_per_batch]
            boxes = [(b, _box(plan, (i, j, k), source_scale)) for b, j, k in batch]
            tiles = network(torch.stack([source[b][:, t, y, x] for b, (t, y, x) in boxes]))
            if leaving is not None:  # these tiles are under way: time to fetch the frames before them
                yield leaving()
                leaving = None
            if first == 0:
                window.move_to(i, tiles)
            for (b, j, k), tile in zip(batch, tiles, strict=True):
                window.add(tile, b, (i, j, k))
            progress(i * len(jobs) + first + len(batch), total)
        if handover is None:
            yield window.ready(i)
        else:
            leaving = handover(window.ready(i))
    if leaving is not None:
        yield leaving()


def _box(plan: tuple[Axis, Axis, Axis], index: Triple, scale: Triple) -> tuple[slice, slice, slice]:
    """Samples of tile `index`."""
    t, h, w = (slice(axis.starts[i] * s, (axis.starts[i] + axis.tile) * s)
               for axis, i, s in zip(plan, index, scale, strict=True))
    return t, h, w
