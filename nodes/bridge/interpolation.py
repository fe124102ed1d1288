"""Interpolating clips with any INTERP_MODEL: EMA-VFI, and what ComfyUI loads itself (RIFE, FILM)."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import comfy.model_management
import torch
import torch.nn.functional as F
from torch import Tensor

from ...allegro_model.errors import InterpolationError, UnsupportedCheckpoint
from ...allegro_model.geometry import check_memory, frames_bytes
from ...allegro_model.memory import free_bytes
from ...allegro_model.vfi import (
    EMAVFI,
    EMAInterpolator,
    FrameTimes,
    Interpolator,
    interpolate_clip,
    is_reached_by_halving,
    pairs_per_batch,
)
from .compat import DeviceMemoryFull, is_out_of_memory
from .progress import GIB, stage, tile_progress
from .vfi import ComfyEMAVFI

logger = logging.getLogger(__name__)
Result = TypeVar("Result")

FLOW_SCALE_CHOICES: dict[str, float | None] = {"auto": None, "1": 1.0, "0.5": 0.5, "0.25": 0.25}
# (longest side, flow scale): the reference evaluates 2K at 0.5 and 4K at 0.25, smaller frames at 1.
_SCALE_OF_SIDE = ((1920, 1.0), (3072, 0.5), (math.inf, 0.25))


def interpolate(patcher: Any, images: Tensor, times: FrameTimes, *, scene_threshold: float, flow_scale: str = "auto",
                tta: bool = False) -> Tensor:
    """Interpolates a clip with any INTERP_MODEL.

    Args:
        patcher: the model.
        images: [N, H, W, C] in [0, 1], never changed; channels beyond the third are left out.
        times: where the frames of the result lie.
        scene_threshold: see `interpolate_clip`.
        flow_scale: a key of `FLOW_SCALE_CHOICES`; EMA-VFI only.
        tta: test-time augmentation; EMA-VFI only.
    Returns:
        [times.count(N), H, W, 3] float32 on the images' device, allocated once.
    Raises:
        UnsupportedCheckpoint: the model is something else; InterpolationError: it cannot make frames at these times.
        NotEnoughMemory: for the result, or, as `DeviceMemoryFull`, for one pair of frames.
        NonFiniteError: NaN or Inf in float32.
    """
    interpolator = _with_room(patcher, images, times, flow_scale, tta)
    count, height, width = times.count(len(images)), images.shape[1], images.shape[2]
    free = free_bytes(images.device)
    check_memory(f"A clip of {count} frames of {width}x{height}", frames_bytes(width, height, count),
                 count * frames_bytes(width, height, 1) if free is None else free,
                 "fewer images at a time; a smaller multiplier or target_fps; smaller images")
    if images.shape[-1] > 3:
        logger.warning("Allegro frame interpolation: the images' alpha channel is left out; motion cannot be estimated of it.")
    report = tile_progress()

    def progress(pairs: int, all_pairs: int) -> None:
        report(count if pairs == all_pairs else math.ceil(pairs / times.step), count)

    interpolator.load()
    with stage("frame interpolation", patcher.load_device), torch.no_grad():
        return interpolate_clip(images, interpolator, times, scene_threshold=scene_threshold,
                                pairs_per_batch=interpolator.pairs, progress=progress)


def _with_room(patcher: Any, images: Tensor, times: FrameTimes, flow_scale: str, tta: bool) -> _WithRoom:
    """The model as the loop over a clip wants it."""
    network = getattr(patcher, "model", None)
    if not hasattr(network, "extract_features"):
        raise UnsupportedCheckpoint(f"this is a {type(network).__name__}, expected a frame interpolator. Connect Load Frame "
                                    "Interpolator (Allegro), or ComfyUI's own loader for RIFE and FILM.")
    if not isinstance(network, ComfyEMAVFI):
        if FLOW_SCALE_CHOICES[flow_scale] is not None or tta:
            logger.warning("Allegro frame interpolation: flow_scale and tta are for EMA-VFI and not used with %s.",
                           type(network).__name__)
        needed = network.memory_used_forward(images.shape, patcher.model_dtype())
        return _WithRoom(_CoreInterpolator(patcher), patcher, needed)
    if not network.config.arbitrary_time and not is_reached_by_halving(times):
        raise InterpolationError(
            "this model knows the middle between two frames only, and middles of middles do not reach all the frames you "
            "ask for. Choose a multiplier of 2, 4, 8, ... (or a target_fps like 30 for a source_fps of 15), or a model for "
            "arbitrary positions: its file name ends in _t.")
    own = _OwnInterpolator(network, flow_scale=_flow_scale(flow_scale, images), tta=tta, device=patcher.load_device)
    needed = network.memory_used_forward(images.shape, torch.float32) * (2 if tta else 1)  # features both ways round
    return _WithRoom(own, patcher, needed, pairs_per_batch(images.shape[2], images.shape[1], patcher.load_device))


def _flow_scale(choice: str, images: Tensor) -> float:
    """The share of the frames' size at which flow is estimated."""
    chosen = FLOW_SCALE_CHOICES[choice]
    longest = max(images.shape[1:3])
    return next(scale for side, scale in _SCALE_OF_SIDE if longest <= side) if chosen is None else chosen


