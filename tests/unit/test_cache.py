"""Step caches: what is computed, what is used again, and that nothing is left behind."""

import gc
import json
import weakref
from dataclasses import replace

import pytest
import torch
from tiny import DIT, tiny_dit

from allegro_model.errors import ScheduleError, UnsupportedCheckpoint
from allegro_model.sampling import (
    CACHE_LEVELS,
    SAMPLERS,
    Denoiser,
    NoiseSource,
    Prompt,
    StepCache,
    reference_sigmas,
)
from allegro_model.sampling.cache import BUNDLED, CacheCalibration, CacheLevel

SHAPE = (4, 2, 4, 4)


def made(**values):
    """A cache of a level with these values."""
    return StepCache("safe", replace(BUNDLED, levels={"safe": CacheLevel(**values)}))


def prompts():
    generator = torch.Generator().manual_seed(1)
    return [Prompt(torch.randn(1, 5, DIT.caption_channels, generator=generator), torch.arange(5)[None] < length) for length in (5, 3)]


def clip(cache, *, batched=False, num_steps=20, guidance_scale=3.0, dit=None):
    """The latents of a short run."""
    sigmas, noise = reference_sigmas(num_steps), NoiseSource([3], SHAPE)
    denoise = Denoiser(dit or tiny_dit(), *prompts(), guidance_scale, batched=batched, cache=cache)
    return SAMPLERS["euler_ancestral"](denoise, noise.draw() * sigmas[0], sigmas, noise.draw)


def counted(dit):
    """(timestep, batch) of every evaluation of `dit` from now on."""
    seen, original = [], dit.denoise
    dit.denoise = lambda x, t, p, **k: (seen.append((float(t[0]), len(x))), original(x, t, p, **k))[1]
    return seen


distance = BUNDLED.distance


def test_distance_grows_with_the_interval_and_is_symmetric():
    assert distance(500, 500) == 0
    assert 0 < distance(500, 480) < distance(500, 400) == distance(400, 500)
    assert distance(999, 0) == pytest.approx(distance(999, 500) + distance(500, 0))


def test_a_prediction_is_used_again_until_the_run_has_moved_too_far():
    cache = made(threshold=distance(500, 400))
    computed = []

    def at(key, timestep):
        return float(cache.predict([key], timestep, lambda: computed.append((key, timestep)) or torch.full((1, 1), timestep)))

    assert [at("a", t) for t in (500, 450, 401, 399, 390)] == [500, 500, 500, 399, 399]
    assert computed == [("a", 500), ("a", 399)]
    assert at("b", 390) == 390, "another condition has its own"
    assert at("a", 999) == 999, "also when a run starts anew"


def test_no_threshold_computes_every_step():
    cache = made()
    assert [float(cache.predict(["a"], 500, lambda value=value: torch.full((1, 1), value))) for value in (1.0, 2.0)] == [1, 2]


def test_parts_of_a_batch_keep_their_own():
    cache = made(threshold=distance(500, 400))
    cache.predict(["a"], 500, lambda: torch.zeros(1, 1))
    both = cache.predict(["b", "a"], 480, lambda: torch.tensor([[1.0], [2.0]]))
    assert both.flatten().tolist() == [1, 0]
    again = cache.predict(["a", "b"], 470, lambda: pytest.fail("both are known"))
    assert again.flatten().tolist() == [0, 1]


def test_what_is_handed_out_may_be_changed():
    cache = made(threshold=1.0)
    cache.predict(["a"], 500, lambda: torch.zeros(1, 1)).add_(1)
    assert float(cache.predict(["a"], 500, lambda: torch.ones(1, 1))) == 0


def test_guidance_is_left_out_outside_its_interval():
    dit = tiny_dit()
    seen = counted(dit)
    clip(made(guidance=(200.0, 850.0)), dit=dit)
    timesteps = [t for t, _ in seen]
    assert all((timesteps.count(t) == 2) == (200 <= t <= 850) for t in timesteps)
    assert len(set(timesteps)) == 20


@pytest.mark.parametrize("level", CACHE_LEVELS[1:])
def test_one_batch_or_two_give_the_same_clip(level):
    assert torch.allclose(clip(StepCache(level)), clip(StepCache(level), batched=True), atol=1e-4)


def test_without_guidance_there_is_nothing_to_leave_out_of_it():
    cache = StepCache("draft")
    clip(cache, guidance_scale=1.0)
    assert "negative" not in cache.summary()


