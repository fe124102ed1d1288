"""The memory of a process that makes many clips: what a run takes, it gives back."""

import gc
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch

from allegro_model import AllegroPipeline
from allegro_model.loading import bundled_model, load_interpolator
from allegro_model.memory import release_heap
from allegro_model.vfi import EMAInterpolator, FrameTimes, interpolate_clip

RUNS, LOADED = 20, 4  # a new pipeline for so many runs; after the first ones, caches of fixed size are full
SMALL = {"width": 16, "height": 16, "num_frames": 4, "num_steps": 4, "cache": "draft"}


def held() -> tuple[int, int, int]:
    """(bytes of all tensors, objects that Python follows, pages of the process, 0 where no system tells)."""
    release_heap()
    objects = gc.get_objects()
    storages = {x.untyped_storage() for x in objects if issubclass(type(x), torch.Tensor) and x.device.type != "meta"}
    sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
    pages = int(Path("/proc/self/statm").read_text().split()[1]) if sys.platform == "linux" else 0
    return sum(sizes.values()), len(objects), pages


def make_clips() -> list[tuple[int, int, int]]:
    """`held` after the first runs and after all."""
    lora = bundled_model("tiny") / "loras" / "orange.safetensors"
    found = []
    for number in range(RUNS):
        if number % LOADED == 0:
            tiny = AllegroPipeline.from_pretrained("tiny", device="cpu", offload="stream", loras=[(lora, 0.8)])
            between = EMAInterpolator(load_interpolator(bundled_model("tiny-vfi") / "model.safetensors"))
        images = (tiny("a red circle moves right", seed=number, **SMALL)[0].movedim(0, -1) + 1) / 2  # [T, H, W, 3] in [0, 1]
        assert len(interpolate_clip(images[:2], between, FrameTimes.multiplied(2))) == 3
        if number + 1 in (LOADED, RUNS):
            found.append(held())
    return found


def test_twenty_clips_leave_no_more_in_memory_than_four() -> None:
    """With a LoRA, a step cache, networks that are streamed, and frames in between."""
    pytest.importorskip("transformers", reason="the text encoder needs transformers (extra: standalone)")
    # In a process of its own: in one that ran other tests, caches that they filled grow and shrink meanwhile.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        (tensors, objects, pages), (tensors_after, objects_after, pages_after) = process.submit(make_clips).result()
    assert tensors_after == tensors
    assert objects_after < 1.001 * objects
    assert pages_after <= 1.01 * pages