class _WithRoom:
    """An `Interpolator` that makes room and tries again when the device is full.

    Args:
        inner: the interpolator.
        patcher: of its model.
        needed: bytes for one pair of frames, beside the weights.
        pairs: of frames to work on at once.
    """

    def __init__(self, inner: Interpolator, patcher: Any, needed: int, pairs: int = 1) -> None:
        self.arbitrary_time = inner.arbitrary_time
        self.inner, self.patcher, self.needed, self.pairs = inner, patcher, needed, pairs

    def features(self, frame: Tensor) -> Any:
        """See `Interpolator`."""
        return self._try(1, lambda: self.inner.features(frame))

    def between(self, first: Sequence[Any], second: Sequence[Any], positions: Sequence[float]) -> list[Tensor]:
        """See `Interpolator`."""
        return self._try(len(first), lambda: self.inner.between(first, second, positions))

    def load(self, spare: int = 1) -> None:
        """Has ComfyUI bring the model to its device, with room for its work, `spare` times what it should need."""
        comfy.model_management.load_models_gpu([self.patcher], memory_required=self.pairs * self.needed * spare)

    def _try(self, pairs: int, work: Callable[[], Result]) -> Result:
        """Several pairs that do not fit are tried again by the loop, fewer at a time; one pair is, here, with more room."""
        try:
            return work()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if pairs > 1:
                raise torch.OutOfMemoryError(str(error)) from error
        logger.warning("Allegro frame interpolation ran out of memory; making room and trying once more.")
        self.load(spare=2)
        comfy.model_management.soft_empty_cache()
        try:
            return work()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            free = comfy.model_management.get_free_memory(self.patcher.load_device)
            raise DeviceMemoryFull(
                f"Allegro frame interpolation ran out of memory: it needs about {self.needed / GIB:.1f} GiB for one pair of "
                f"frames, {free / GIB:.1f} GiB are free. Try, in this order: close other programs that use the device; tta "
                "off; dtype fp16 in Load Frame Interpolator (Allegro); a smaller model (ours_small); smaller images.") from error


class _OwnInterpolator(EMAInterpolator):
    """EMA-VFI on ComfyUI's layers, which cast their weights to what they compute in."""

    def _in_float32(self) -> EMAVFI:
        twin = copy.copy(self.model)  # of the same weights
        twin.compute_dtype = torch.float32
        return twin


class _PaddedFrame(NamedTuple):
    """A frame as a model of ComfyUI wants it.

    Attributes:
        frame: [1, 3, H, W], padded on the right and below.
        features: of the model.
        size: height and width before padding.
    """

    frame: Tensor
    features: Any
    size: tuple[int, int]


class _CoreInterpolator:
    """RIFE, FILM and whatever else keeps to the type. One pair at a time, several positions where memory allows.

    Args:
        patcher: the model.
    """

    arbitrary_time = True

    def __init__(self, patcher: Any) -> None:
        self.network = patcher.model
        self.device, self.dtype = patcher.load_device, patcher.model_dtype()
        self.positions_at_once: int | None = None

    def features(self, frame: Tensor) -> _PaddedFrame:
        """See `Interpolator`."""
        align, height, width = getattr(self.network, "pad_align", 1), frame.shape[1], frame.shape[2]
        right, below = -width % align, -height % align
        frame = frame[None].to(device=self.device, dtype=self.dtype)
        if right or below:
            # A frame has no more to reflect than itself.
            mode = "reflect" if right < width and below < height else "replicate"
            frame = F.pad(frame, (0, right, 0, below), mode=mode)
        return _PaddedFrame(frame, self.network.extract_features(frame), (height, width))

    def between(self, first: Sequence[_PaddedFrame], second: Sequence[_PaddedFrame],
                positions: Sequence[float]) -> list[Tensor]:
        """See `Interpolator`."""
        pairs = [self._pair(a, b, positions) for a, b in zip(first, second, strict=True)]
        return [torch.cat([pair[i : i + 1] for pair in pairs]) for i in range(len(positions))]

    def _pair(self, first: _PaddedFrame, second: _PaddedFrame, positions: Sequence[float]) -> Tensor:
        """[positions, 3, H, W]."""
        made: list[Tensor] = []
        portion = self.positions_at_once or len(positions)
        cache = {"img0": first.features, "img1": second.features}
        done = 0
        while done < len(positions):
            some = positions[done : done + portion]
            try:
                made.append(self._call(first.frame, second.frame, some, cache))
                done += len(some)
            except Exception as error:
                if len(some) == 1 or not is_out_of_memory(error):
                    raise
                portion = self.positions_at_once = len(some) // 2
        height, width = first.size
        return torch.cat(made)[:, :, :height, :width].float().clamp(0, 1)

    def _call(self, img0: Tensor, img1: Tensor, positions: Sequence[float], cache: Mapping[str, Any]) -> Tensor:
        several = getattr(self.network, "forward_multi_timestep", None)
        if several is not None:
            return several(img0, img1, list(positions), cache=cache)
        n, _, height, width = len(positions), *img0.shape[1:]
        timestep = torch.tensor(positions, device=img0.device, dtype=img0.dtype).view(n, 1, 1, 1)
        return self.network(img0.expand(n, -1, -1, -1), img1.expand(n, -1, -1, -1),
                            timestep=timestep.expand(n, 1, height, width), cache=cache)