@pytest.mark.parametrize(("level", "most"), [("safe", 1 / 1.2), ("fast", 1 / 1.6), ("draft", 1 / 3)])
def test_levels_leave_out_more_and_more(level, most):
    """Of 20 steps; with more steps more is left out. The summary tells the truth."""
    dit = tiny_dit()
    seen = counted(dit)
    cache = StepCache(level)
    assert not torch.equal(clip(cache, dit=dit), clip(None))
    assert len(seen) <= 40 * most
    assert cache.summary().startswith(f"step cache {level}: {len(seen)} of ")


def test_a_cache_knows_when_it_left_nothing_out():
    idle, busy = made(), StepCache("draft")
    for cache in (idle, busy):
        assert cache.idle, "before the run"
        clip(cache)
    assert idle.idle
    assert not busy.idle


def test_a_cache_that_leaves_nothing_out_changes_nothing_but_rounding():
    assert torch.allclose(clip(made()), clip(None), atol=1e-3)


def test_attentions_are_broadcast_as_published():
    """Self-attention every 2nd step and cross-attention every 6th, counted from the first, in timesteps 100 to 850 only."""
    dit = tiny_dit()
    seen = []
    for name in ("attn1", "attn2"):
        dit.transformer_blocks[1].get_submodule(name).register_forward_hook(lambda *_, name=name: seen.append((step[0], name)))
    step, original = [-1], dit.denoise

    def denoise(*args, **kwargs):
        step[0] += 1
        return original(*args, **kwargs)

    dit.denoise = denoise
    cache = StepCache("broadcast")
    clip(cache, guidance_scale=1.0, dit=dit)
    inside = [100 < 999 - 999 / 19 * i < 850 for i in range(20)]
    assert [i for i, name in seen if name == "attn1"] == [i for i in range(20) if i % 2 == 0 or not inside[i]]
    assert [i for i, name in seen if name == "attn2"] == [i for i in range(20) if i % 6 == 0 or not inside[i]]
    left_out = 2 * (40 - len(seen))
    assert f"{left_out} of 80 attentions used again" in cache.summary()
    assert not cache._attended, "what nobody needs any more is not kept"


def test_nothing_outlives_the_run():
    cache = StepCache("draft")
    dit = tiny_dit()
    clip(cache, dit=dit)
    known = [weakref.ref(held.denoised) for held in cache._held.values()]
    assert known
    del cache
    gc.collect()
    assert all(reference() is None for reference in known)
    assert torch.equal(clip(StepCache("draft"), dit=dit), clip(StepCache("draft"), dit=dit))


def test_an_unknown_level_is_refused():
    with pytest.raises(ScheduleError, match="must be one of off, safe, fast, draft, broadcast"):
        StepCache("reckless")


def test_a_calibration_of_another_model_counts():
    quick = replace(BUNDLED, name="Quick", travelled=tuple(3 * x for x in BUNDLED.travelled))
    dit = tiny_dit()
    seen = counted(dit)
    cache = StepCache("draft", quick)
    clip(cache, dit=dit)
    many = len(seen)
    clip(StepCache("draft"), dit=dit)
    assert many > len(seen) - many
    assert cache.summary().endswith(", calibrated on Quick")


def test_a_calibration_survives_its_file():
    levels = {"safe": CacheLevel(0.25, (0.0, 800.0))}
    saved = json.loads(json.dumps(replace(BUNDLED, name="Large", levels=levels).to_dict()))
    again = CacheCalibration.from_dict({**saved, "measured": 1}, "x.json")
    assert again.levels == {**BUNDLED.levels, **levels}, "what was not calibrated stays"
    assert (again.name, again.timesteps, again.travelled) == ("Large", BUNDLED.timesteps, BUNDLED.travelled)
    for wrong, words in (({}, "no calibration"), ({**saved, "levels": {"safe": 3}}, "no calibration"), ({**saved, "timesteps": [0, 5]}, "damaged"),
                         ({**saved, "travelled": [float("nan")] * 14}, "damaged"), ({**saved, "timesteps": saved["timesteps"][::-1]}, "damaged")):
        with pytest.raises(UnsupportedCheckpoint, match=rf"x.json is {words}.*allegro calibrate"):
            CacheCalibration.from_dict(wrong, "x.json")
