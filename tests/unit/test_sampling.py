"""Schedule, noise and samplers against closed forms."""

import math

import pytest
import torch
from tiny import tiny_dit

from allegro_model.errors import ScheduleError
from allegro_model.sampling import (
    SAMPLERS,
    Denoiser,
    NoiseSource,
    Prompt,
    reference_sigmas,
    reference_timesteps,
    sigma_table,
    sigma_to_timestep,
    timestep_to_sigma,
)
from allegro_model.sampling.guidance import check_guidance

MEAN, SPREAD = 0.7, 0.5


def gaussian_denoiser(x, sigma):
    """The ideal prediction when the data is normal with MEAN and SPREAD."""
    return (x * SPREAD**2 + MEAN * sigma**2) / (SPREAD**2 + sigma**2)


def ode_solution(x, sigma):
    """Where the probability-flow ODE takes x from noise level sigma to 0, for the same data."""
    return MEAN + (x - MEAN) * SPREAD / math.sqrt(SPREAD**2 + float(sigma) ** 2)


def start(num_steps, shape=(1, 4, 2, 4, 4), seed=3, denoise=1.0):
    sigmas = reference_sigmas(num_steps, denoise)
    noise = NoiseSource([seed], shape[1:])
    return sigmas, noise, noise.draw() * sigmas[0]


@pytest.mark.parametrize(("name", "bound"), [("euler", 0.02), ("dpmpp_2m", 0.004)])
def test_deterministic_samplers_solve_the_ode(name, bound):
    sigmas, noise, x = start(200)
    result = SAMPLERS[name](gaussian_denoiser, x, sigmas, noise.draw)
    assert (result - ode_solution(x, sigmas[0])).abs().max() < bound


@pytest.mark.parametrize("name", ["euler_ancestral", "dpmpp_2m_sde"])
def test_stochastic_samplers_reach_the_distribution(name):
    sigmas, noise, x = start(200, shape=(1, 4, 4, 40, 40))
    result = SAMPLERS[name](gaussian_denoiser, x, sigmas, noise.draw)
    assert result.mean().item() == pytest.approx(MEAN, abs=0.02)
    assert result.std().item() == pytest.approx(SPREAD, rel=0.06)


def test_second_order_is_more_exact_than_first():
    sigmas, noise, x = start(30)
    target = ode_solution(x, sigmas[0])
    first, second = (SAMPLERS[n](gaussian_denoiser, x, sigmas, noise.draw) for n in ("euler", "dpmpp_2m"))
    assert (second - target).abs().max() < (first - target).abs().max() / 3


@pytest.mark.parametrize("name", sorted(SAMPLERS))
@pytest.mark.parametrize("cut", [1, 5, 11])
def test_stopping_and_resuming_equals_one_run(name, cut):
    sigmas, noise, x = start(12)
    whole = SAMPLERS[name](gaussian_denoiser, x, sigmas, noise.draw)

    sigmas, noise, x = start(12)
    seen = []
    half = SAMPLERS[name](gaussian_denoiser, x, sigmas, noise.draw, stop=cut, callback=seen.append)
    later = NoiseSource([3], x.shape[1:], skip=1 + cut)
    rest = SAMPLERS[name](gaussian_denoiser, half, sigmas, later.draw, start=cut, previous=seen[-1].denoised)
    assert torch.equal(rest, whole)


def test_callback_sees_every_step_and_can_cancel():
    class Stop(Exception):
        pass

    steps = []

    def callback(info):
        steps.append(info.step)
        if info.step == 4:
            raise Stop

    sigmas, noise, x = start(10)
    with pytest.raises(Stop):
        SAMPLERS["euler"](gaussian_denoiser, x, sigmas, noise.draw, callback=callback)
    assert steps == [1, 2, 3, 4]


