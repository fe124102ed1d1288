"""The VideoVAE as a native VAE: everything runs tile by tile, in the tiles it was trained with unless told otherwise."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import comfy.model_management
import comfy.ops
import comfy.sd
import torch
from torch import Tensor, nn

from ...allegro_model.config import VAEConfig
from ...allegro_model.errors import CheckpointMismatch, GeometryError, NonFiniteError, UnsupportedCheckpoint
from ...allegro_model.loading import check_tensors, vae_config_from_shapes
from ...allegro_model.vae import Tiling, VideoVAE, cells_of, decoding_bytes, encoding_bytes
from ...allegro_model.vae.blocks import ResNet, TemporalBlock
from .compat import (
    DeviceMemoryFull,
    archive_dtypes,
    assign_option,
    intermediate_dtype,
    is_out_of_memory,
    patcher_class,
    remember_loader,
    settle_dtypes,
)
from .progress import GIB, cancel_before, stage, tile_progress
from .sampling import check_latents
from .weights import open_file

logger = logging.getLogger(__name__)

DTYPES: dict[str, torch.dtype | None] = {"default": None, "bf16": torch.bfloat16, "fp32": torch.float32}


class ComfyVideoVAE(VideoVAE):
    """VideoVAE with the methods that ComfyUI's tiling calls: plain tensors in and out."""

    dtype: torch.dtype = torch.float32  # of the arithmetic; with dynamic memory the weights may be of another

    def __init__(self, config: VAEConfig, **kwargs: Any) -> None:
        super().__init__(config, **kwargs)
        for module in self.modules():  # a whole tile can take longer than anybody wants to wait
            if isinstance(module, ResNet | TemporalBlock):
                module.register_forward_pre_hook(cancel_before)

    def encode(self, frames: Tensor, **kwargs: Any) -> Tensor:
        """[B, 3, T, H, W] in [-1, 1] -> raw latents, the mean; options as `VideoVAE.encode`."""
        mean, _ = super().encode(frames, **kwargs)
        return mean


