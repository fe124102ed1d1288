"""What the bundled model draws: prompts and seeds that its training never saw, read by image analysis.

The thresholds lie a little under what the shipped weights reach; the measured scores are in
`allegro_model/assets/tiny/README.md`. `python -m allegro_model.training --stages evaluate --out DIR` prints them.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

import allegro_model
from allegro_model.loading import load_sampling_defaults
from allegro_model.sampling.schedule import alphas_cumprod
from allegro_model.training.analyse import analyse, compare
from allegro_model.training.captions import opposite, write_caption
from allegro_model.training.data import make_clip
from allegro_model.training.evaluate import Case, evaluation_cases, generate, load_models, score, to_frames
from allegro_model.training.losses import add_noise
from allegro_model.training.palette import combinations
from allegro_model.training.vae_stage import psnr, to_tensor
from allegro_model.vae import normalise

ASSETS = Path(allegro_model.__file__).parent / "assets" / "tiny"
CASES = evaluation_cases(shapes=24, scenes=4)
THRESHOLDS = {
    "shape.background": 0.95,
    "shape.object": 0.95,
    "shape.direction": 0.95,
    "shape.shape": 0.88,
    "sea.light": 0.85,
    "sea.direction": 0.85,
    "clouds.sky": 0.85,
    "clouds.direction": 0.85,
    "ball.object": 0.85,
    "ball.floor": 0.85,
    "ball.motion": 0.85,
}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def models():
    return load_models(ASSETS)


@pytest.fixture(scope="module")
def clips(models) -> list[np.ndarray]:
    return generate(models, CASES, load_sampling_defaults(ASSETS))


@pytest.fixture(scope="module")
def scores(clips) -> dict[str, tuple[int, int]]:
    return score(clips, CASES)


def test_prompts_are_new_to_the_model() -> None:
    reserved = set(combinations(held_out=True))
    shapes = [case.attributes for case in CASES if case.attributes["kind"] == "shape"]
    assert len(shapes) >= 24
    for a in shapes:
        assert (a["object"], a["background"], a["shape"], a["direction"]) in reserved
    assert len({case.seed for case in CASES}) >= 24


@pytest.mark.parametrize("attribute", list(THRESHOLDS))
def test_clips_follow_their_prompts(attribute: str, scores: dict[str, tuple[int, int]]) -> None:
    right, total = scores[attribute]
    assert right / total >= THRESHOLDS[attribute], f"{attribute}: {right} of {total}; all scores: {scores}"


def test_frames_belong_together(clips: list[np.ndarray]) -> None:
    inside = np.mean([np.abs(np.diff(clip.astype(np.float32), axis=0)).mean() for clip in clips])
    mixed = [np.abs(a[12].astype(np.float32) - b[12]).mean() for a, b in itertools.pairwise(clips)]
    assert inside < 0.25 * np.mean(mixed)


def test_one_colour_word_changes_that_colour_only(models) -> None:
    words = ("red", "yellow", "pink")
    cases = [Case(f"a {word} circle moving right on a gray background", 5,
                  {"kind": "shape", "object": word, "background": "gray"}) for word in words]
    for clip, case in zip(generate(models, cases, load_sampling_defaults(ASSETS)), cases, strict=True):
        assert compare(clip, case.attributes) == {"object": True, "background": True}


def test_the_pipeline_draws_the_same_clip(models, clips: list[np.ndarray]) -> None:
    case = CASES[0]
    frames = allegro_model.AllegroPipeline.from_pretrained("tiny", device="cpu", dtype=torch.float32)(
        case.prompt, seed=case.seed)
    assert np.abs(to_frames(frames[0]).astype(int) - clips[0]).mean() < 1.0


def test_the_right_caption_predicts_the_noise_better_than_the_opposite_one(models) -> None:
    dit, encode, vae = models
    rng = np.random.default_rng(4)
    moving = [clip for clip in map(make_clip, range(800_000, 800_060)) if clip.attributes["kind"] == "shape"][:16]
    frames = torch.stack([to_tensor(clip.frames) for clip in moving])
    latents = normalise(torch.cat([vae.encode(frame[None])[0] for frame in frames]), vae.config.scale_factor)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    noisy = add_noise(latents, noise, alphas_cumprod()[800].expand(len(latents)))
    errors = []
    for change in (dict, opposite):
        embeds, mask = encode([write_caption(change(clip.attributes), rng) for clip in moving])
        with torch.no_grad():
            eps = dit(noisy, torch.full((len(latents),), 800.0), embeds, mask)
        errors.append(float((eps - noise).square().mean()))
    assert errors[0] < 0.6 * errors[1]


def test_the_vae_keeps_what_a_prompt_says(models) -> None:
    vae = models[2]
    assert psnr(vae, range(810_000, 810_004)) >= 28.0
    for seed in range(810_000, 810_004):
        clip = make_clip(seed)
        decoded = vae.decode(vae.encode(to_tensor(clip.frames)[None])[0])
        found = analyse(to_frames(decoded[0]), clip.attributes["kind"])
        assert {**found, **{k: v for k, v in clip.attributes.items() if k != "kind"}} == found


def test_the_whole_model_is_small() -> None:
    assert sum(path.stat().st_size for path in ASSETS.rglob("*") if path.is_file()) <= 10e6
