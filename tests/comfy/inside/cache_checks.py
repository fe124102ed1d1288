"""Checks of the step cache node that need ComfyUI's Python objects; see checks.py."""

import gc
import re
import weakref
from typing import Any

import torch
from bootstrap import Host, call
from checks import advanced, conditioning, empty, ksampler, parts, prompts, raises, relative, sample
from image_checks import core_run, first_and_last, image_model, pictures, reference_condition
from image_checks import run as image_run
from torch import Tensor


def with_cache(h: Host, level: str, dit: Any = None) -> Any:
    return h.run("AllegroCache", model=dit or parts(h)[0], level=level)


def summaries(h: Host) -> list[str]:
    return [line for line in h.log if "Allegro: step cache" in line]


class Evaluations:
    """Counts the conditions that the network of a MODEL evaluates, while the block lasts."""

    def __init__(self, dit: Any) -> None:
        self.network, self.count = dit.model.diffusion_model, 0

    def __enter__(self) -> "Evaluations":
        def count(module: Any, args: Any) -> None:
            self.count += len(args[0])

        self.hook = self.network.pos_embed.register_forward_pre_hook(count)
        return self

    def __exit__(self, *error: object) -> None:
        self.hook.remove()


def check_every_sampler_works_with_the_cache(h: Host) -> None:
    """Fewer evaluations, as many as the log says, and a result near the exact one; the input stays as it is."""
    dit = parts(h)[0]
    sigmas = h.module("allegro_model.sampling").reference_sigmas(20)
    runs = {"AllegroSampler": lambda dit: sample(h, dit, steps=20), "KSampler": lambda dit: ksampler(h, dit, steps=20),
            "advanced": lambda dit: advanced(h, dit, sigmas)}
    for name, run in runs.items():
        exact = run(dit)
        for level in ("safe", "draft", "broadcast"):
            h.log.clear()
            with Evaluations(dit) as seen:
                result = run(with_cache(h, level))
            (line,) = summaries(h)
            computed = int(re.search(rf"step cache {level}: (\d+) of", line).group(1))
            assert seen.count == computed, (name, line, seen.count)
            assert (seen.count == 40) == (level == "broadcast"), (name, line)
            assert not torch.equal(result, exact), (name, level)
            assert torch.isfinite(result).all()
        assert torch.equal(run(with_cache(h, "off")), exact), name
        assert torch.equal(run(dit), exact), name


def check_a_cache_that_leaves_nothing_out_warns(h: Host) -> None:
    for steps, warned in ((1, True), (20, False)):
        h.own_warnings.clear()
        sample(h, with_cache(h, "broadcast"), steps=steps)
        assert any("left nothing out" in line for line in h.own_warnings) is warned, (steps, h.own_warnings)


def check_a_cache_equals_that_of_the_package(h: Host) -> None:
    """The same clip as the command line's, with its cache."""
    sampling = h.module("allegro_model.sampling")
    dit, (positive, negative) = parts(h)[0], prompts(h)
    for level in ("fast", "draft", "broadcast"):
        result = sample(h, with_cache(h, level), steps=20)
        pair = [sampling.Prompt(entry[0][0].float(), entry[0][1]["attention_mask"].bool()) for entry in (positive, negative)]
        sigmas, noise = sampling.reference_sigmas(20), sampling.NoiseSource([3], (4, 6, 8, 12))
        denoise = sampling.Denoiser(package_model(h, dit), *pair, 3.0, batched=False, cache=sampling.StepCache(level))
        expected = sampling.SAMPLERS["euler_ancestral"](denoise, noise.draw() * sigmas[0], sigmas, noise.draw)
        expected = expected / dit.model.latent_format.scale_factor
        assert relative(result, expected) < 1e-3, (level, relative(result, expected))


def package_model(h: Host, dit: Any) -> Any:
    return h.module("allegro_model.loading").load_dit(h.base / "models" / "allegro" / "tiny-random", dtype=torch.float32)


def check_given_frames_work_with_the_cache(h: Host) -> None:
    """Image to video: the same clip as the package's with its cache, and not the exact one."""
    sampling, given = h.module("allegro_model.sampling"), first_and_last(h)
    condition = reference_condition(h, torch.cat((pictures(1), pictures(2)[1:])), [0, 23])
    dit = h.module("allegro_model.loading").load_dit(h.base / "models" / "allegro" / "tiny-random-ti2v", dtype=torch.float32)
    pair = [sampling.Prompt(c[0][0].float(), c[0][1]["attention_mask"].bool()) for c in prompts(h)]
    denoise = sampling.Denoiser(dit, *pair, 8.0, batched=True, condition=condition, cache=sampling.StepCache("draft"))
    sigmas, noise = sampling.reference_sigmas(12), sampling.NoiseSource([5], (4, 6, 8, 12))
    expected = sampling.SAMPLERS["euler_ancestral"](denoise, noise.draw() * sigmas[0], sigmas, noise.draw)
    model = with_cache(h, "draft", image_model(h))
    result = image_run(h, given, model, steps=12, seed=5)
    assert relative(result * model.model.latent_format.scale_factor, expected) < 1e-3
    assert relative(result, image_run(h, given, steps=12, seed=5)) > 1e-3
    assert torch.isfinite(core_run(h, given, model)).all()