class AllegroVAE(comfy.sd.VAE):
    """ComfyUI's VAE round our network.

    Args:
        config: of the checkpoint.
        dtype: of weights and arithmetic; None is the reference's float32, unless ComfyUI was started with
            another type for VAEs.
        disable_dynamic: give it a patcher without dynamic memory.
    """

    def __init__(self, config: VAEConfig, dtype: torch.dtype | None = None, disable_dynamic: bool = False) -> None:
        _silently(super().__init__)
        self.latent_channels = config.latent_channels
        self.latent_dim = 3
        self.output_channels = 3
        self.working_dtypes = [torch.float32]
        frames, pixels = config.temporal_factor, config.spatial_factor
        self.upscale_ratio = (lambda t: t * frames, pixels, pixels)
        self.upscale_index_formula = (frames, pixels, pixels)
        self.downscale_ratio = (lambda n: max(1, n // frames), pixels, pixels)
        self.downscale_index_formula = (frames, pixels, pixels)
        self.device = comfy.model_management.vae_device()
        self.vae_dtype = dtype or comfy.model_management.vae_dtype(self.device, self.working_dtypes)
        self.output_device = comfy.model_management.intermediate_device()
        module = ComfyVideoVAE(config, operations=comfy.ops.disable_weight_init, dtype=self.vae_dtype)
        module.dtype = self.vae_dtype
        self.first_stage_model = module.requires_grad_(False).eval()
        archive_dtypes(self.first_stage_model)
        self.patcher = patcher_class(disable_dynamic)(
            self.first_stage_model, load_device=self.device,
            offload_device=comfy.model_management.vae_offload_device())
        self.memory_used_encode = lambda shape, dtype: self._encode_bytes(self.default_tiling, shape[2:], dtype)
        self.memory_used_decode = lambda shape, dtype: self._decode_bytes(self.default_tiling, shape[2:], dtype)

    @property
    def default_tiling(self) -> Tiling:
        """The tiles the checkpoint was trained with."""
        return Tiling.from_config(self.first_stage_model.config)

    # ComfyUI's interface

    def decode(self, samples_in: Tensor, vae_options: Mapping[str, Any] | None = None) -> Tensor:
        """Raw latents [B, 4, t, h, w] -> images [B, T, H, W, 3] in [0, 1]."""
        return self.decode_with(samples_in, self.default_tiling)

    def decode_tiled(self, samples: Tensor, tile_x: int | None = None, tile_y: int | None = None, overlap: int | None = None,
                     tile_t: int | None = None, overlap_t: int | None = None) -> Tensor:
        """The same with tiles of other sizes, in latent cells and frames."""
        frames, pixels = self.upscale_index_formula[:2]
        scaled = [None if v is None else v * f for v, f in
                  ((tile_t, frames), (tile_y, pixels), (tile_x, pixels), (overlap_t, frames), (overlap, pixels))]
        return self.decode_with(samples, self._core_tiling(*scaled))

    def encode(self, pixel_samples: Tensor) -> Tensor:
        """Images [T, H, W, 3] or [B, T, H, W, 3] in [0, 1] -> raw latents [B, 4, t, h, w]."""
        return self.encode_with(pixel_samples, self.default_tiling)

    def encode_tiled(self, pixel_samples: Tensor, tile_x: int | None = None, tile_y: int | None = None,
                     overlap: int | None = None, tile_t: int | None = None, overlap_t: int | None = None) -> Tensor:
        """The same with tiles of other sizes, in pixels and frames."""
        return self.encode_with(pixel_samples, self._core_tiling(tile_t, tile_y, tile_x, overlap_t, overlap))

    # The work

    def decode_with(self, samples: Tensor, tiling: Tiling) -> Tensor:
        """Raw latents [B, 4, t, h, w] -> images [B, T, H, W, 3] in [0, 1]; latents are not changed."""
        samples = samples.unsqueeze(2) if samples.ndim == 4 else samples
        check_latents(samples, self.latent_channels)
        shape = [n * f for n, f in zip(samples.shape[2:], self.upscale_index_formula, strict=True)]
        module = self.first_stage_model
        images = torch.empty((len(samples), *shape, 3), dtype=intermediate_dtype(), device=self.output_device)

        def work(tiling: Tiling) -> None:
            latents = samples.to(device=self.device, dtype=self.vae_dtype)
            progress, position = _batch_progress(len(samples)), 0
            for item in range(len(samples)):
                position = 0
                for frames in module.decode_stream(latents[item : item + 1], tiling=tiling, progress=progress(item),
                                                   output_device=self.output_device):
                    self._check_finite(frames)
                    frames = frames[0].movedim(0, -1).mul_(0.5).add_(0.5).clamp_(0, 1)
                    images[item, position : position + len(frames)] = frames.to(images)
                    position += len(frames)
                    del frames  # lets go of the window it is a view of

        self._run("decode", work, tiling, bytes_of=lambda tiling: self._decode_bytes(tiling, samples.shape[2:], self.vae_dtype))
        return images

    def _check_finite(self, frames: Tensor) -> None:
        """Of frames that are not clamped yet: clamping would hide Inf."""
        if not bool(torch.isfinite(frames).all()):
            raise NonFiniteError(f"Decoding gave NaN or Inf. The VAE computes in {str(self.vae_dtype).removeprefix('torch.')}. Try, in this "
                                 "order: dtype fp32 in Load Allegro VAE; other latents (are they NaN themselves?).")

    def encode_with(self, pixels: Tensor, tiling: Tiling) -> Tensor:
        """Images -> raw latents [B, 4, t, h, w]; images are not changed. Frames are filled up to a multiple of 4
        by repeating the last one, height and width cropped at the centre to multiples of 8."""
        if pixels.ndim not in (4, 5) or pixels.shape[-1] < 3:
            raise GeometryError(f"images of shape {list(pixels.shape)}: expected [frames, height, width, 3].")
        clips = pixels if pixels.ndim == 5 else pixels[None]
        # ComfyUI crops every axis between the first and the last, so the frames go into the first.
        images = self.vae_encode_crop_pixels(clips.flatten(0, 1))[..., :3]
        frames = images.unflatten(0, clips.shape[:2]).movedim(-1, 1)  # [B, 3, T, H, W]
        return self._encode(frames, lambda clip: clip.to(torch.float32) * 2 - 1, tiling)

    def encode_frames(self, frames: Tensor) -> Tensor:
        """Frames [B, 3, T, H, W] in [-1, 1], T a multiple of 4, H and W of 8 -> raw latents [B, 4, t, h, w]."""
        return self._encode(frames, lambda clip: clip, self.default_tiling)

    def _encode(self, clips: Tensor, prepare: Callable[[Tensor], Tensor], tiling: Tiling) -> Tensor:
        """Encodes [B, 3, T, H, W] clip by clip; `prepare` brings each to [-1, 1] when its turn comes."""
        collected: list[Tensor] = []

        def work(tiling: Tiling) -> None:
            collected.clear()
            progress = _batch_progress(len(clips))
            for item in range(len(clips)):
                collected.append(self.first_stage_model.encode(prepare(clips[item : item + 1]), tiling=tiling,
                                                               progress=progress(item), device=self.device))

        self._run("encode", work, tiling, bytes_of=lambda tiling: self._encode_bytes(tiling, clips.shape[2:], self.vae_dtype))
        return torch.cat(collected).to(device=self.output_device, dtype=intermediate_dtype())

    def tiling(self, tile_size: int, overlap: int, temporal_size: int, temporal_overlap: int) -> Tiling:
        """The widgets of our nodes; 0 stands for what the checkpoint was trained with.

        Raises:
            GeometryError: sizes that are no multiples, or an overlap as large as its tile.
        """
        base = self.default_tiling
        chosen = Tiling(
            tile_frames=temporal_size or base.tile_frames,
            tile_height=tile_size or base.tile_height,
            tile_width=tile_size or base.tile_width,
            overlap_frames=temporal_overlap or _at_most(base.overlap_frames, temporal_size, 4),
            overlap_height=overlap or _at_most(base.overlap_height, tile_size, 8),
            overlap_width=overlap or _at_most(base.overlap_width, tile_size, 8))
        return chosen

    def _core_tiling(self, tile_t: int | None, tile_y: int | None, tile_x: int | None, overlap_t: int | None,
                     overlap: int | None) -> Tiling:
        """Tiles of ComfyUI's tiled nodes, in pixels and frames, rounded to what the network can take."""
        base = self.default_tiling

        def fit(tile: int | None, wanted: int | None, default: tuple[int, int], multiple: int) -> tuple[int, int]:
            size = default[0] if tile is None else max(multiple, tile // multiple * multiple)
            shared = default[1] if wanted is None else max(0, wanted // multiple * multiple)
            return size, min(shared, size - multiple)

        t, over_t = fit(tile_t, overlap_t, (base.tile_frames, base.overlap_frames), 4)
        h, over_h = fit(tile_y, overlap, (base.tile_height, base.overlap_height), 8)
        w, over_w = fit(tile_x, overlap, (base.tile_width, base.overlap_width), 8)
        return replace(base, tile_frames=t, tile_height=h, tile_width=w, overlap_frames=over_t, overlap_height=over_h,
                       overlap_width=over_w)

    def _decode_bytes(self, tiling: Tiling, cells: Any, dtype: torch.dtype) -> int:
        """Decoding latents of (t, h, w) cells."""
        return self._bytes(decoding_bytes, tiling, cells, dtype=dtype)

    def _encode_bytes(self, tiling: Tiling, size: Any, dtype: torch.dtype) -> int:
        """Encoding a clip of (frames, height, width)."""
        frames, height, width = (int(n) for n in size)
        cells = cells_of(self.first_stage_model.config, (frames, height, width))
        return self._bytes(encoding_bytes, tiling, cells, dtype=dtype)

    def _bytes(self, needed: Callable[..., int], tiling: Tiling, cells: Any, *, dtype: torch.dtype) -> int:
        t, h, w = (int(n) for n in cells)
        return needed(self.first_stage_model.config, tiling, (t, h, w), device=self.device, dtype_bytes=dtype.itemsize)

    def _run(self, name: str, work: Callable[[Tiling], None], tiling: Tiling, *, bytes_of: Callable[[Tiling], int]) -> None:
        """Runs with the weights where ComfyUI wants them; when memory runs out, makes more room and tries again tile by tile."""
        room = 0
        for attempt in (1, 2):
            needed = bytes_of(tiling)
            room = max(room, needed * attempt)
            comfy.model_management.load_models_gpu([self.patcher], memory_required=room)
            try:
                with stage(f"VAE {name}", self.device):
                    work(tiling)
                return
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                if attempt == 2:
                    free = comfy.model_management.get_free_memory(self.device)
                    raise DeviceMemoryFull(
                        f"Allegro VAE {name} ran out of memory: it needs about {needed / GIB:.1f} GiB for one tile, "
                        f"{free / GIB:.1f} GiB are free. Try, in this order: close other programs that use the device; "
                        "dtype bf16 in Load Allegro VAE; a smaller tile_size (256, then 192) in the VAE node. Latents "
                        "that were sampled are kept and need not be computed again.") from error
            logger.warning("Allegro VAE %s ran out of memory; making room and trying once more, one tile at a time.", name)
            tiling = replace(tiling, tiles_per_batch=1)
            comfy.model_management.soft_empty_cache()


def check_vae(vae: Any) -> AllegroVAE:
    """The VAE, if it is ours.

    Raises:
        UnsupportedCheckpoint: it is another one.
    """
    if not isinstance(vae, AllegroVAE):
        raise UnsupportedCheckpoint(f"this VAE is a {type(vae).__name__}, expected the VideoVAE of Load Allegro VAE. "
                                    "Connect that node, or use ComfyUI's own VAE nodes for other VAEs.")
    return vae


def load_vae(path: str, dtype: str = "default", disable_dynamic: bool = False) -> AllegroVAE:
    """Loads a VideoVAE.

    Args:
        path: a .safetensors file or a folder.
        dtype: a key of `DTYPES`.
        disable_dynamic: for ComfyUI: give a patcher without dynamic memory.
    Returns:
        ComfyUI's VAE.
    Raises:
        CheckpointError, UnsupportedCheckpoint, CheckpointMismatch: with a sentence for the user.
    """
    opened = open_file(path, "allegro-vae")
    source, weights = opened.source, opened.weights
    if source.info.variant != "full":
        raise CheckpointMismatch(f"{path} is {source.info.title}; expected encoder and decoder. Choose the whole VAE.")
    config = vae_config_from_shapes(source.shapes, source.header.config)
    expected = {name: tuple(p.shape) for name, p in VideoVAE(config, device="meta").state_dict().items()}
    check_tensors(expected, source.shapes, what=f"{path}, {source.info.title},")
    vae = AllegroVAE(config, DTYPES[dtype], disable_dynamic)
    module = vae.first_stage_model
    module.load_state_dict(weights, strict=False, **assign_option(nn.Module.load_state_dict, vae.patcher))
    settle_dtypes(vae.patcher)
    module.requires_grad_(False)
    remember_loader(vae.patcher, load_vae_patcher, (path, dtype))
    logger.info("Loaded %s: %s, %s", path, source.info.title, vae.vae_dtype)
    return vae


def load_vae_patcher(path: str, dtype: str, disable_dynamic: bool = False) -> Any:
    """The model patcher of `load_vae`, for ComfyUI."""
    return load_vae(path, dtype, disable_dynamic).patcher


def _silently(init: Callable[..., None]) -> None:
    """ComfyUI's constructor sets its defaults and warns that it found no weights; those come from us."""
    root = logging.getLogger()
    hide = lambda record: "No VAE weights detected" not in record.getMessage()  # noqa: E731
    root.addFilter(hide)
    try:
        init(sd={})
    finally:
        root.removeFilter(hide)


def _batch_progress(items: int) -> Callable[[int], Callable[[int, int], None]]:
    """One bar over the tiles of all clips of a batch."""
    report = tile_progress()
    return lambda item: lambda done, total: report(item * total + done, items * total)


def _at_most(overlap: int, tile: int, multiple: int) -> int:
    """The trained overlap, less where the user chose a tile that is too small for it: at most half."""
    return overlap if tile == 0 else min(overlap, tile // 2 // multiple * multiple)
