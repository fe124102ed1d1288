"""Checks of the image-to-video nodes, run by bootstrap.py like those of checks.py."""

import copy
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import comfy.model_management
import comfy.sample
import comfy.samplers
import torch
from bootstrap import Host, call
from checks import ksampler, model, parts, prompts, raises, relative, same, sample, with_recorded_noise
from torch import Tensor

SIZE = {"width": 96, "height": 64, "length": 24, "batch_size": 1}
TI2V = "tiny-random-ti2v/transformer"


@lru_cache(maxsize=1)
def image_model(h: Host) -> Any:
    return model(h, TI2V)


def pictures(count: int, height: int = 70, width: int = 120, channels: int = 3) -> Tensor:
    """[count, height, width, channels] in [0, 1], smooth."""
    coarse = torch.rand((count, channels, 4, 4), generator=torch.Generator().manual_seed(count))
    return torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear").movedim(1, -1).contiguous()


def outputs(h: Host, node_id: str, **inputs: Any) -> tuple[Any, Any, Any]:
    """positive, negative, latent of a node with the prompts, the VAE and the size filled in."""
    positive, negative = prompts(h)
    known = {"positive": positive, "negative": negative, "vae": parts(h)[2], "fit": "crop", **SIZE}
    return h.nodes[node_id].execute(**{**known, **inputs}).args


@lru_cache(maxsize=1)
def first_and_last(h: Host) -> tuple[Any, Any, Any]:
    return outputs(h, "AllegroImageToVideo", start_image=pictures(1), end_image=pictures(2)[1:])


def reference_condition(h: Host, frames: Tensor, positions: list[int], num_frames: int = 24) -> Tensor:
    """[1, 8, t, h, w] made by allegro_model alone, from images of any size."""
    package = h.module("allegro_model.conditioning")
    vae = h.module("allegro_model.loading").load_vae(h.base / "models" / "allegro" / "tiny-random")
    given = package.GivenFrames.at(package.fit_images(frames.movedim(-1, 1), 96, 64), positions, num_frames)
    mean, _ = vae.encode(given.canvas())
    return package.build_condition(mean * vae.config.scale_factor, given)


def of_network(h: Host, side: Any, noise: Tensor) -> Tensor:
    """The 8 channels that a conditioning puts beside the latents, with the mask as the network's layers get it."""
    dit = image_model(h).model
    condition = dit.concat_cond(noise=noise, device=noise.device, prompt_type="positive", **side[0][1])
    video, mask = condition.chunk(2, dim=1)
    return torch.cat((video, h.module("nodes.bridge.conditioning").in_training_order(mask)), dim=1)


def package_run(h: Host, condition: Tensor, sigmas: Tensor, draw: Callable[[], Tensor]) -> Tensor:
    """Raw latents of allegro_model's own sampling with cfg 8; `draw` gives the noise of the start and of every step."""
    loading, sampling = h.module("allegro_model.loading"), h.module("allegro_model.sampling")
    dit = loading.load_dit(h.base / "models" / "allegro" / "tiny-random-ti2v", dtype=torch.float32)
    as_prompt = [sampling.Prompt(c[0][0].float(), c[0][1]["attention_mask"].bool()) for c in prompts(h)]
    denoiser = sampling.Denoiser(dit, *as_prompt, 8.0, batched=True, condition=condition)
    x = sampling.SAMPLERS["euler_ancestral"](denoiser, draw() * sigmas[0], sigmas, draw)
    return x / h.module("allegro_model.config").VAE_720P.scale_factor


def run(h: Host, given: tuple[Any, Any, Any], dit: Any = None, **changes: Any) -> Tensor:
    positive, negative, latent = given
    return sample(h, dit or image_model(h), latent, **{"positive": positive, "negative": negative, "cfg": 8.0, **changes})


# The same as outside ComfyUI


