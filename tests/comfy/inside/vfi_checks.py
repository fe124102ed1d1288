"""Checks of the frame interpolation nodes, run by bootstrap.py like those of checks.py."""

import copy
import gc
import sys
import weakref
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
import psutil
import torch
from bootstrap import Host, Skipped, only_new_objects
from checks import raises, same
from safetensors.torch import load_file, save_file
from torch import Tensor

OPTIONS = {"multiplier": 2, "source_fps": 15.0, "target_fps": 0.0, "hold_last": False, "scene_threshold": 0.2,
           "flow_scale": "auto", "tta": False}


@lru_cache(maxsize=4)
def interpolator(h: Host, name: str = "random_t.safetensors", dtype: str = "fp32") -> Any:
    return h.run("LoadAllegroFrameInterpolator", model_name=name, dtype=dtype)


def panning(num_frames: int, height: int = 40, width: int = 56) -> Tensor:
    """[N, height, width, 3] in [0, 1]: a smooth picture that moves by two pixels from frame to frame."""
    generator = torch.Generator().manual_seed(1)
    wide = torch.nn.functional.interpolate(torch.rand((1, 3, 5, 9), generator=generator), (height, width + 2 * num_frames),
                                           mode="bilinear")[0].movedim(0, -1)
    return torch.stack([wide[:, 2 * i : 2 * i + width] for i in range(num_frames)])


def both(h: Host, model: Any, images: Tensor, **options: Any) -> tuple[Tensor, float]:
    """The frames and the rate."""
    return h.nodes["AllegroFrameInterpolate"].execute(interp_model=model, images=images, **{**OPTIONS, **options}).args


def interpolate(h: Host, model: Any, images: Tensor, **options: Any) -> Tensor:
    return both(h, model, images, **options)[0]


def core(h: Host, name: str) -> Any:
    """A node of ComfyUI's own frame interpolation."""
    try:
        return h.extra("nodes_frame_interpolation", name)
    except ImportError as error:
        raise Skipped("this version of ComfyUI has no frame interpolation of its own") from error


def core_result(h: Host, model: Any, images: Tensor, multiplier: int) -> Tensor:
    with torch.inference_mode():
        return core(h, "FrameInterpolate").execute(model, images, multiplier).args[0]


# The same as outside ComfyUI


def check_interpolation_equals_the_package(h: Host) -> None:
    vfi = h.module("allegro_model.vfi")
    load = h.module("allegro_model.loading").load_interpolator
    images = panning(5)
    for name, options, times in (
            ("random_t", {"multiplier": 3}, vfi.FrameTimes.multiplied(3)),
            ("random_t", {"target_fps": 24.0}, vfi.FrameTimes.between_rates(15, 24)),
            ("random_t", {"multiplier": 2, "tta": True, "flow_scale": "0.5"}, vfi.FrameTimes.multiplied(2)),
            ("random", {"multiplier": 4, "hold_last": True}, vfi.FrameTimes.multiplied(4, hold_last=True)),
            ("random", {"target_fps": 24.0}, vfi.FrameTimes.between_rates(15, 24))):
        network = load(h.base / "models" / "frame_interpolation" / f"{name}.safetensors")
        scale = 0.5 if "flow_scale" in options else 1.0
        expected = vfi.interpolate_clip(images, vfi.EMAInterpolator(network, flow_scale=scale, tta="tta" in options), times)
        found = interpolate(h, interpolator(h, f"{name}.safetensors"), images, **options)
        assert found.shape == expected.shape
        assert float((found - expected).abs().max()) < 1e-6, (name, options)


def check_given_frames_come_out_bit_identical(h: Host) -> None:
    """88 frames become 175, or 176 when the last one is held; also those of another type and with alpha."""
    images = panning(88, 32, 32)
    for held, count in ((False, 175), (True, 176)):
        frames, fps = both(h, interpolator(h), images, hold_last=held)
        assert frames.shape == (count, 32, 32, 3)
        assert torch.equal(frames[0:175:2], images)
        assert fps == 30.0
        assert not any(torch.equal(frames[i], frames[i - 1]) for i in range(1, 175, 2)), "frames were only repeated"
    assert torch.equal(frames[175], images[-1])
    half, with_alpha = images[:3].half(), torch.cat((images[:3], torch.rand((3, 32, 32, 1))), dim=-1)
    result = interpolate(h, interpolator(h), half)
    assert result.dtype == torch.float32
    assert torch.equal(result[::2], half.float())
    opaque = interpolate(h, interpolator(h), images[:3])
    assert float((interpolate(h, interpolator(h), with_alpha) - opaque).abs().max()) < 1e-6
    assert any("alpha channel is left out" in line for line in h.log)


