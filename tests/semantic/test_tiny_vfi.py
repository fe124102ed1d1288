"""What the bundled frame interpolator puts between two frames of clips that its training never saw.

The thresholds lie under what the shipped weights reach; the measured values are in
`allegro_model/assets/tiny-vfi/README.md`. `python -m allegro_model.training --stages vfi --out DIR` prints them.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch

from allegro_model.loading import (
    bundled_interpolator,
    bundled_model,
    load_interpolator,
    load_sampling_defaults,
)
from allegro_model.training.evaluate import evaluation_cases, generate, load_models
from allegro_model.training.vfi_data import Triplet, held_out_triplets
from allegro_model.training.vfi_evaluate import (
    Method,
    blend,
    evaluate_vfi,
    interpolate,
    measure,
    psnr,
    repeat,
)
from allegro_model.training.vfi_stage import stack

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model() -> Method:
    return interpolate(load_interpolator(bundled_interpolator()))


@pytest.fixture(scope="module")
def scores() -> dict[str, list[float]]:
    return evaluate_vfi(bundled_interpolator())


@pytest.mark.parametrize("position", ["1/2", "1/3"])
def test_moving_shapes_are_at_least_3_db_better_than_repeated_or_blended(scores, position: str) -> None:
    found, repeated, blended = scores[f"shape {position}"]
    assert found >= max(repeated, blended) + 3.0, scores


@pytest.mark.parametrize("kind", ["sea", "clouds", "ball"])
@pytest.mark.parametrize("position", ["1/2", "1/3"])
def test_moving_scenes_are_better_than_repeated_or_blended(scores, kind: str, position: str) -> None:
    found, repeated, blended = scores[f"{kind} {position}"]
    assert found >= max(repeated, blended) + 1.5, scores


def test_later_positions_mirror_earlier_ones(model: Method) -> None:
    triplets = held_out_triplets("shape", 24, Fraction(2, 3))
    found, blended = measure([model, blend], triplets)
    assert found >= blended + 3.0


def test_the_position_decides_where_a_shape_is(model: Method) -> None:
    """The frame made for a third of the way is nearer to the true frame there than the one made for two thirds."""
    first, between, second, position = stack(held_out_triplets("shape", 24, Fraction(1, 3)))
    right, wrong = (psnr(model(first, second, where), between).mean() for where in (position, 1 - position))
    assert right >= wrong + 3.0


def test_every_second_frame_of_generated_clips_comes_back(model: Method) -> None:
    assets = bundled_model("tiny")
    cases = evaluation_cases(shapes=4, scenes=0)
    clips = generate(load_models(assets), cases, load_sampling_defaults(assets))
    triplets = [Triplet(clip[k - 1 : k + 2].astype(np.float32) / 255, 0.5) for clip in clips for k in range(1, 23, 2)]
    found, repeated, blended = measure([model, repeat, blend], triplets)
    assert found >= max(repeated, blended) + 3.0


def test_equal_frames_stay_as_they_are(model: Method) -> None:
    for kind in ("shape", "sea", "clouds", "ball"):
        first, _, _, _ = stack(held_out_triplets(kind, 4, Fraction(1, 2)))
        assert psnr(model(first, first, torch.full((4, 1, 1, 1), 0.5)), first).min() > 35.0


def test_other_sizes_run(model: Method) -> None:
    first, between, second, position = stack(held_out_triplets("shape", 8, Fraction(1, 2)))
    cut = [frames[..., 5:59, 7:90] for frames in (first, between, second)]  # multiples of nothing
    found, blended = (psnr(method(cut[0], cut[2], position), cut[1]).mean() for method in (model, blend))
    assert found >= blended + 2.0


def test_the_file_is_small() -> None:
    assert bundled_interpolator().stat().st_size <= 500_000