def check_condition_equals_the_package(h: Host) -> None:
    """To the bit, in the layout of the training, for every node and all positions that a mask can hide."""
    noise = torch.zeros((1, 4, 6, 8, 12))
    batch = pictures(4)
    clip = pictures(30)
    cases = [
        (outputs(h, "AllegroImageToVideo", start_image=batch[:1]), batch[:1], [0]),
        (outputs(h, "AllegroImageToVideo", end_image=batch[:1]), batch[:1], [23]),
        (outputs(h, "AllegroImageToVideo", start_image=batch[:1], end_image=batch[1:2]), batch[:2], [0, 23]),
        (outputs(h, "AllegroImageToVideo", start_image=batch[:3], end_image=batch[3:]), batch, [0, 1, 2, 23]),
        (outputs(h, "AllegroKeyframes", images=batch[:2], images_2=batch[2:], positions="0, 5,13 -1"), batch, [0, 5, 13, 23]),
        (outputs(h, "AllegroContinueVideo", images=clip, keep_frames=6, direction="append"), clip[-6:], [*range(6)]),
        (outputs(h, "AllegroContinueVideo", images=clip, keep_frames=6, direction="prepend"), clip[:6], [*range(18, 24)]),
    ]
    for (positive, negative, latent), frames, positions in cases:
        expected = reference_condition(h, frames, positions)
        for side in (positive, negative):
            found = of_network(h, side, noise)
            assert torch.equal(found[:, 4:], expected[:, 4:]), positions
            assert relative(found[:, :4], expected[:, :4]) < 1e-6, positions
        assert latent["samples"].shape == (1, 4, 6, 8, 12)
        assert not latent["samples"].any()
    raises("AssertionError", "", lambda: torch.testing.assert_close(reference_condition(h, batch[:1], [0]),
                                                                    reference_condition(h, batch[:1], [5])))