def check_rates_of_frame_interpolation(h: Host) -> None:
    images = panning(16, 32, 32)
    for source, target, held, count in ((15.0, 24.0, False, 25), (15.0, 24.0, True, 26), (15.0, 60.0, False, 61),
                                        (30000 / 1001, 60000 / 1001, False, 31), (30.0, 24.0, False, 13)):
        frames, fps = both(h, interpolator(h), images, source_fps=source, target_fps=target, hold_last=held)
        assert len(frames) == count, (source, target, held, len(frames))
        assert abs(fps - target) < 1e-9
    assert both(h, interpolator(h), images[:3], multiplier=5, source_fps=8.0)[1] == 40.0


def check_one_frame_and_no_frame(h: Host) -> None:
    images = panning(1)
    frames = interpolate(h, interpolator(h), images)
    assert torch.equal(frames, images)
    assert frames.data_ptr() != images.data_ptr()
    assert any("There is only one frame" in line for line in h.log), h.log
    raises("InterpolationError", "there is no frame", lambda: interpolate(h, interpolator(h), images[:0]))


def check_scene_cuts_are_not_blended(h: Host) -> None:
    images = torch.cat((panning(2), 1 - panning(2)))
    frames = interpolate(h, interpolator(h), images, multiplier=4)
    assert torch.equal(frames[5], images[1])
    assert torch.equal(frames[7], images[2])
    assert not torch.equal(frames[1], images[0]), "elsewhere frames are made"
    assert not torch.equal(interpolate(h, interpolator(h), images, multiplier=4, scene_threshold=0.0)[5], images[1])


def check_frame_interpolation_leaves_everything_alone(h: Host) -> None:
    """A second run is identical; images and weights are what they were."""
    images, model = panning(4), interpolator(h)
    weights = {name: p.clone() for name, p in model.model.state_dict().items()}
    before = copy.deepcopy({"images": images, "options": model.model_options, "patches": model.patches})
    first, second = (interpolate(h, model, images, multiplier=3, tta=True) for _ in range(2))
    assert torch.equal(first, second)
    assert same({"images": images, "options": model.model_options, "patches": model.patches}, before)
    assert same(dict(model.model.state_dict()), weights)


def check_reduced_precision_of_frame_interpolation(h: Host) -> None:
    images = panning(3)
    reference = interpolate(h, interpolator(h), images)
    for dtype, tolerance in (("bf16", 0.1), ("fp16", 0.02), ("auto", 0.1)):
        model = h.run("LoadAllegroFrameInterpolator", model_name="random_t.safetensors", dtype=dtype)
        wanted = h.module("nodes.bridge.vfi").DTYPES[dtype] or h.module("allegro_model.vfi").best_dtype(torch.device("cpu"))
        assert {p.dtype for p in model.model.parameters()} == {wanted}
        found = interpolate(h, model, images)
        error = float((found - reference).abs().max())
        assert error < tolerance, (dtype, error)
        assert (error > 1e-7) == (wanted != torch.float32), (dtype, error)
        assert torch.equal(found[::2], images)


def check_overflow_of_frame_interpolation_is_computed_in_float32(h: Host) -> None:
    images = panning(4)
    model = h.run("LoadAllegroFrameInterpolator", model_name="large_t.safetensors", dtype="fp16")
    found = interpolate(h, model, images)
    assert any("Computing in float32 from here on" in line for line in h.log), h.log
    assert model.model.compute_dtype == torch.float16, "the loaded model itself changed"
    assert torch.isfinite(found).all()
    expected = interpolate(h, h.run("LoadAllegroFrameInterpolator", model_name="large_t.safetensors", dtype="fp32"), images)
    assert float((found - expected).abs().mean()) < 0.02


def check_fixed_interpolators_refuse_other_positions(h: Host) -> None:
    images, model = panning(3), interpolator(h, "random.safetensors")
    assert len(interpolate(h, model, images, multiplier=8)) == 17
    for options in ({"multiplier": 3}, {"source_fps": 24.0, "target_fps": 30.0}):
        raises("InterpolationError", "Choose a multiplier of 2, 4, 8", lambda options=options: interpolate(
            h, model, images, **options))


def check_flow_scale_follows_the_size(h: Host) -> None:
    chosen = h.module("nodes.bridge.interpolation")._flow_scale
    sizes = {(720, 1280): 1.0, (1080, 1920): 1.0, (1080, 2048): 0.5, (1440, 2560): 0.5, (2160, 3840): 0.25, (4096, 2160): 0.25}
    for (height, width), scale in sizes.items():
        assert chosen("auto", torch.empty((1, height, width, 3), device="meta")) == scale
    assert chosen("0.25", torch.empty((1, 64, 64, 3))) == 0.25
    images = panning(2, 64, 96)
    assert not torch.equal(interpolate(h, interpolator(h), images, flow_scale="0.5"), interpolate(h, interpolator(h), images))


