"""VideoVAE: frames [B, 3, T, H, W] in [-1, 1] <-> raw latents [B, 4, T/4, H/8, W/8].

Attribute names equal the published checkpoint keys, which are the same in the official and the diffusers
layout. Reference: rhymes-ai/Allegro, arXiv 2410.15458 (the code where the paper differs).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..config import VAEConfig
from ..errors import GeometryError
from ..geometry import estimate_decode_bytes, estimate_encode_bytes, nearest_multiples
from ..ops import layers
from .batching import copy_beside, tiles_at_once
from .blocks import (
    Downsample,
    FrameAttention,
    ResNet,
    TemporalBlock,
    Upsample,
    network_layout,
    norm_silu,
    per_frame,
    temporal_residual,
)
from .tiling import Progress, Tiling, stream_tiles

LOGVAR_RANGE = (-30.0, 20.0)


def _steps(*blocks: Any) -> Iterator[nn.Module]:
    """The layers of some blocks in order.

    A network calls them one after the other. Were it to call the blocks, it would hold on to the input of each until the
    block is done: at full resolution that is a third of all memory.
    """
    for block in blocks:
        yield from block.steps()


class DownBlock(nn.Module):
    """ResNets with temporal blocks, then less time, then less space."""

    def __init__(self, in_channels: int, channels: int, config: VAEConfig, operations: Any, *, time: bool,
                 space: bool, **kwargs: Any) -> None:
        super().__init__()
        groups, temporal_groups = config.norm_num_groups, config.temporal_norm_num_groups
        self.resnets = nn.ModuleList([
            ResNet(in_channels if j == 0 else channels, channels, groups, operations, **kwargs)
            for j in range(config.layers_per_block)
        ])
        self.temp_convs = nn.ModuleList([
            TemporalBlock(channels, temporal_groups, operations, **kwargs) for _ in self.resnets
        ])
        self.temp_convs_down = (
            TemporalBlock(channels, temporal_groups, operations, resample="down", **kwargs) if time else None)
        self.downsamplers = nn.ModuleList([Downsample(channels, operations, **kwargs)] if space else [])

    def steps(self) -> Iterator[nn.Module]:
        """The layers in order: [B, C, T, H, W] -> [B, C', T or T/2, H or H/2, W or W/2]."""
        for pair in zip(self.resnets, self.temp_convs, strict=True):
            yield from pair
        if self.temp_convs_down is not None:
            yield self.temp_convs_down
        yield from self.downsamplers


class UpBlock(nn.Module):
    """ResNets with temporal blocks, then more time, then more space."""

    def __init__(self, in_channels: int, channels: int, config: VAEConfig, operations: Any, *, time: bool,
                 space: bool, **kwargs: Any) -> None:
        super().__init__()
        groups, temporal_groups = config.norm_num_groups, config.temporal_norm_num_groups
        self.resnets = nn.ModuleList([
            ResNet(in_channels if j == 0 else channels, channels, groups, operations, **kwargs)
            for j in range(config.layers_per_block + 1)
        ])
        self.temp_convs = nn.ModuleList([
            TemporalBlock(channels, temporal_groups, operations, **kwargs) for _ in self.resnets
        ])
        self.temp_conv_up = (
            TemporalBlock(channels, temporal_groups, operations, resample="up", **kwargs) if time else None)
        self.upsamplers = nn.ModuleList([Upsample(channels, operations, **kwargs)] if space else [])

    def steps(self) -> Iterator[nn.Module]:
        """The layers in order: [B, C, T, H, W] -> [B, C', T or 2T, H or 2H, W or 2W]."""
        for pair in zip(self.resnets, self.temp_convs, strict=True):
            yield from pair
        if self.temp_conv_up is not None:
            yield self.temp_conv_up
        yield from self.upsamplers


class MidBlock(nn.Module):
    """The coarsest level, with attention inside each frame."""

    def __init__(self, channels: int, config: VAEConfig, operations: Any, **kwargs: Any) -> None:
        super().__init__()
        groups = config.norm_num_groups
        self.resnets = nn.ModuleList([ResNet(channels, channels, groups, operations, **kwargs) for _ in range(2)])
        self.temp_convs = nn.ModuleList([
            TemporalBlock(channels, config.temporal_norm_num_groups, operations, **kwargs) for _ in range(2)
        ])
        self.attentions = nn.ModuleList([FrameAttention(channels, groups, operations, **kwargs)])

    def steps(self) -> Iterator[nn.Module]:
        """The layers in order: [B, C, t, h, w] -> the same."""
        yield from (self.resnets[0], self.temp_convs[0], self.attentions[0], self.resnets[1], self.temp_convs[1])


class Encoder(nn.Module):
    """Frames -> moments before `quant_conv`."""

    def __init__(self, config: VAEConfig, operations: Any, **kwargs: Any) -> None:
        super().__init__()
        channels = config.block_out_channels
        first, last = channels[0], channels[-1]
        self.conv_in = operations.Conv2d(3, first, 3, padding=1, **kwargs)
        self.temp_conv_in = operations.Conv3d(first, first, (3, 1, 1), padding=(1, 0, 0), **kwargs)
        self.down_blocks = nn.ModuleList([
            DownBlock(channels[max(i - 1, 0)], c, config, operations, time=config.temporal_down[i],
                      space=i < len(channels) - 1, **kwargs)
            for i, c in enumerate(channels)
        ])
        self.mid_block = MidBlock(last, config, operations, **kwargs)
        self.conv_norm_out = operations.GroupNorm(config.norm_num_groups, last, eps=1e-6, **kwargs)
        self.temp_conv_out = operations.Conv3d(last, last, (3, 1, 1), padding=(1, 0, 0), **kwargs)
        self.conv_out = operations.Conv2d(last, 2 * config.latent_channels, 3, padding=1, **kwargs)

    def forward(self, frames: Tensor) -> Tensor:
        """[B, 3, T, H, W] -> [B, 8, T/4, H/8, W/8]."""
        x = temporal_residual(self.temp_conv_in, per_frame(self.conv_in, network_layout(frames)))
        for step in _steps(*self.down_blocks, self.mid_block):
            x = step(x)
        x = per_frame(lambda y: norm_silu(self.conv_norm_out, y), x)
        return per_frame(self.conv_out, temporal_residual(self.temp_conv_out, x))


class Decoder(nn.Module):
    """Latents after `post_quant_conv` -> frames."""

    def __init__(self, config: VAEConfig, operations: Any, **kwargs: Any) -> None:
        super().__init__()
        channels = tuple(reversed(config.block_out_channels))
        first, last = channels[0], channels[-1]
        self.conv_in = operations.Conv2d(config.latent_channels, first, 3, padding=1, **kwargs)
        self.temp_conv_in = operations.Conv3d(first, first, (3, 1, 1), padding=(1, 0, 0), **kwargs)
        self.mid_block = MidBlock(first, config, operations, **kwargs)
        self.up_blocks = nn.ModuleList([
            UpBlock(channels[max(i - 1, 0)], c, config, operations, time=config.temporal_up[i],
                    space=i < len(channels) - 1, **kwargs)
            for i, c in enumerate(channels)
        ])
        self.conv_norm_out = operations.GroupNorm(config.norm_num_groups, last, eps=1e-6, **kwargs)
        self.temp_conv_out = operations.Conv3d(last, last, (3, 1, 1), padding=(1, 0, 0), **kwargs)
        self.conv_out = operations.Conv2d(last, 3, 3, padding=1, **kwargs)

    def forward(self, latents: Tensor) -> Tensor:
        """[B, 4, t, h, w] -> [B, 3, 4t, 8h, 8w]."""
        x = temporal_residual(self.temp_conv_in, per_frame(self.conv_in, network_layout(latents)))
        for step in _steps(self.mid_block, *self.up_blocks):
            x = step(x)
        x = per_frame(lambda y: norm_silu(self.conv_norm_out, y), x)
        return per_frame(self.conv_out, temporal_residual(self.temp_conv_out, x))


class VideoVAE(nn.Module):
    """The video autoencoder.

    Args:
        config: sizes of the checkpoint, and its default tiles.
        part: "full", or only the "encoder" or the "decoder" half.
        operations: namespace of layer classes, see `ops`.
        device, dtype: of the weights.
    """

    def __init__(self, config: VAEConfig, *, part: Literal["full", "encoder", "decoder"] = "full",
                 operations: Any = layers, device: torch.device | str | None = None,
                 dtype: torch.dtype | None = None) -> None:
        super().__init__()
        kwargs: dict[str, Any] = {"device": device, "dtype": dtype}
        self.config = config
        self.part = part
        C = config.latent_channels
        if part in ("full", "encoder"):
            self.encoder = Encoder(config, operations, **kwargs)
            self.quant_conv = operations.Conv2d(2 * C, 2 * C, 1, **kwargs)
        if part in ("full", "decoder"):
            self.decoder = Decoder(config, operations, **kwargs)
            self.post_quant_conv = operations.Conv2d(C, C, 1, **kwargs)

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the weights, and of the arithmetic."""
        return next(self.parameters()).dtype

    # The networks alone, on one tile; differentiable.

    def encode_tile(self, frames: Tensor) -> Tensor:
        """[B, 3, T, H, W] -> encoder output [B, 8, T/4, H/8, W/8], before `quant_conv`."""
        return self.encoder(frames)

    def decode_tile(self, latents: Tensor) -> Tensor:
        """[B, 4, t, h, w] after `post_quant_conv` -> frames [B, 3, 4t, 8h, 8w]."""
        return self.decoder(latents)

    # Whole clips, tile by tile.

    @torch.no_grad()
    def encode(self, frames: Tensor, *, tiling: Tiling | None = None, progress: Progress | None = None,
               device: torch.device | str | None = None) -> tuple[Tensor, Tensor]:
        """Encodes a clip of any length.

        Args:
            frames: [B, 3, T, H, W] in [-1, 1]; H, W multiples of 8. A T that is no multiple of 4 is filled
                up by repeating the last frame, so an image is one latent frame.
            tiling: tile sizes; default the checkpoint's.
            progress: called with (tiles done, tiles in all); raising in it cancels.
            device: where the network runs; default where `frames` are.
        Returns:
            mean and logvar of the raw latents, each [B, 4, ceil(T/4), H/8, W/8] float32.
        Raises:
            GeometryError: wrong shape, or H or W no multiple of 8.
        """
        self._check_rank("frames", frames, 3)
        scale = (self.config.temporal_factor, self.config.spatial_factor, self.config.spatial_factor)
        for name, size, multiple in zip(("height", "width"), frames.shape[3:], scale[1:], strict=True):
            if size % multiple or not size:
                below, above = nearest_multiples(size, multiple)
                raise GeometryError(f"frames of {name} {size}: must be a multiple of {multiple} pixels; nearest: "
                                    f"{below} or {above}. Crop, pad or resize the clip.")
        missing = -frames.shape[2] % scale[0]
        if missing:
            frames = torch.cat((frames, frames[:, :, -1:].expand(-1, -1, missing, -1, -1)), dim=2)
        t, h, w = (size // s for size, s in zip(frames.shape[2:], scale, strict=True))
        run_on = torch.device(device) if device is not None else frames.device
        tiling = tiling or Tiling.from_config(self.config)
        at_once = tiles_at_once(estimate_encode_bytes, self.config, tiling, cells=(t, h, w), device=run_on,
                                dtype_bytes=self.dtype.itemsize)
        moments = stream_tiles(
            frames, tiling.plan((t, h, w)), lambda tile: self.encode_tile(tile.to(run_on, self.dtype)), source_scale=scale,
            output_scale=(1, 1, 1), tiles_per_batch=at_once, progress=progress)
        result = torch.cat(list(moments), dim=2)  # [B, 8, t, h, w], 1/192 of the frames
        mean, logvar = per_frame(self.quant_conv, result.to(self.dtype)).float().chunk(2, dim=1)
        return mean, logvar.clamp(*LOGVAR_RANGE)

    @torch.no_grad()
    def decode(self, latents: Tensor, *, tiling: Tiling | None = None, progress: Progress | None = None,
               num_frames: int | None = None, output_device: torch.device | str | None = None) -> Tensor:
        """Decodes a whole clip into one preallocated tensor.

        Args:
            latents: raw latents [B, 4, t, h, w].
            tiling: tile sizes; default the checkpoint's.
            progress: called with (tiles done, tiles in all); raising in it cancels.
            num_frames: frames to keep, at most 4t; default all.
            output_device: where the frames are collected; default where `latents` are.
        Returns:
            frames [B, 3, T, 8h, 8w] float32, not clamped.
        """
        self._check_rank("latents", latents, self.config.latent_channels)
        B, _, t, h, w = latents.shape
        factor = self.config.spatial_factor
        T = min(num_frames or t * self.config.temporal_factor, t * self.config.temporal_factor)
        frames = torch.empty((B, 3, T, h * factor, w * factor), device=output_device or latents.device)
        position = 0
        for part in self.decode_stream(latents, tiling=tiling, progress=progress, output_device=frames.device):
            part = part[:, :, : T - position]
            frames[:, :, position : position + part.shape[2]] = part
            position += part.shape[2]
            del part  # lets go of the window it is a view of
        return frames

    def decode_stream(self, latents: Tensor, *, tiling: Tiling | None = None, progress: Progress | None = None,
                      output_device: torch.device | str | None = None) -> Iterator[Tensor]:
        """Decodes a clip of any length in bounded memory.

        Args:
            latents: raw latents [B, 4, t, h, w].
            tiling: tile sizes; default the checkpoint's.
            progress: called with (tiles done, tiles in all); raising in it cancels.
            output_device: where the frames go; default where `latents` are. From CUDA to the CPU they are copied while
                the next tiles are computed.
        Yields:
            [B, 3, k, 8h, 8w] float32 frames in order, not clamped; k adds up to 4t.
        """
        self._check_rank("latents", latents, self.config.latent_channels)
        tiling = tiling or Tiling.from_config(self.config)
        scale = (self.config.temporal_factor, self.config.spatial_factor, self.config.spatial_factor)
        t, h, w = latents.shape[2:]
        device = torch.device(output_device or latents.device)
        beside = copy_beside if latents.device.type == "cuda" and device.type == "cpu" else None
        with torch.no_grad():
            z = per_frame(self.post_quant_conv, latents.to(self.dtype))  # before tiling, as the reference
        # Not round the whole generator: that would keep what was yielded until the next part is there.
        network = torch.no_grad()(self.decode_tile)
        at_once = tiles_at_once(estimate_decode_bytes, self.config, tiling, cells=(t, h, w), device=z.device,
                                dtype_bytes=self.dtype.itemsize)
        parts = stream_tiles(z, tiling.plan((t, h, w)), network, source_scale=(1, 1, 1), output_scale=scale,
                             tiles_per_batch=at_once, progress=progress, handover=beside)
        yield from map(lambda part: part.to(device), parts)

    @staticmethod
    def _check_rank(name: str, x: Tensor, channels: int) -> None:
        if x.ndim != 5 or x.shape[1] != channels or 0 in x.shape:
            raise GeometryError(f"{name} of shape {list(x.shape)}: expected [batch, {channels}, frames, height, "
                                "width], none of them 0.")
