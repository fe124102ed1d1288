"""Twenty steps of the reference sampler against diffusers' scheduler, drawing its own noise from the same seed."""

import torch
from parity.live import build_dit, diffusers, dit_inputs, rotary
from torch import Tensor

from allegro_model.sampling import (
    SAMPLERS,
    Denoiser,
    NoiseSource,
    Prompt,
    reference_sigmas,
    reference_timesteps,
)

STEPS, SEED, SHAPE = 20, 42, (4, 3, 8, 12)
# The defaults of the released scheduler_config.json.
SCHEDULE = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}


def scheduler():
    found = diffusers.EulerAncestralDiscreteScheduler(**SCHEDULE)
    found.set_timesteps(STEPS)
    return found


def reference_run(eps) -> list[Tensor]:
    """diffusers' loop: `eps(scaled latents, timestep)`; the state after each step."""
    found, generator = scheduler(), torch.Generator().manual_seed(SEED)
    x = torch.randn((1, *SHAPE), generator=generator) * found.init_noise_sigma
    states = []
    for t in found.timesteps:
        x = found.step(eps(found.scale_model_input(x, t), t), t, x, generator=generator, return_dict=False)[0]
        states.append(x)
    return states


def our_run(denoise) -> list[Tensor]:
    sigmas, noise, states = reference_sigmas(STEPS), NoiseSource([SEED], SHAPE), []
    SAMPLERS["euler_ancestral"](denoise, noise.draw() * sigmas[0], sigmas, noise.draw,
                                callback=lambda info: states.append(info.latents))
    return states


def test_schedule_is_bit_for_bit_the_same() -> None:
    found = scheduler()
    assert torch.equal(reference_timesteps(STEPS), found.timesteps)
    assert torch.equal(reference_sigmas(STEPS), found.sigmas)


def test_trajectory_is_bit_for_bit_the_same() -> None:
    """Same seed, same model outputs: same noise, same arithmetic, same latents after every step."""
    expected = reference_run(lambda x, t: torch.tanh(1.7 * x))
    actual = our_run(lambda x, sigma: x - sigma * torch.tanh(1.7 * (x / (sigma**2 + 1) ** 0.5)))
    assert len(actual) == STEPS
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@torch.inference_mode()
def test_guided_trajectory_through_both_networks() -> None:
    """The whole loop with guidance. The networks round differently, and guidance 7.5 multiplies that; relative to
    latents of magnitude 100 and more the paths stay within 1e-5."""
    ours, network = build_dit()
    _, _, embeds, mask = dit_inputs((2, *SHAPE))
    rope = rotary(ours.config, (2, *SHAPE))

    def eps(x: Tensor, t: Tensor) -> Tensor:
        out = network(hidden_states=torch.cat((x, x)), encoder_hidden_states=embeds.flip(0), timestep=t.expand(2),
                      encoder_attention_mask=mask.flip(0).float(), image_rotary_emb=rope, return_dict=False)[0]
        negative, positive = out.chunk(2)
        return negative + 7.5 * (positive - negative)

    positive, negative = (Prompt(embeds[i : i + 1], mask[i : i + 1]) for i in (0, 1))
    expected = reference_run(eps)
    for batched in (True, False):
        actual = our_run(Denoiser(ours, positive, negative, 7.5, batched=batched))
        for a, b in zip(actual, expected, strict=True):
            assert float((a - b).abs().max() / b.abs().max()) < 1e-5