# Memory, progress, cancelling


def check_frame_interpolation_loads_partly(h: Host) -> None:
    """ComfyUI's streaming of weights, driven directly because its CPU mode never needs it."""
    images, results = panning(2), []
    for budget in (0, 1, 200_000):
        model = h.run("LoadAllegroFrameInterpolator", model_name="random_t.safetensors", dtype="fp16")
        model.load(torch.device("cpu"), lowvram_model_memory=budget, full_load=budget == 0)
        frames = images.movedim(-1, 1)
        results.append(model.model(frames[:1], frames[1:], 0.3))
        model.unpatch_model()
    assert all(torch.equal(r, results[0]) for r in results)


def check_interpolator_is_loaded_again_without_dynamic_memory(h: Host) -> None:
    loader, args = interpolator(h).cached_patcher_init
    again = loader(*args, disable_dynamic=True)
    assert type(again).__name__ == "ModelPatcher"
    assert all(isinstance(a, str) for a in args), "the arguments must not keep weights alive"
    assert torch.equal(interpolate(h, again, panning(2)), interpolate(h, interpolator(h), panning(2)))


def check_half_precision_files_with_dynamic_memory(h: Host) -> None:
    """Newer versions with dynamic memory keep matrices in the dtype of the file; what is computed stays the same."""
    folder = h.base / "models" / "frame_interpolation"
    weights = {name: value.half() for name, value in load_file(folder / "random_t.safetensors").items()}
    save_file(weights, folder / "half_t.safetensors")
    images = panning(2)
    expected = interpolate(h, h.run("LoadAllegroFrameInterpolator", model_name="half_t.safetensors", dtype="fp32"), images)
    memory = sys.modules.get("comfy.memory_management")
    if not hasattr(memory, "aimdo_enabled"):
        raise Skipped("this version of ComfyUI has no dynamic memory")
    load, read = h.module("nodes.bridge.vfi").load_interpolator, comfy.utils.load_safetensors
    try:
        memory.aimdo_enabled = True
        comfy.utils.load_safetensors = lambda path: (load_file(path), None)  # the mapping needs an accelerator's driver
        plain = load(str(folder / "half_t.safetensors"), "fp32", disable_dynamic=True)
        network = plain.model
        assert {p.dtype for p in network.parameters()} == {torch.float32}
        network.load_state_dict(weights, assign=True)  # what a dynamic patcher holds: the file's tensors, not cast
        mixed = interpolate(h, plain, images)
    finally:
        memory.aimdo_enabled, comfy.utils.load_safetensors = False, read
    assert {p.dtype for p in network.parameters()} == {torch.float16}
    assert float((mixed - expected).abs().max()) < 1e-6


def check_full_memory_during_frame_interpolation(h: Host) -> None:
    """Several pairs at once become fewer; one pair gets more room once, then an explanation; the next run works."""
    run = h.module("nodes.bridge.interpolation")
    images, model, portions = panning(7), h.run("LoadAllegroFrameInterpolator", model_name="random_t.safetensors", dtype="fp32"), []
    expected = interpolate(h, model, images)
    network, choose = model.model, run.pairs_per_batch

    def between(fits: Callable[[int], bool]) -> Callable[..., Any]:
        def limited(first: Any, *args: Any) -> Any:
            portions.append(len(first.frame))
            if not fits(len(first.frame)):
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return type(network).between(network, first, *args)
        return limited

    try:
        run.pairs_per_batch = lambda *args: 4
        network.between = between(lambda pairs: pairs < 3)
        assert float((interpolate(h, model, images) - expected).abs().max()) < 1e-5
        assert portions == [4, 2, 2, 2], portions
        portions.clear()
        network.between = between(lambda pairs: len(portions) > 1)
        assert float((interpolate(h, model, images[:2]) - expected[:3]).abs().max()) < 1e-5
        assert any("making room and trying once more" in line for line in h.log)
        network.between = between(lambda pairs: False)
        raises("DeviceMemoryFull", "Try, in this order: close other programs", lambda: interpolate(h, model, images))
    finally:
        run.pairs_per_batch = choose
        del network.between
    assert torch.equal(interpolate(h, model, images), expected)