def check_mask_is_in_order_of_time_in_the_conditioning(h: Host) -> None:
    """So that context windows cut it where they cut the latents."""
    positive, _, _ = outputs(h, "AllegroKeyframes", images=pictures(2), positions="6, -3")
    mask = positive[0][1]["concat_mask"]
    assert mask.shape == (1, 4, 6, 8, 12)
    assert torch.equal(mask, mask[..., :1, :1].expand_as(mask))
    assert [frame for frame in range(24) if mask[0, frame % 4, frame // 4, 0, 0] == 0] == [6, 21]


def check_samplers_equal_the_package(h: Host) -> None:
    """AllegroSampler, KSampler and SamplerCustomAdvanced against Denoiser(condition=...), each with its own noise."""
    given, sampling = first_and_last(h), h.module("allegro_model.sampling")
    condition = reference_condition(h, torch.cat((pictures(1), pictures(2)[1:])), [0, 23])
    sigmas = sampling.reference_sigmas(12)
    expected = package_run(h, condition, sigmas, sampling.NoiseSource([5], (4, 6, 8, 12)).draw)
    found = run(h, given, steps=12, seed=5)
    assert relative(found, expected) < 2e-5, relative(found, expected)
    other = package_run(h, condition[:, [*range(4), 5, 4, 6, 7]], sigmas, sampling.NoiseSource([5], (4, 6, 8, 12)).draw)
    assert relative(other, expected) > 1e-3, "another order of the mask has no effect"
    normal = comfy.samplers.calculate_sigmas(image_model(h).get_model_object("model_sampling"), "normal", 12)
    runs = {"KSampler": (lambda: core_run(h, given), normal), "advanced": (lambda: advanced(h, given, sigmas), sigmas)}
    for name, (job, levels) in runs.items():
        found, drawn = with_recorded_noise(job)
        first = comfy.sample.prepare_noise(torch.zeros((1, 4, 6, 8, 12)), 3)
        noise = iter([first, *drawn, first])  # the reference draws for the last step, too, and multiplies by 0
        expected = package_run(h, condition, levels, lambda noise=noise: next(noise))
        assert relative(found, expected) < 2e-5, (name, relative(found, expected))


def core_run(h: Host, given: tuple[Any, Any, Any], dit: Any = None, **changes: Any) -> Tensor:
    """KSampler, 12 steps."""
    positive, negative, latent = given
    return ksampler(h, dit or image_model(h), **{"positive": positive, "negative": negative, "latent_image": latent, "steps": 12,
                                                 "cfg": 8.0, **changes})


def advanced(h: Host, given: tuple[Any, Any, Any], sigmas: Tensor) -> Tensor:
    """SamplerCustomAdvanced."""
    nodes = {name: h.extra("nodes_custom_sampler", name)
             for name in ("CFGGuider", "RandomNoise", "KSamplerSelect", "SamplerCustomAdvanced")}
    positive, negative, latent = given
    guider = call(nodes["CFGGuider"], model=image_model(h), positive=positive, negative=negative, cfg=8.0)
    return call(nodes["SamplerCustomAdvanced"], noise=call(nodes["RandomNoise"], noise_seed=3), guider=guider,
                sampler=call(nodes["KSamplerSelect"], sampler_name="euler_ancestral"), sigmas=sigmas, latent_image=latent)["samples"]


def check_second_run_is_identical_and_inputs_are_unchanged(h: Host) -> None:
    positive, negative = prompts(h)
    images, clip = pictures(3), pictures(12)
    samples = {"samples": torch.randn((1, 4, 3, 8, 12), generator=torch.Generator().manual_seed(4))}
    inputs = {"positive": positive, "negative": negative, "images": images, "clip": clip, "samples": samples}
    before = copy.deepcopy(inputs)
    for node_id, changes in (("AllegroImageToVideo", {"start_image": images}),
                             ("AllegroKeyframes", {"images": images, "positions": "0 3 9"}),
                             ("AllegroContinueVideo", {"images": clip, "keep_frames": 8, "direction": "append", "samples": samples})):
        first, second = (outputs(h, node_id, **changes) for _ in range(2))
        assert same(first, second), node_id
        kept = copy.deepcopy(first)
        assert torch.equal(run(h, first), run(h, second)), node_id
        core_run(h, first, steps=2)
        assert same(first, kept), node_id
    joined = [h.run("AllegroJoinVideos", first=clip, second=clip, overlap=4, match_colors="second to first") for _ in range(2)]
    assert torch.equal(*joined)
    assert same(inputs, before)
    assert "concat_mask" not in positive[0][1]


def check_pictures_of_every_kind(h: Host) -> None:
    """Sizes, alpha, grey; the fits differ."""
    noise = torch.zeros((1, 4, 6, 8, 12))
    for image in (pictures(1, 31, 500), pictures(1, 300, 20), pictures(1, 64, 96, 1), pictures(1, 50, 50, 4), pictures(1, 1, 1)):
        found = of_network(h, outputs(h, "AllegroImageToVideo", start_image=image)[0], noise)
        assert relative(found, reference_condition(h, image, [0])) < 1e-6
    fits = [outputs(h, "AllegroImageToVideo", start_image=pictures(1, 200, 60), fit=fit)[0][0][1]["concat_latent_image"]
            for fit in ("crop", "pad", "stretch")]
    assert not torch.equal(fits[0], fits[1])
    assert not torch.equal(fits[1], fits[2])
    mixed = outputs(h, "AllegroKeyframes", images=pictures(1, 40, 40), images_3=pictures(2, 90, 20, 4), positions="2 1 0")
    assert torch.equal(of_network(h, mixed[0], noise)[:, 4:, 0, 0, 0], torch.tensor([[0.0, 1, 1, 1]]))


def check_items_of_a_batch_share_the_condition(h: Host) -> None:
    both = run(h, outputs(h, "AllegroImageToVideo", start_image=pictures(1), batch_size=2), seed=10)
    for item in (0, 1):
        assert relative(both[item : item + 1], run(h, outputs(h, "AllegroImageToVideo", start_image=pictures(1)), seed=10 + item)) < 1e-5


def check_model_without_frames_works_and_says_so(h: Host) -> None:
    """The image-to-video model in a text-to-video graph: zeros and a mask of ones, one line of warning."""
    plain = sample(h, image_model(h))
    condition = torch.cat((torch.zeros((1, 4, 6, 8, 12)), torch.ones((1, 4, 6, 8, 12))), dim=1)
    source = h.module("allegro_model.sampling").NoiseSource([3], (4, 6, 8, 12))
    expected = package_run(h, condition, h.module("allegro_model.sampling").reference_sigmas(4), source.draw)
    assert relative(sample(h, image_model(h), cfg=8.0), expected) < 2e-5
    assert torch.isfinite(plain).all()
    assert sum("no frame is given" in line for line in h.log) == 2, "one per run"
    h.log.clear()
    run(h, first_and_last(h))
    assert not [line for line in h.log if "no frame is given" in line]


def check_text_model_refuses_frames_that_it_would_ignore(h: Host) -> None:
    given = first_and_last(h)
    raises("GeometryError", "need the image-to-video transformer", lambda: run(h, given, parts(h)[0]))
    raises("GeometryError", "need the image-to-video transformer", lambda: core_run(h, given, parts(h)[0]))
    nothing = outputs(h, "AllegroImageToVideo")
    assert torch.equal(run(h, nothing, parts(h)[0]), sample(h, cfg=8.0)), "nothing is given: as without the node"


def check_latents_of_other_sizes(h: Host) -> None:
    """Another length is refused; a larger picture, as in a second pass, takes the enlarged condition."""
    positive, negative, _ = first_and_last(h)
    raises("GeometryError", "for a clip of 24 frames, the latent has 16",
           lambda: run(h, (positive, negative, {"samples": torch.zeros((1, 4, 4, 8, 12))})))
    for size in ((16, 24), (7, 11)):
        latent = {"samples": torch.zeros((1, 4, 6, *size))}
        assert run(h, (positive, negative, latent), steps=2).shape == (1, 4, 6, *size)


def check_frames_given_by_nodes_of_other_models_are_explained(h: Host) -> None:
    """Those of ComfyUI's inpainting node, in the size of pictures, and latents of 16 channels. One channel for all is enough."""
    positive, negative, latent = first_and_last(h)

    def changed(**values: Tensor) -> tuple[Any, Any, Any]:
        return [[positive[0][0], {**positive[0][1], **values}]], negative, latent

    latents = positive[0][1]["concat_latent_image"]
    for values in ({"concat_mask": torch.zeros((1, 1, 64, 96))}, {"concat_latent_image": latents.repeat(1, 4, 1, 1, 1)},
                   {"concat_mask": torch.zeros((1, 1, 5, 8, 12))}):
        raises("GeometryError", "it was made for another model", lambda values=values: run(h, changed(**values), steps=2))
    one = changed(concat_mask=torch.ones((1, 1, 6, 8, 12)))
    assert torch.equal(run(h, one, steps=2), run(h, changed(concat_mask=torch.ones((1, 4, 6, 8, 12))), steps=2))


def check_pictures_of_several_devices_meet(h: Host) -> None:
    """With --gpu-only a decoder leaves frames on the GPU, and a file is read elsewhere."""
    kept = comfy.model_management.intermediate_device
    comfy.model_management.intermediate_device = lambda: torch.device("meta")
    try:
        frames = h.module("nodes.bridge.conditioning").to_frames([pictures(1), pictures(2).to("meta"), None], 96, 64, "crop")
    finally:
        comfy.model_management.intermediate_device = kept
    assert (frames.device.type, frames.shape) == ("meta", (3, 3, 64, 96))


def check_several_conditionings(h: Host) -> None:
    """Combined, some with frames and some without, of other lengths of text, for a part of the steps or of the picture."""
    positive, negative, latent = first_and_last(h)
    plain = prompts(h)[0]
    combine, until, masked = (h.core.NODE_CLASS_MAPPINGS[name] for name in (
        "ConditioningCombine", "ConditioningSetTimestepRange", "ConditioningSetMask"))
    expected = core_run(h, (positive, negative, latent), steps=4)
    early = call(until, conditioning=positive, start=0.0, end=0.5)
    late = call(until, conditioning=plain, start=0.5, end=1.0)
    mask = torch.zeros((64, 96))
    mask[:, :48] = 1
    half = call(masked, conditioning=positive, mask=mask, strength=1.0, set_cond_area="default")
    other = call(masked, conditioning=plain, mask=1 - mask, strength=1.0, set_cond_area="default")
    for first, second in ((positive, plain), (early, late), (half, other)):
        both = call(combine, conditioning_1=first, conditioning_2=second)
        result = core_run(h, (both, negative, {"samples": torch.zeros((2, 4, 6, 8, 12))}), steps=4)
        assert torch.isfinite(result).all()
        assert relative(result[:1], expected) > 1e-4


def check_carried_latents_are_kept(h: Host) -> None:
    samples = torch.randn((1, 4, 5, 8, 12), generator=torch.Generator().manual_seed(6))
    clip = pictures(20)
    for direction, kept, source in (("append", slice(0, 2), slice(3, 5)), ("prepend", slice(4, 6), slice(0, 2))):
        given = outputs(h, "AllegroContinueVideo", images=clip, keep_frames=8, direction=direction, samples={"samples": samples},
                        batch_size=2)
        for result in (run(h, given), core_run(h, given)):
            assert result.shape == (2, 4, 6, 8, 12)
            assert relative(result[:, :, kept], samples[:, :, source].expand(2, -1, -1, -1, -1)) < 1e-5
            assert relative(result[:1, :, 2:4], result[1:, :, 2:4]) > 0.01, "the rest is made"


# ComfyUI's own nodes


def check_context_windows_cut_the_condition_where_they_cut_the_latents(h: Host) -> None:
    """Each window's network input against the condition of the frames in that window."""
    node = h.extra("nodes_context_windows", "ContextWindowsManualNode")
    settings = {"context_length": 4, "context_overlap": 1, "context_schedule": "standard_static", "context_stride": 1,
                "closed_loop": False, "fuse_method": "pyramid", "dim": 2, "freenoise": False, "causal_window_fix": False}
    known = {entry.id for entry in node.define_schema().inputs}
    dit = call(node, model=image_model(h), **{name: value for name, value in settings.items() if name in known})
    frames = pictures(3)
    given = outputs(h, "AllegroKeyframes", images=frames, positions="0 14 -1", length=32)
    seen: list[Tensor] = []
    network = dit.model.diffusion_model
    embed = network.pos_embed_mask.register_forward_pre_hook(lambda module, args: seen.append(args[0][:1, :, :, 0, 0].clone()))
    try:
        result = core_run(h, given, dit, steps=1)
    finally:
        embed.remove()
    assert result.shape == (1, 4, 8, 8, 12)
    assert torch.isfinite(result).all()
    found = {tuple(int(i) for i in (1 - mask).flatten(1).nonzero()[:, 1]) for mask in seen}  # frames given in a window of 16
    assert {(0, 14), (15,)} <= found, found
    assert all(mask.shape == (1, 4, 4) for mask in seen)


def check_caches_compiler_and_patches(h: Host) -> None:
    dit, given = image_model(h), first_and_last(h)
    plain = core_run(h, given)
    cached = call(h.extra("nodes_easycache", "EasyCacheNode"), model=dit, reuse_threshold=10.0, start_percent=0.0, end_percent=1.0,
                  verbose=False)
    assert torch.isfinite(core_run(h, given, cached)).all()
    assert any("EasyCache - skipped" in line and "skipped 0/" not in line for line in h.log), h.log
    skipping = call(h.extra("nodes_slg", "SkipLayerGuidanceDiT"), model=dit, double_layers="1", single_layers="", scale=3.0,
                    start_percent=0.0, end_percent=1.0, rescaling_scale=0.0)
    assert relative(core_run(h, given, skipping), plain) > 1e-3
    styled = call(h.core.NODE_CLASS_MAPPINGS["LoraLoaderModelOnly"], model=dit, lora_name="style.safetensors", strength_model=1.0)
    assert relative(core_run(h, given, styled), plain) > 1e-3
    assert torch.equal(core_run(h, given), plain)
    compiled = call(h.extra("nodes_torch_compile", "TorchCompileModel"), model=dit, backend="eager")
    assert relative(core_run(h, given, compiled, steps=2), core_run(h, given, steps=2)) < 1e-5


# Memory


def check_partial_loading_and_precision(h: Host) -> None:
    x = torch.randn((1, 12, 6, 8, 12), generator=torch.Generator().manual_seed(1))
    context = torch.randn((1, 20, 64), generator=torch.Generator().manual_seed(2))
    for dtype in ("default", "fp8_e4m3fn"):
        results = []
        for budget in (0, 1, 1_000_000):
            dit = model(h, TI2V, dtype)
            dit.load(torch.device("cpu"), lowvram_model_memory=budget, full_load=budget == 0)
            network = dit.model.diffusion_model
            if budget == 1:
                patches, linear = network.pos_embed_masked_video
                assert not any(getattr(layer, "comfy_patched_weights", False) for layer in (patches.proj, linear)), "resident"
            results.append(network(x, torch.tensor([500.0]), context))
            dit.unpatch_model()
        assert all(torch.equal(r, results[0]) for r in results), dtype
    assert network.pos_embed_mask[1].weight.dtype == torch.bfloat16, "small weights stay dense"
    assert 1e-6 < relative(run(h, first_and_last(h), model(h, TI2V, "bf16")), run(h, first_and_last(h))) < 0.1


def check_memory_estimate_counts_latents_once(h: Host) -> None:
    """The condition is thrown away after the patches: as much as text to video, and the larger weights on top."""
    image, text = image_model(h), parts(h)[0]
    shape = (2, 4, 22, 90, 160)
    assert image.model.memory_required(shape) == text.model.memory_required(shape) == 8 * 2 * 79200 * text.model.diffusion_model.config.width * 4
    extra = sum(p.numel() * p.element_size() for name, p in image.model.diffusion_model.named_parameters()
                if name.startswith("pos_embed_"))
    assert image.model_size() == text.model_size() + extra > text.model_size()


def check_image_model_loads_again_without_dynamic_memory(h: Host) -> None:
    loader, args = image_model(h).cached_patcher_init
    again = loader(*args, disable_dynamic=True)
    assert type(again.model).__name__ == "AllegroImageModel"
    assert again.model.state_dict().keys() == image_model(h).model.state_dict().keys()


def check_scale_of_a_model_that_shares_its_vae(h: Host) -> None:
    """As the bundled one: the transformer lies alone and names the folder with the rest."""
    models = h.base / "sharing"
    for folder in ("image/transformer", "text/vae"):
        (models / folder).mkdir(parents=True)
    (models / "text" / "vae" / "config.json").write_text('{"scale_factor": 0.5}', encoding="utf-8")
    (models / "image" / "model_index.json").write_text('{"allegro_shared": "../text"}', encoding="utf-8")
    assert h.module("nodes.bridge.model").vae_config_of(str(models / "image" / "transformer")).scale_factor == 0.5


# Joining


def check_joined_clips(h: Host) -> None:
    """No frame twice, none lost, no jump: a continuation with other colours takes those of the first."""
    base = pictures(40, 48, 64)
    first, second = base[:24], base[16:] * 0.9 + 0.03
    joined = h.run("AllegroJoinVideos", first=first, second=second, overlap=8, match_colors="second to first")
    assert joined.shape == (40, 48, 64, 3)
    assert joined.is_contiguous(), "other packs look at frames through views"
    assert torch.allclose(joined, base, atol=1e-4)
    assert torch.allclose(joined[:16], first[:16], atol=1e-6)
    other = h.run("AllegroJoinVideos", first=first * 0.9, second=base[16:], overlap=8, match_colors="first to second")
    assert torch.allclose(other, base, atol=1e-4)
    for choice in ("second to first", "first to second", "off"):  # more frames than are joined at once
        long = h.run("AllegroJoinVideos", first=base[:24], second=base[4:], overlap=20, match_colors=choice)
        assert torch.allclose(long, base, atol=1e-4), choice
    plain = h.run("AllegroJoinVideos", first=first, second=second, overlap=0, match_colors="off")
    assert torch.allclose(plain, torch.cat((first, second)), atol=1e-6)
    alpha = h.run("AllegroJoinVideos", first=torch.ones((4, 8, 8, 4)), second=torch.ones((4, 8, 8, 1)), overlap=1, match_colors="off")
    assert alpha.shape == (7, 8, 8, 3)


# Refusals


def check_wrong_inputs_are_explained(h: Host) -> None:
    image, clip = pictures(1), pictures(12)
    samples = {"samples": torch.zeros((1, 4, 3, 8, 12))}
    cases: list[tuple[str, str, dict[str, Any]]] = [
        ("AllegroImageToVideo", "length=4: image to video needs at least 8", {"length": 4}),
        ("AllegroImageToVideo", "width=100: must be a multiple of 16", {"width": 100}),
        ("AllegroImageToVideo", "fit='zoom': must be one of crop, pad, stretch", {"fit": "zoom"}),
        ("AllegroImageToVideo", "hold 24 and 0 pictures, the clip has 24 frames", {"start_image": pictures(24)}),
        ("AllegroImageToVideo", "expected [N, 1 to 4 channels, height, width]", {"start_image": torch.zeros((1, 8, 8, 5))}),
        ("AllegroKeyframes", "1 images and 2 positions ([0, 5])", {"images": image, "positions": "0, 5"}),
        ("AllegroKeyframes", "2 images and 1 positions ([0])", {"images": image, "images_2": image, "positions": "0"}),
        ("AllegroKeyframes", "frame 23 is given twice", {"images": pictures(2), "positions": "23, -1"}),
        ("AllegroKeyframes", "position 24: the clip has 24 frames", {"images": image, "positions": "24"}),
        ("AllegroKeyframes", "'1.5' is not a whole number", {"images": image, "positions": "1.5"}),
        ("AllegroKeyframes", "'x' is not a whole number", {"images": image, "positions": "0, x"}),
        ("AllegroKeyframes", "positions is empty", {"images": image, "positions": " , "}),
        ("AllegroKeyframes", "positions has 20001 characters", {"images": image, "positions": "1" * 20_001}),
        ("AllegroContinueVideo", "keep_frames=13: the clip has 12 frames", {"keep_frames": 13}),
        ("AllegroContinueVideo", "keep_frames=24: must be at least 1 and less than length, 24", {"keep_frames": 24}),
        ("AllegroContinueVideo", "keep_frames=0: must be at least 1", {"keep_frames": 0}),
        ("AllegroContinueVideo", "direction='up': must be one of append, prepend", {"direction": "up"}),
        ("AllegroContinueVideo", "with samples it must be a multiple of 4", {"keep_frames": 6, "samples": samples}),
        ("AllegroContinueVideo", "expected the latents of the clip", {"width": 128, "samples": samples}),
        ("AllegroContinueVideo", "at least 2, 8, 12]", {"samples": {"samples": torch.zeros((1, 4, 1, 8, 12))}}),
        ("AllegroContinueVideo", "latents of shape [1, 16", {"samples": {"samples": torch.zeros((1, 16, 3, 8, 12))}}),
    ]
    defaults = {"AllegroContinueVideo": {"images": clip, "keep_frames": 8, "direction": "append"}}
    for node_id, words, changes in cases:
        raises("GeometryError", words, lambda node_id=node_id, changes=changes: outputs(
            h, node_id, **{**defaults.get(node_id, {}), **changes}))
    raises("UnsupportedCheckpoint", "expected the VideoVAE", lambda: outputs(h, "AllegroImageToVideo", vae=object()))
    join = {"first": clip, "second": clip, "overlap": 4, "match_colors": "off"}
    for words, changes in (("the clips have 12 and 12 frames to share", {"overlap": 13}), ("overlap=-1", {"overlap": -1}),
                           ("Resize one of them", {"second": clip[:, :50]}), ("must be one of second to first", {"match_colors": "on"})):
        raises("GeometryError", words, lambda changes=changes: h.run("AllegroJoinVideos", **{**join, **changes}))