def test_an_item_does_not_depend_on_its_neighbours():
    together = NoiseSource([5, 6, 7], (4, 2, 4, 4))
    alone = NoiseSource([6], (4, 2, 4, 4))
    for _ in range(3):
        assert torch.equal(together.draw()[1:2], alone.draw())


@pytest.mark.parametrize("num_steps", [1, 2, 20, 50, 100, 333])
def test_time_and_sigma_are_inverse(num_steps):
    timesteps, sigmas = reference_timesteps(num_steps), reference_sigmas(num_steps)
    assert len(sigmas) == num_steps + 1
    assert sigmas[-1] == 0
    assert (sigmas.diff() < 0).all()
    # one unit in the last place of a float32 near 999
    assert (sigma_to_timestep(sigmas[:-1]) - timesteps).abs().max() <= 3.1e-5
    assert torch.allclose(timestep_to_sigma(timesteps), sigmas[:-1], rtol=1e-6)


def test_one_step_starts_from_pure_noise():
    assert reference_sigmas(1)[0] == sigma_table()[-1]


@pytest.mark.parametrize(("denoise", "total"), [(0.5, 40), (0.3, 66), (0.99, 20), (1.0, 20)])
def test_denoise_runs_the_tail_of_a_longer_schedule(denoise, total):
    assert torch.equal(reference_sigmas(20, denoise), reference_sigmas(total)[-21:])


@pytest.mark.parametrize(("num_steps", "denoise"), [
    (0, 1.0), (-3, 1.0), (10_001, 1.0), (20, 0.0), (20, 1.5), (20, math.nan), (2.5, 1.0), (True, 1.0)])
def test_bad_schedules_are_refused(num_steps, denoise):
    with pytest.raises(ScheduleError, match="must be"):
        reference_sigmas(num_steps, denoise)


@pytest.mark.parametrize(("num_steps", "denoise"), [(100, 1e-9), (1, 5e-324)])
def test_a_denoise_too_small_to_hold_its_schedule_is_refused(num_steps, denoise):
    with pytest.raises(ScheduleError, match=r"tail of .* steps.*Use a denoise of at least"):
        reference_sigmas(num_steps, denoise)


@pytest.mark.parametrize("scale", [math.nan, math.inf, -1.0])
def test_bad_guidance_is_refused(scale):
    with pytest.raises(ScheduleError, match="finite"):
        check_guidance(scale)


def prompts():
    generator = torch.Generator().manual_seed(0)
    mask = torch.arange(8) < 5
    return [Prompt(torch.randn(1, 8, 24, generator=generator), m[None]) for m in (mask, torch.arange(8) < 3)]


@torch.no_grad()
def test_batched_and_sequential_guidance_agree():
    dit = tiny_dit()
    positive, negative = prompts()
    x, sigma = torch.randn(1, 4, 2, 4, 4, generator=torch.Generator().manual_seed(1)), torch.tensor(3.0)
    one, two = (Denoiser(dit, positive, negative, 4.0, batched=b)(x, sigma) for b in (True, False))
    assert torch.allclose(one, two, atol=1e-5)
    expected = {}
    for name, prompt in (("positive", positive), ("negative", negative)):
        scaled = x / math.sqrt(10.0)
        expected[name] = dit(scaled, sigma_to_timestep(sigma)[None], prompt.embeds, prompt.mask)
    guided = expected["negative"] + 4.0 * (expected["positive"] - expected["negative"])
    assert torch.allclose(two, x - 3.0 * guided, atol=1e-4)


@torch.no_grad()
def test_guidance_one_never_evaluates_the_negative_prompt():
    dit = tiny_dit()
    calls = []
    original = dit.denoise
    dit.denoise = lambda *a, **k: (calls.append(len(a[0])), original(*a, **k))[1]
    positive, negative = prompts()
    Denoiser(dit, positive, negative, 1.0, batched=True)(torch.zeros(1, 4, 2, 4, 4), torch.tensor(1.0))
    assert calls == [1]