def check_results_beyond_the_memory_are_refused(h: Host) -> None:
    """Before anything is worked out."""
    images = panning(2).expand(2, -1, -1, -1)
    huge = torch.zeros(1).expand(100_000, 4000, 4000, 3)
    raises("NotEnoughMemory", "A clip of 6399937 frames of 4000x4000 needs about", lambda: interpolate(
        h, interpolator(h), huge, multiplier=64))
    assert len(interpolate(h, interpolator(h), images)) == 3


def check_progress_counts_the_frames_of_the_result(h: Host) -> None:
    seen: list[tuple[int, int]] = []
    comfy.utils.set_progress_bar_global_hook(lambda value, total, *args, **kwargs: seen.append((value, total)))
    try:
        interpolate(h, interpolator(h), panning(5), multiplier=3)
    finally:
        comfy.utils.set_progress_bar_global_hook(None)
    assert set(seen) <= {(3, 13), (6, 13), (9, 13), (13, 13)}, seen  # newer versions leave some out
    assert seen == sorted(seen)
    assert seen[-1] == (13, 13)


def check_cancel_inside_a_pair_of_frames(h: Host) -> None:
    """Pressed when the network already runs: its next part must not. Between pairs nothing is asked of the network."""
    network, seen = interpolator(h).model, []

    def press(*args: Any) -> None:
        seen.append("pressed")
        comfy.model_management.interrupt_current_processing(True)

    for first, later in ((network.feature_bone.block1, network.feature_bone.block2), (network.block[0], network.block[1]),
                         (network.unet.down0, network.unet.down1), (network.unet, network.feature_bone.block1)):
        seen.clear()
        hooks = [first.register_forward_pre_hook(press),
                 later.conv.register_forward_hook(lambda *args: seen.append("went on")) if hasattr(later, "conv") else
                 later.conv2.register_forward_hook(lambda *args: seen.append("went on"))]
        try:
            expect_cancelled(lambda: interpolate(h, interpolator(h), panning(4)))
        finally:
            for hook in hooks:
                hook.remove()
        before = seen.index("pressed")
        assert "went on" not in seen[before:], seen


def expect_cancelled(job: Callable[[], Any]) -> None:
    try:
        job()
    except comfy.model_management.InterruptProcessingException:
        return
    finally:
        comfy.model_management.interrupt_current_processing(False)
    raise AssertionError("not cancelled")


def check_memory_is_stable_over_many_interpolations(h: Host) -> None:
    process, sizes, images = psutil.Process(), [], panning(6)
    with only_new_objects():
        for run in range(20):
            interpolate(h, interpolator(h), images[:, : 32 + 4 * (run % 3)], multiplier=3)
            gc.collect()
            sizes.append(process.memory_info().rss)
    assert max(sizes[10:]) < sizes[5] * 1.01, [s >> 20 for s in sizes]


def check_interpolators_are_let_go(h: Host) -> None:
    model = h.run("LoadAllegroFrameInterpolator", model_name="random.safetensors", dtype="fp32")
    interpolate(h, model, panning(2))
    watched = weakref.ref(model.model)
    del model
    comfy.model_management.unload_all_models()
    comfy.model_management.cleanup_models()
    gc.collect()
    assert watched() is None, "something keeps the model alive"


# ComfyUI's own interpolation


