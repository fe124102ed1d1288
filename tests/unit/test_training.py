"""Training: losses against closed forms, seeded data, resume, data parallel, and the whole command in small."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from allegro_model.dit import AllegroDiT, AllegroTI2V
from allegro_model.loading import load_dit, load_vae
from allegro_model.loading.defaults import bundled_model
from allegro_model.sampling.schedule import alphas_cumprod
from allegro_model.text import clean_caption
from allegro_model.training import losses
from allegro_model.training.analyse import analyse, compare
from allegro_model.training.captions import opposite, write_caption, write_motion
from allegro_model.training.data import draw_attributes, make_clip
from allegro_model.training.distributed import Workers
from allegro_model.training.evaluate import evaluation_cases
from allegro_model.training.initialise import initialise_dit, initialise_ti2v, initialise_vae
from allegro_model.training.loop import Loop, LoopSettings, step_generator
from allegro_model.training.palette import BACKGROUND_COLOURS, OBJECT_COLOURS, combinations
from allegro_model.training.preview import cells, fit_colours
from allegro_model.training.recipe import TINY_DIT, TINY_VAE
from allegro_model.training.scenes import Canvas
from allegro_model.training.ti2v_cache import keep, make_ti2v_clip, third_positions
from allegro_model.training.tokenizer import save_tokenizer
from allegro_model.training.vae_stage import psnr
from allegro_model.vae import VideoVAE

# Losses


def test_noised_latents_have_the_reference_proportions() -> None:
    latents, noise = torch.full((2, 4, 1, 2, 2), 3.0), torch.full((2, 4, 1, 2, 2), 5.0)
    noisy = losses.add_noise(latents, noise, torch.tensor([0.64, 0.36]))
    assert torch.allclose(noisy[0], torch.tensor(0.8 * 3 + 0.6 * 5))
    assert torch.allclose(noisy[1], torch.tensor(0.6 * 3 + 0.8 * 5))


def test_eps_loss_is_the_weighted_mean_over_kept_positions() -> None:
    noise = torch.zeros(2, 4, 1, 2, 2)
    prediction = torch.ones_like(noise)
    prediction[1] = 3.0
    assert losses.eps_loss(prediction, noise).item() == pytest.approx((1 + 9) / 2)
    weights = torch.tensor([2.0, 0.5])
    assert losses.eps_loss(prediction, noise, sample_weight=weights).item() == pytest.approx((2 * 1 + 0.5 * 9) / 2)
    mask = torch.zeros(2, 1, 1, 2, 2)
    mask[1, ..., 0] = 1
    assert losses.eps_loss(prediction, noise, mask=mask).item() == pytest.approx(9.0)
    assert losses.eps_loss(prediction, noise, mask=torch.zeros_like(mask)).item() == 0.0


def test_weights_follow_their_formulas() -> None:
    alpha_bar = alphas_cumprod()[[0, 500, 999]]
    snr = alpha_bar / (1 - alpha_bar)
    expected = [min(float(value), 5.0) / float(value) for value in snr]
    assert losses.min_snr_weight(alpha_bar, 5.0).tolist() == pytest.approx(expected)
    velocity = [min(1 / float(value), 1000.0) for value in alpha_bar]
    assert losses.velocity_weight(alpha_bar, 1000.0).tolist() == pytest.approx(velocity)


def test_velocity_weight_turns_eps_error_into_v_error() -> None:
    alpha_bar = torch.tensor([0.3])
    latents, noise, wrong = torch.randn(3, 1, 4, 1, 2, 2, generator=torch.Generator().manual_seed(0)).unbind(0)
    noisy = losses.add_noise(latents, noise, alpha_bar)
    clean = (noisy - math.sqrt(0.7) * wrong) / math.sqrt(0.3)
    v, v_wrong = (math.sqrt(0.3) * e - math.sqrt(0.7) * x for e, x in ((noise, latents), (wrong, clean)))
    loss = losses.eps_loss(wrong, noise, sample_weight=losses.velocity_weight(alpha_bar, 1000.0))
    assert loss.item() == pytest.approx((v - v_wrong).square().mean().item(), rel=1e-4)


def test_offset_noise_adds_one_constant_per_sample_and_channel() -> None:
    shape = (2, 4, 3, 8, 8)
    plain = losses.offset_noise(shape, 0.0, torch.Generator().manual_seed(1))
    shifted = losses.offset_noise(shape, 0.02, torch.Generator().manual_seed(1))
    change = (shifted - plain).flatten(2)
    assert change.std(dim=2).max() < 1e-5
    assert change.mean(dim=2).unique().numel() == 8
    assert 0 < change.abs().max() < 0.1


def test_object_weight_counts_the_object_and_its_border_five_times() -> None:
    latents = torch.zeros(1, 4, 3, 9, 9)
    latents[:, 0, 1, 4, 4] = 2.0
    weight = losses.object_weight(latents)
    assert weight.mean().item() == pytest.approx(1.0)
    near, far = weight[0, 0, 1, 3, 5], weight[0, 0, 1, 0, 0]
    assert (near / far).item() == pytest.approx(5.0)
    assert int((weight > far).sum()) == 27


def test_given_frames_count_nine_times_and_their_neighbours_five_times() -> None:
    frames = torch.zeros(3, 24, 16, 16)
    mask = torch.cat([keep(frames, positions).latent_mask(1, 1)[..., 0, 0] for positions in ([0], [6, 23], range(24))])
    weight = losses.given_weight(losses.given_frames(mask))
    assert weight.shape == (3, 1, 6, 1, 1)
    assert torch.allclose(weight.mean(dim=2), torch.tensor(1.0))
    relative = (weight / weight.amin(dim=2, keepdim=True)).flatten(1).tolist()
    assert relative[0] == pytest.approx([9, 5, 1, 1, 1, 1])
    assert relative[1] == pytest.approx([5, 9, 5, 1, 5, 9])  # pixel frame 6 is in latent frame 1
    assert relative[2] == pytest.approx([1] * 6)


def test_kl_matches_torch_distributions() -> None:
    mean, logvar = torch.randn(2, 1, 4, 2, 3, 3, generator=torch.Generator().manual_seed(2)).unbind(0)
    posterior = torch.distributions.Normal(mean, (logvar / 2).exp())
    expected = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).mean()
    assert losses.kl_to_standard_normal(mean, logvar).item() == pytest.approx(expected.item(), rel=1e-5)


def test_vae_loss_sums_its_terms() -> None:
    frames, zero = torch.zeros(1, 3, 2, 4, 4), torch.zeros(1, 4, 1, 1, 1)
    decoded = torch.full_like(frames, 0.5)
    assert losses.vae_loss(decoded, frames, zero, zero).item() == pytest.approx(0.5)
    assert losses.vae_loss(decoded, frames, zero, zero, mse_weight=2.0).item() == pytest.approx(0.5 + 2 * 0.25)
    assert losses.vae_loss(decoded, frames, zero + 2, zero, kl_weight=0.1).item() == pytest.approx(0.5 + 0.1 * 2.0)
    seen = []

    def lpips(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        seen.append((a.shape, b.shape))
        return torch.tensor([3.0])

    assert losses.vae_loss(decoded, frames, zero, zero, lpips=lpips).item() == pytest.approx(0.5 + 0.3)
    assert seen == [((2, 3, 4, 4), (2, 3, 4, 4))]


def test_captions_are_dropped_at_the_given_rate() -> None:
    captions = [str(n) for n in range(4000)]
    dropped = losses.drop_captions(captions, 0.25, "", torch.Generator().manual_seed(0))
    assert all(a in ("", b) for a, b in zip(dropped, captions, strict=True))
    assert dropped.count("") == pytest.approx(1000, abs=100)
    assert losses.drop_captions(captions, 0.0, "", torch.Generator()) == captions


# Data


def test_a_seed_is_a_clip() -> None:
    clips = [make_clip(seed) for seed in (5, 5, 6)]
    assert clips[0].frames.shape == (24, 64, 96, 3)
    assert np.array_equal(clips[0].frames, clips[1].frames)
    assert clips[0].attributes == clips[1].attributes
    assert not np.array_equal(clips[0].frames, clips[2].frames)


def test_size_does_not_change_the_scene() -> None:
    small, large = make_clip(8).frames, make_clip(8, Canvas(192, 128, 24)).frames
    shrunk = large.reshape(24, 64, 2, 96, 2, 3).mean(axis=(2, 4))
    assert np.abs(small - shrunk).mean() < 3


def test_training_never_sees_the_held_out_combinations() -> None:
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(4000):
        attributes = draw_attributes(rng)
        if attributes["kind"] == "shape":
            seen.add(tuple(attributes[name] for name in ("object", "background", "shape", "direction")))
    assert seen == set(combinations(held_out=False))
    reserved = set(combinations(held_out=True))
    assert len(reserved) >= 30
    assert not seen & reserved
    for axis in range(4):  # every single word occurs in both parts
        assert {c[axis] for c in reserved} == {c[axis] for c in seen}


def test_captions_survive_cleaning_and_tokenise_into_whole_words(tmp_path: Path) -> None:
    from transformers import T5TokenizerFast

    tokenizer = T5TokenizerFast.from_pretrained(save_tokenizer(tmp_path))
    rng = np.random.default_rng(1)
    for _ in range(300):
        caption = write_caption(draw_attributes(rng), rng)
        assert clean_caption(caption) == caption
        words = len(caption.split()) + caption.count(",")
        assert len(tokenizer(caption).input_ids) == words + 1  # and the end token
    assert tokenizer("").input_ids == [1]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    assert 2 not in tokenizer("zebra-like 4 things").input_ids


def test_scene_wordings_are_split_between_training_and_tests() -> None:
    rng = np.random.default_rng(2)
    scenes = [a for a in (draw_attributes(rng) for _ in range(2000)) if a["kind"] != "shape"]
    training = {write_caption(attributes, rng) for attributes in scenes}
    cases = evaluation_cases(4, 8)
    tests = {case.prompt for case in cases if case.attributes["kind"] != "shape"}
    assert len(tests) >= 12
    assert not training & tests


def test_the_analysis_reads_drawn_clips_without_an_error() -> None:
    for seed in range(7000, 7080):
        clip = make_clip(seed)
        assert all(compare(clip.frames, clip.attributes).values()), clip.attributes


def test_the_analysis_tells_wrong_clips_apart() -> None:
    for seed in range(7100, 7120):
        clip = make_clip(seed)
        if "direction" in clip.attributes:
            assert not compare(clip.frames, opposite(clip.attributes))["direction"]
            still = np.repeat(clip.frames[12:13], 24, axis=0)
            assert analyse(still, clip.attributes["kind"])["direction"] == "none"


def test_image_to_video_clips_mostly_begin_in_mid_motion() -> None:
    canvas, whole, moved = Canvas(96, 64, 8), 0, 0
    for seed in range(40):
        clip, drawn = make_ti2v_clip(seed, canvas), make_clip(seed, canvas)
        assert clip.attributes == drawn.attributes
        assert clip.frames.shape == drawn.frames.shape
        if np.array_equal(clip.frames, drawn.frames):
            whole += 1
            continue
        moved += 1
        assert clip.attributes["kind"] != "ball"
        assert np.array_equal(clip.frames, make_clip(seed, Canvas(96, 64, 16)).frames[8:])
    assert moved > 10
    assert whole > 10


def test_the_third_canvas_holds_starts_ends_and_others() -> None:
    rng = np.random.default_rng(0)
    drawn = [third_positions(rng, 24) for _ in range(2000)]
    assert all(p == sorted(set(p)) and 0 <= p[0] and p[-1] < 24 for p in drawn)
    starts = [p for p in drawn if p == list(range(len(p)))]
    ends = [p for p in drawn if p == list(range(24 - len(p), 24)) and p not in starts]
    assert len(starts) / 2000 == pytest.approx(0.42, abs=0.04)  # and those of the other kinds that happen to be one
    assert len(ends) / 2000 == pytest.approx(0.40, abs=0.04)
    assert {len(p) for p in starts} == set(range(1, 25))
    assert sum(p == [23] for p in drawn) / 2000 == pytest.approx(0.25, abs=0.04)


def test_motion_captions_name_no_colour_and_use_known_words(tmp_path: Path) -> None:
    from transformers import T5TokenizerFast

    tokenizer = T5TokenizerFast.from_pretrained(save_tokenizer(tmp_path))
    rng = np.random.default_rng(1)
    for _ in range(300):
        caption = write_motion(draw_attributes(rng), rng)
        assert clean_caption(caption) == caption
        assert not set(caption.split()) & {*OBJECT_COLOURS, *BACKGROUND_COLOURS, "orange", "grass", "wooden"}
        assert len(tokenizer(caption).input_ids) == len(caption.split()) + 1


# Starting values


def test_an_untrained_vae_returns_the_mean_colours() -> None:
    torch.manual_seed(0)
    vae = VideoVAE(TINY_VAE)
    initialise_vae(vae)
    assert psnr(vae, range(50, 51)) > 18.0


def test_an_untrained_dit_returns_its_input() -> None:
    torch.manual_seed(0)
    dit = AllegroDiT(TINY_DIT)
    initialise_dit(dit)
    noise = torch.randn(2, 4, 6, 8, 12, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        eps = dit(noise, torch.tensor([999.0, 500.0]), torch.randn(2, 5, 64), None)
    assert (eps - noise).square().mean().sqrt() < 0.15


def test_image_to_video_starts_as_text_to_video() -> None:
    torch.manual_seed(0)
    plain, given = AllegroDiT(TINY_DIT), AllegroTI2V(TINY_DIT)
    initialise_ti2v(given, plain.state_dict())
    noisy, condition, embeds = torch.randn(1, 4, 6, 8, 12), torch.randn(1, 8, 6, 8, 12), torch.randn(1, 5, 64)
    with torch.no_grad():
        expected = plain(noisy, torch.tensor([500.0]), embeds, None)
        found = given(torch.cat((noisy, condition), dim=1), torch.tensor([500.0]), embeds, None)
    assert torch.equal(found, expected)
    assert torch.equal(given.pos_embed_mask[0].proj.weight, plain.pos_embed.proj.weight)


# The loop


def _line(path: Path, steps: int, workers: Workers | None = None) -> tuple[Loop, nn.Linear]:
    torch.manual_seed(3)
    model = nn.Linear(3, 2)
    settings = LoopSettings(steps=steps, learning_rate=0.05, warmup=4, seed=9, save_every=5, log_every=100)
    return Loop({"model": model}, settings, workers or Workers(), path), model


def _run(loop: Loop, model: nn.Linear) -> None:
    def loss(step: int, generator: torch.Generator) -> torch.Tensor:
        x = torch.randn(8, 3, generator=generator)
        return (model(x) - x[:, :2] * (1 + step % 2)).square().mean()

    loop.run(loss)


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    whole, model = _line(tmp_path / "whole.pt", 20)
    _run(whole, model)
    first, part = _line(tmp_path / "part.pt", 10)
    _run(first, part)
    second, resumed = _line(tmp_path / "part.pt", 20)
    assert second.step == 10
    _run(second, resumed)
    assert torch.equal(resumed.weight, model.weight)
    assert torch.equal(second.ema.average["model"]["weight"], whole.ema.average["model"]["weight"])
    assert not torch.equal(part.weight, model.weight)


def test_the_same_seed_gives_the_same_weights(tmp_path: Path) -> None:
    weights = []
    for name in ("a", "b"):
        loop, model = _line(tmp_path / f"{name}.pt", 12)
        _run(loop, model)
        weights.append(model.weight.detach())
    assert torch.equal(*weights)


def test_steps_and_processes_draw_different_numbers() -> None:
    draws = {float(torch.rand(1, generator=step_generator(1, step, rank))) for step in range(10) for rank in range(4)}
    assert len(draws) == 40


def test_a_step_without_a_finite_gradient_changes_nothing(tmp_path: Path) -> None:
    loop, model = _line(tmp_path / "x.pt", 1)
    before = model.weight.detach().clone()
    loop.run(lambda step, generator: model.weight.sum() * float("inf"))
    assert torch.equal(model.weight, before)


def test_the_rate_rises_holds_and_falls() -> None:
    settings = LoopSettings(steps=100, learning_rate=1.0, warmup=10, decay=50)
    assert settings.rate(0) == pytest.approx(0.1)
    assert settings.rate(30) == 1.0
    assert settings.rate(75) == pytest.approx(0.5)
    assert settings.rate(99) == pytest.approx(0.02)


_PARALLEL = """
import sys
from pathlib import Path
import torch
from allegro_model.training.distributed import Workers, launch