def check_a_second_run_starts_with_an_empty_cache(h: Host) -> None:
    dit = with_cache(h, "draft")
    module = h.module("nodes.bridge.cache")
    made: list[weakref.ref[Any]] = []
    original = module.StepCache

    class Watched(original):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            made.append(weakref.ref(self))

    module.StepCache = Watched
    try:
        first = sample(h, dit, steps=20)
        assert torch.equal(sample(h, dit, steps=20), first)
    finally:
        module.StepCache = original
    gc.collect()
    assert len(made) == 2
    assert all(reference() is None for reference in made), "a cache outlived its run"


def check_prompts_do_not_share_predictions(h: Host) -> None:
    """Two positive prompts and a batch of two clips, evaluated together or one by one; without the prompt in the key they mix."""
    positive, negative = prompts(h)
    other = conditioning(h, "a green square moves down over a white background")
    combined = h.core.NODE_CLASS_MAPPINGS["ConditioningCombine"]().combine(positive, other)[0]
    short = [[entry[0][:, :7], {"attention_mask": torch.ones((1, 7), dtype=torch.long)}] for entry in negative]
    dit, counts = with_cache(h, "draft"), []
    for other_negative in (negative, short):
        with Evaluations(dit) as seen:
            both = sample(h, dit, empty(h, 2), positive=combined, negative=other_negative, steps=20)
        counts.append(seen.count)
        assert both.shape == (2, 4, 6, 8, 12)
        assert relative(both[:1], sample(h, dit, positive=combined, negative=other_negative, steps=20)) < 1e-3
    assert counts[0] == counts[1]
    module = h.module("nodes.bridge.cache")
    original = module._keys
    module._keys = lambda x, options: original(x, {**options, "uuids": ["one"] * len(options["uuids"])})
    try:
        assert relative(sample(h, dit, empty(h, 2), positive=combined, negative=short, steps=20), both) > 1e-3
    finally:
        module._keys = original


def check_guidance_of_left_out_layers_keeps_its_own_predictions(h: Host) -> None:
    """It evaluates the same condition once more without a layer: the cache must not answer with the whole network's."""
    node = h.extra("nodes_slg", "SkipLayerGuidanceDiT")
    def skipping(dit: Any) -> Any:
        return call(node, model=dit, double_layers="1", single_layers="", scale=3.0, start_percent=0.0, end_percent=1.0,
                    rescaling_scale=0.0)

    plain = ksampler(h, with_cache(h, "draft"), steps=20)
    assert relative(ksampler(h, skipping(with_cache(h, "draft")), steps=20), plain) > 1e-3


def check_context_windows_do_not_share_predictions(h: Host) -> None:
    """Every window is evaluated before any of its predictions is used again; without the window in the key it is not."""
    node = h.extra("nodes_context_windows", "ContextWindowsManualNode")
    settings = {"context_length": 4, "context_overlap": 1, "context_schedule": "standard_static", "context_stride": 1,
                "closed_loop": False, "fuse_method": "pyramid", "dim": 2, "freenoise": False, "causal_window_fix": False}
    known = {entry.id for entry in node.define_schema().inputs}
    dit = call(node, model=with_cache(h, "draft"), **{name: value for name, value in settings.items() if name in known})
    with Evaluations(dit) as first:
        ksampler(h, dit, steps=1)
    assert first.count == 2, "one prediction for each of two windows, without guidance"
    with Evaluations(dit) as seen:
        result = ksampler(h, dit, steps=20)
    assert torch.isfinite(result).all()
    assert 4 < seen.count < 80
    module = h.module("nodes.bridge.cache")
    original = module._keys
    module._keys = lambda x, options: original(x, {name: value for name, value in options.items() if name != "context_window"})
    try:
        with Evaluations(dit) as mixed:
            confused = ksampler(h, dit, steps=20)
    finally:
        module._keys = original
    assert mixed.count < seen.count
    assert relative(confused, result) > 1e-3


def check_a_compiled_model_works_with_the_cache(h: Host) -> None:
    """Predictions are used again as without the compiler; attentions are not, since it could not follow that."""
    node = h.extra("nodes_torch_compile", "TorchCompileModel")
    dit = h.run("AllegroAttention", model=parts(h)[0], attention="sdpa")  # the compiler follows it three times as fast
    for level, like in (("draft", "draft"), ("broadcast", "off")):
        compiled = call(node, model=with_cache(h, level, dit), backend="eager")
        assert relative(sample(h, compiled, steps=12), sample(h, with_cache(h, like, dit), steps=12)) < 1e-3, level


def check_the_cache_is_for_our_models_and_levels(h: Host) -> None:
    other = parts(h)[0].clone()
    other.model = type("Other", (), {"diffusion_model": torch.nn.Linear(1, 1)})()
    raises("CheckpointMismatch", "made for Allegro", lambda: with_cache(h, "safe", other))
    raises("ScheduleError", "must be one of off, safe", lambda: with_cache(h, "reckless"))


def check_the_last_cache_counts(h: Host) -> None:
    twice = with_cache(h, "draft", with_cache(h, "safe"))
    h.log.clear()
    result = sample(h, twice, steps=20)
    (line,) = summaries(h)
    assert "step cache draft" in line
    (line,) = [line for line in h.log if "Allegro: 2 layers" in line]
    assert ", step cache draft, about" in line, line
    assert torch.equal(result, sample(h, with_cache(h, "draft"), steps=20))
    none: Tensor = sample(h, with_cache(h, "off", twice), steps=20)
    assert torch.equal(none, sample(h, steps=20))