def check_our_interpolator_runs_in_comfyuis_node(h: Host) -> None:
    """Every member that node uses: features kept, several positions at once, one by one when memory runs out."""
    images = panning(4, 36, 50)  # neither side fits the network: it pads by itself
    for name, multipliers in (("random_t.safetensors", (2, 3, 5, 16)), ("random.safetensors", (2, 4, 16))):
        for multiplier in multipliers:
            found = core_result(h, interpolator(h, name), images, multiplier)
            expected = interpolate(h, interpolator(h, name), images, multiplier=multiplier, scene_threshold=0.0)
            assert float((found - expected).abs().max()) < 1e-5, (name, multiplier)
            assert torch.equal(found[::multiplier], images)
    network = interpolator(h).model

    def full(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    network.forward_multi_timestep = full
    try:
        one_by_one = core_result(h, interpolator(h), images, 4)
    finally:
        del network.forward_multi_timestep
    assert float((one_by_one - interpolate(h, interpolator(h), images, multiplier=4)).abs().max()) < 1e-6
    half = h.run("LoadAllegroFrameInterpolator", model_name="random_t.safetensors", dtype="fp16")
    assert float((core_result(h, half, images, 2) - interpolate(h, half, images)).abs().max()) < 0.01
    raises("InterpolationError", "this model knows the middle only", lambda: core_result(
        h, interpolator(h, "random.safetensors"), images, 3))


def core_model(h: Host, kind: str) -> Any:
    """A RIFE or FILM model with random weights, loaded by ComfyUI's own node."""
    loader = core(h, "FrameInterpolationModelLoader")
    module = __import__(loader.__module__, fromlist=["FILMNet"])
    small = {"RIFE": partial(module.IFNet, channels=(16, 16, 16, 16, 16)), "FILM": partial(module.FILMNet, filters=8, flow_filters=(4, 8, 8, 8))}
    generator, shapes = torch.Generator().manual_seed(2), small[kind]().state_dict()
    weights = {name: torch.randn(p.shape, generator=generator) * (0.3 / max(1, p[0].numel()) ** 0.5) for name, p in shapes.items()}
    save_file(weights, h.base / "models" / "frame_interpolation" / f"{kind}.safetensors")
    published = module.FILMNet
    module.FILMNet = small["FILM"]  # the loader knows one size only, which is large
    try:
        return loader.execute(f"{kind}.safetensors").args[0]
    finally:
        module.FILMNet = published


def check_comfyuis_interpolators_run_in_our_node(h: Host) -> None:
    images = panning(4, 70, 100)
    for kind in ("RIFE", "FILM"):
        model = core_model(h, kind)
        for multiplier in (2, 3):
            found = interpolate(h, model, images, multiplier=multiplier, scene_threshold=0.0)
            expected = core_result(h, model, images, multiplier)
            assert float((found - expected).abs().max()) < 1e-6, (kind, multiplier)
            assert torch.equal(found[::multiplier], images)
        assert len(interpolate(h, model, images, target_fps=24.0, hold_last=True)) == 7
        interpolate(h, model, images[:2], tta=True)
        assert any("not used with" in line for line in h.log)
        cut = interpolate(h, model, torch.cat((images[:1], 1 - images[:1])))
        assert torch.equal(cut[1], cut[2]), "a cut was blended"


def check_full_memory_with_comfyuis_interpolators(h: Host) -> None:
    images, model, portions = panning(2, 64, 96), core_model(h, "RIFE"), []
    expected = interpolate(h, model, images, multiplier=8)
    network = model.model

    class Limited(type(network)):
        def forward(self, img0: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            portions.append(len(img0))
            if len(img0) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return super().forward(img0, *args, **kwargs)

    network.__class__ = Limited
    found = interpolate(h, model, images, multiplier=8)
    assert portions == [7, 3, 1, 1, 1, 1, 1, 1, 1], portions
    assert float((found - expected).abs().max()) < 1e-5


def check_cancel_inside_a_pair_of_comfyuis_interpolators(h: Host) -> None:
    for kind in ("RIFE", "FILM"):
        model, seen = core_model(h, kind), []
        network = model.model
        first, later = (network.blocks[0], network.blocks[1]) if kind == "RIFE" else (network.predict_flow._predictor, network.fuse)

        def press(*args: Any, seen: list[str] = seen) -> None:
            seen.append("pressed")
            comfy.model_management.interrupt_current_processing(True)

        first.register_forward_pre_hook(press)
        later.register_forward_pre_hook(lambda *args, seen=seen: seen.append("went on"))
        expect_cancelled(lambda model=model: interpolate(h, model, panning(3, 64, 96)))
        assert seen == ["pressed"], (kind, seen)


# Files


def check_wrong_files_of_interpolators(h: Host) -> None:
    def load(name: str) -> Any:
        return h.run("LoadAllegroFrameInterpolator", model_name=name, dtype="auto")

    folder = h.base / "models" / "frame_interpolation"
    raises("UnsupportedCheckpoint", f"python -m allegro_model convert-vfi {folder / 'ours.pkl'} {folder / 'ours.safetensors'}",
           lambda: load("ours.pkl"))
    raises("UnsupportedCheckpoint", "expected an EMA-VFI frame interpolator", lambda: load("is_something_else.safetensors"))
    raises("CheckpointMismatch", "unet.up3", lambda: load("incomplete_t.safetensors"))
    raises("UnsupportedCheckpoint", "is truncated", lambda: load("truncated_t.safetensors"))
    for name in ("../random_t.safetensors", "/etc/passwd", "none.safetensors"):
        raises("CheckpointError", "is not among the frame interpolators", lambda name=name: load(name))


def check_other_objects_are_no_interpolators(h: Host) -> None:
    raises("UnsupportedCheckpoint", "expected a frame interpolator", lambda: interpolate(h, object(), panning(2)))


def check_folder_of_interpolators_is_known(h: Host) -> None:
    (first, *_), _ = h.folder_paths.folder_names_and_paths["frame_interpolation"]
    assert Path(first) == h.base / "models" / "frame_interpolation"
