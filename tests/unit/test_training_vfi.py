"""Training of the frame interpolator: exact triplets, true motion, the loss against closed forms, the stage in small."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from allegro_model.loading import load_interpolator
from allegro_model.training import losses
from allegro_model.training.data import draw_attributes
from allegro_model.training.distributed import Workers
from allegro_model.training.loop import LoopSettings
from allegro_model.training.recipe import RECIPE, TINY_VFI
from allegro_model.training.scenes import DRAW, Canvas, Moments
from allegro_model.training.vfi_data import clip_triplet, held_out_triplets, layers_triplet
from allegro_model.training.vfi_evaluate import (
    blend,
    evaluate_vfi,
    export_vfi,
    interpolate,
    measure,
    psnr,
    repeat,
)
from allegro_model.training.vfi_initialise import initialise_vfi
from allegro_model.training.vfi_stage import flow_error, stack, train_vfi
from allegro_model.vfi import EMAVFI
from allegro_model.vfi.emavfi.warp import warp

# Triplets


@pytest.mark.parametrize("kind", list(DRAW))
def test_moments_of_a_clip_are_its_frames(kind: str) -> None:
    rng = np.random.default_rng(3)
    attributes = draw_attributes(rng)
    while attributes["kind"] != kind:
        attributes = draw_attributes(rng)
    whole, part = (DRAW[kind](canvas, attributes, np.random.default_rng(4))
                   for canvas in (Canvas(), Moments(96, 64, 3, (0.0, 5 / 23, 1.0))))
    assert np.allclose(part, whole[[0, 5, 23]], atol=1e-4)


def test_triplets_follow_their_seed_and_have_the_size_asked_for() -> None:
    for draw in (clip_triplet, layers_triplet):
        one, two, other = (draw((64, 48), np.random.default_rng(seed)) for seed in (1, 1, 2))
        assert one.frames.shape == (3, 48, 64, 3)
        assert 0 <= one.frames.min() <= one.frames.max() <= 1
        assert 0 < one.position < 1
        assert np.array_equal(one.frames, two.frames)
        assert not np.array_equal(one.frames, other.frames)


def test_the_true_motion_leads_to_the_same_thing_in_both_frames() -> None:
    triplets = [layers_triplet((96, 64), np.random.default_rng(seed)) for seed in range(8)]
    first, between, second, position = stack(triplets)
    flow = torch.from_numpy(np.stack([t.flow for t in triplets])).float().permute(0, 3, 1, 2)
    still, moved = blend(first, second, position), blend(warp(first, flow[:, :2]), warp(second, flow[:, 2:]), position)
    wrong = [((frames - between).abs() > 0.05).float().mean() for frames in (still, moved)]
    assert wrong[1] < 0.4 * wrong[0]  # the rest is what one shape hides of another
    assert flow_error(flow, triplets) == 0
    assert flow_error(flow + 2, triplets).item() == pytest.approx(2.0)
    assert flow_error(flow, [replace(t, flow=None) for t in triplets]) == 0



def test_measured_triplets_are_frames_at_the_position() -> None:
    for position in (Fraction(1, 2), Fraction(1, 3)):
        for kind in DRAW:
            triplets = held_out_triplets(kind, 2, position)
            assert [t.position for t in triplets] == [float(position)] * 2
            assert triplets[0].frames.shape == (3, 64, 96, 3)
            assert not np.array_equal(triplets[0].frames, triplets[1].frames)


# Loss and methods


def test_laplacian_loss_of_a_constant_error_is_the_error() -> None:
    target = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    assert losses.laplacian_loss(target, target).item() == 0
    assert losses.laplacian_loss(target + 0.25, target, softness=1e-6).item() == pytest.approx(0.25, abs=1e-5)
    assert losses.laplacian_loss(target + 0.25, target, softness=0.5).item() == pytest.approx(0.3125**0.5 - 0.5, abs=1e-5)


def test_laplacian_loss_falls_as_a_shape_comes_nearer() -> None:
    def bar(left: int) -> torch.Tensor:
        frame = torch.zeros(1, 3, 32, 48)
        frame[..., left : left + 6] = 1
        return frame

    values = [losses.laplacian_loss(bar(20 + away), bar(20)).item() for away in (1, 3, 6, 9)]
    assert values == sorted(values)
    plain = [(bar(20 + away) - bar(20)).abs().mean().item() for away in (6, 9)]
    assert plain[0] == plain[1]  # which is why the plain error does not do


def test_vfi_loss_sums_its_terms() -> None:
    target = torch.zeros(1, 3, 16, 16)
    found, merged = (losses.laplacian_loss(target + away, target).item() for away in (0.1, 0.4))
    assert losses.vfi_loss(target + 0.1, target + 0.4, target).item() == pytest.approx(found + 0.5 * merged, abs=1e-5)


def test_repeating_and_blending() -> None:
    first, second = torch.zeros(2, 3, 4, 4), torch.ones(2, 3, 4, 4)
    position = torch.tensor([0.5, 0.75]).view(2, 1, 1, 1)
    assert repeat(first, second, position).mean(dim=(1, 2, 3)).tolist() == [0.0, 1.0]
    assert blend(first, second, position).mean(dim=(1, 2, 3)).tolist() == [0.5, 0.75]
    assert psnr(first, second).tolist() == [0.0, 0.0]
    assert psnr(first, first).tolist() == pytest.approx([60.0, 60.0])


@pytest.mark.parametrize("position", [Fraction(1, 2), Fraction(1, 3)])
def test_an_untrained_interpolator_compares_pictures(position: Fraction) -> None:
    torch.manual_seed(0)
    model = EMAVFI(TINY_VFI).eval()
    initialise_vfi(model)
    found, repeated, blended = measure([interpolate(model), repeat, blend], held_out_triplets("shape", 8, position))
    assert found > max(repeated, blended) + 2.0


# The stage


def test_the_stage_makes_a_file_that_loads_and_is_measured(tmp_path: Path) -> None:
    settings = LoopSettings(steps=2, learning_rate=1e-3, warmup=1, seed=1)
    train_vfi(Workers(), replace(RECIPE, vfi=settings, vfi_batch=2), tmp_path)
    path = tmp_path / "out" / "model.safetensors"
    assert export_vfi(tmp_path, path) == path.stat().st_size
    assert load_interpolator(path).config == TINY_VFI
    scores = evaluate_vfi(path, count=1)
    assert {"shape 1/2", "shape 1/3", "ball 1/2"} <= set(scores)
    triplets = held_out_triplets("shape", 1, Fraction(1, 2))
    assert scores["shape 1/2"][1:] == pytest.approx(measure([repeat, blend], triplets))