def work(workers: Workers, folder: str) -> None:
    layer = torch.nn.Linear(2, 1)
    torch.nn.init.constant_(layer.weight, float(workers.rank))
    workers.broadcast([layer])
    (layer(torch.ones(1, 2)) * (workers.rank + 1)).sum().backward()
    workers.average_gradients(layer.parameters())
    torch.save([layer.weight.detach(), layer.weight.grad], Path(folder) / f"{workers.rank}.pt")

if __name__ == "__main__":
    launch(work, 2, sys.argv[1])
"""


@pytest.mark.slow
def test_processes_share_weights_and_average_gradients(tmp_path: Path) -> None:
    script = tmp_path / "parallel.py"
    script.write_text(_PARALLEL)
    subprocess.run([sys.executable, str(script), str(tmp_path)], check=True, cwd=Path(__file__).parents[2],
                   env=_environment())
    for rank in range(2):
        weight, gradient = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert torch.equal(weight, torch.zeros(1, 2))
        assert torch.allclose(gradient, torch.full((1, 2), 1.5))


def _environment() -> dict[str, str]:
    import os

    return {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}


def test_colours_are_fitted_by_least_squares() -> None:
    generator = torch.Generator().manual_seed(0)
    factors, bias = torch.randn((4, 3), generator=generator), torch.tensor([0.1, -0.2, 0.3])
    latents = torch.randn((50, 4), generator=generator)
    found, found_bias = fit_colours(latents, latents @ factors + bias)
    assert torch.allclose(found.float(), factors, atol=1e-5)
    assert torch.allclose(found_bias.float(), bias, atol=1e-5)


def test_previews_of_the_bundled_model_show_clips_it_was_not_fitted_to() -> None:
    vae = load_vae(bundled_model("tiny"))
    latents, colours = cells(vae, range(950_000, 950_003))
    shown = latents @ torch.tensor(vae.config.latent_rgb_factors) + torch.tensor(vae.config.latent_rgb_factors_bias)
    unexplained = (shown - colours).square().mean(0) / colours.var(0)
    assert float(unexplained.max()) < 0.06


@pytest.mark.slow
def test_the_command_makes_a_model_folder_that_loads(tmp_path: Path) -> None:
    from allegro_model import AllegroPipeline

    command = [sys.executable, "-m", "allegro_model.training", "--out", str(tmp_path / "made"), "--scale", "0.0002",
               "--processes", "1", "--stages", "tokenizer", "vae", "latents", "dit", "decoder", "ti2v_latents", "ti2v", "export"]
    subprocess.run(command, check=True, env=_environment(), cwd=tmp_path)
    frames = AllegroPipeline.from_pretrained(tmp_path / "made")("a red circle moving left on a blue background", num_steps=2)
    assert frames.shape == (1, 3, 24, 64, 96)
    assert torch.isfinite(frames).all()
    assert isinstance(load_dit(tmp_path / "made-ti2v"), AllegroTI2V)
