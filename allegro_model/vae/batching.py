"""How many tiles go through the network at once, the memory that takes, and how their results leave the device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..config import VAEConfig
from ..geometry import estimate_decode_bytes, estimate_encode_bytes, frames_bytes
from ..memory import total_bytes
from .tiling import Tiling, Triple

_SHARE = 4  # of a device's memory: the rest is for weights, and for networks that may stay where they are
_MOST = 8  # more do not make a large device busier

Estimate = Callable[..., int]


def tiles_at_once(estimate: Estimate, config: VAEConfig, tiling: Tiling, size: Triple, *, device: torch.device,
                  dtype_bytes: int, free: int | None = None) -> int:
    """How many tiles of one time go through the network at once.

    As many as `tiling` says. Where it leaves that open: on a processor one, which is as fast; on CUDA as many as fit into
    a quarter of its memory. That depends on the device and not on what happens to be there, so that the same clip
    rounds the same way every time; only what would not fit at all is less.

    Args:
        estimate: `estimate_decode_bytes` or `estimate_encode_bytes`.
        config: of the VAE.
        tiling: of the clip.
        size: (frames, height, width) of the clip, pixels.
        device: where the network runs.
        dtype_bytes: bytes per activation.
        free: bytes that are free on `device`, once room was made; None before.
    """
    t, h, w = (-(-n // factor) for n, factor in zip(
        size, (config.temporal_factor, config.spatial_factor, config.spatial_factor), strict=True))
    _, rows, columns = tiling.plan((t, h, w))
    places = len(rows.starts) * len(columns.starts)
    if tiling.tiles_per_batch is not None:
        return min(tiling.tiles_per_batch, places)
    total = total_bytes(device)
    if device.type == "cpu" or total is None:
        return 1
    room = total // _SHARE if free is None else min(total // _SHARE, free)
    fitting = (n for n in range(min(_MOST, places), 1, -1)
               if estimate(config, tiling.tile_of(size), tiles=n, dtype_bytes=dtype_bytes) <= room)
    return next(fitting, 1)


def decoding_bytes(config: VAEConfig, tiling: Tiling, size: Triple, *, device: torch.device, dtype_bytes: int,
                   free: int | None = None) -> int:
    """What decoding a clip needs beside the weights: one batch of tiles, and the frames that they are blended in.

    Args: see `tiles_at_once`.
    """
    tiles = tiles_at_once(estimate_decode_bytes, config, tiling, size, device=device, dtype_bytes=dtype_bytes, free=free)
    tile = tiling.tile_of(size)
    return (frames_bytes(size[2], size[1], tile[0])
            + estimate_decode_bytes(config, tile, tiles=tiles, dtype_bytes=dtype_bytes))


def encoding_bytes(config: VAEConfig, tiling: Tiling, size: Triple, *, device: torch.device, dtype_bytes: int) -> int:
    """What encoding a clip needs beside the weights and the clip: one batch of tiles.

    Args: see `tiles_at_once`.
    """
    tiles = tiles_at_once(estimate_encode_bytes, config, tiling, size, device=device, dtype_bytes=dtype_bytes)
    return estimate_encode_bytes(config, tiling.tile_of(size), tiles=tiles, dtype_bytes=dtype_bytes)


def copy_beside(frames: Tensor) -> Callable[[], Tensor]:
    """Copies frames from CUDA to page-locked memory while CUDA goes on with what is asked of it from now on.

    Returns:
        what waits for the copy and returns it.
    """
    stream = torch.cuda.Stream(frames.device)
    stream.wait_stream(torch.cuda.current_stream(frames.device))
    with torch.cuda.stream(stream):
        copy = torch.empty_like(frames, device="cpu", pin_memory=True).copy_(frames, non_blocking=True)
        arrived = stream.record_event()

    def wait() -> Tensor:
        arrived.synchronize()
        return copy

    return wait
