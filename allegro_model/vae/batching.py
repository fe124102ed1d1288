"""How many tiles go through the network at once, the memory that takes, and how their results leave the device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..config import VAEConfig
from ..geometry import estimate_decode_bytes, estimate_encode_bytes, frames_bytes
from ..memory import total_bytes
from .tiling import Tiling, Triple

# Both chosen, not measured: `allegro bench --only decode` shows on a GPU whether they are good there.
_SHARE = 4  # of the memory of a device: the rest is for weights, and for networks that may stay where they are
_MOST = 8  # no more are needed to keep a large device busy

Estimate = Callable[..., int]


def tiles_at_once(estimate: Estimate, config: VAEConfig, tiling: Tiling, *, cells: Triple, device: torch.device,
                  dtype_bytes: int) -> int:
    """How many tiles go through the network at once.

    As many as `tiling` says. Where it leaves that open: on CUDA as many of one time as fit into a quarter of the memory
    there is, elsewhere one, which on a processor is as fast. What happens to be free does not count, so that the same
    clip rounds the same way every time: room is made before, and who runs out of memory all the same goes on with one.

    Args:
        estimate: `estimate_decode_bytes` or `estimate_encode_bytes`.
        config: of the VAE.
        tiling: of the clip.
        cells: (t, h, w) of the clip's latents.
        device: where the network runs.
        dtype_bytes: bytes per activation.
    """
    if tiling.tiles_per_batch is not None:
        return tiling.tiles_per_batch
    total = total_bytes(device)
    if device.type != "cuda" or total is None:
        return 1
    tile, places = _tile_and_places(config, tiling, cells)
    fitting = (n for n in range(min(_MOST, places), 1, -1)
               if estimate(config, tile, tiles=n, dtype_bytes=dtype_bytes) <= total // _SHARE)
    return next(fitting, 1)


def cells_of(config: VAEConfig, size: Triple) -> Triple:
    """(t, h, w) of the latents of a clip of (frames, height, width), for estimates: sizes that nobody can encode, too."""
    frames, height, width = size
    return (max(1, -(-frames // config.temporal_factor)), max(1, -(-height // config.spatial_factor)),
            max(1, -(-width // config.spatial_factor)))


def several_at_once(tiling: Tiling, device: torch.device) -> bool:
    """Whether more than one tile may go through the network at once."""
    return device.type == "cuda" if tiling.tiles_per_batch is None else tiling.tiles_per_batch > 1


def decoding_bytes(config: VAEConfig, tiling: Tiling, cells: Triple, *, device: torch.device, dtype_bytes: int) -> int:
    """What decoding a clip needs beside the weights: a batch of tiles, and the window of frames they are blended in.

    Args: see `tiles_at_once`.
    """
    _, h, w = cells
    (frames, *_), _ = _tile_and_places(config, tiling, cells)
    window = frames_bytes(w * config.spatial_factor, h * config.spatial_factor, frames)
    return window + _batch_bytes(estimate_decode_bytes, config, tiling, cells, device, dtype_bytes)


def encoding_bytes(config: VAEConfig, tiling: Tiling, cells: Triple, *, device: torch.device, dtype_bytes: int) -> int:
    """What encoding a clip needs beside the weights and the clip: a batch of tiles.

    Args: see `tiles_at_once`.
    """
    return _batch_bytes(estimate_encode_bytes, config, tiling, cells, device, dtype_bytes)


def _batch_bytes(estimate: Estimate, config: VAEConfig, tiling: Tiling, cells: Triple, device: torch.device,
                 dtype_bytes: int) -> int:
    tiles = tiles_at_once(estimate, config, tiling, cells=cells, device=device, dtype_bytes=dtype_bytes)
    tile, places = _tile_and_places(config, tiling, cells)
    return estimate(config, tile, tiles=min(tiles, places), dtype_bytes=dtype_bytes)  # a batch never crosses time


def _tile_and_places(config: VAEConfig, tiling: Tiling, cells: Triple) -> tuple[Triple, int]:
    """(frames, height, width) of a tile, which a clip may be smaller than, and how many there are of one time."""
    times, rows, columns = tiling.plan(cells)
    factor = config.spatial_factor
    return ((times.tile * config.temporal_factor, rows.tile * factor, columns.tile * factor),
            len(rows.starts) * len(columns.starts))


def copy_beside(frames: Tensor) -> Callable[[], Tensor]:
    """How frames get from CUDA to main memory while CUDA goes on with what it is asked from now on.

    Returns:
        copies them; until then nobody may write where they lie.
    """
    beside = torch.cuda.Stream(frames.device)
    beside.wait_stream(torch.cuda.current_stream(frames.device))  # for what was asked so far

    def copy() -> Tensor:
        with torch.cuda.stream(beside):
            return frames.cpu()

    return copy
