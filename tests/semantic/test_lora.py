"""What the bundled LoRA does to the bundled model: a new colour where it is asked for, the old ones elsewhere."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from allegro_model.loading import apply_loras, bundled_model, load_dit, load_sampling_defaults
from allegro_model.training.analyse import analyse
from allegro_model.training.captions import write_caption
from allegro_model.training.evaluate import Case, evaluation_cases, generate, load_models, score
from allegro_model.training.lessons import lora_combinations
from allegro_model.training.palette import LORA_COLOUR

ROOT = bundled_model("tiny")
LORA = "tiny/orange"

pytestmark = pytest.mark.slow


def new_cases() -> list[Case]:
    """Combinations with the new colour that the LoRA's training never saw, and seeds nobody used."""
    rng = np.random.default_rng(1)
    cases = []
    for number, values in enumerate(lora_combinations(held_out=True) * 2):
        attributes = {"kind": "shape", **dict(zip(("object", "background", "shape", "direction"), values, strict=True))}
        cases.append(Case(write_caption(attributes, rng), 3000 + number, attributes))
    return cases


@pytest.fixture(scope="module")
def with_lora() -> Any:
    dit, encode, vae = load_models(ROOT)
    apply_loras(dit, [(LORA, 1.0)])
    return dit, encode, vae


@pytest.fixture(scope="module")
def clips(with_lora: Any) -> list[np.ndarray]:
    return generate(with_lora, new_cases(), load_sampling_defaults(ROOT))


@pytest.fixture(scope="module")
def scores(clips: list[np.ndarray]) -> dict[str, tuple[int, int]]:
    return score(clips, new_cases())


def test_without_the_lora_no_object_has_the_colour() -> None:
    clips = generate(load_models(ROOT), new_cases()[::2], load_sampling_defaults(ROOT))
    found = [analyse(clip, "shape")["object"] for clip in clips]
    assert found.count(LORA_COLOUR) <= 0.1 * len(found), found


@pytest.mark.parametrize(("attribute", "least"), [("object", 0.9), ("background", 0.9), ("direction", 0.9), ("shape", 0.85)])
def test_with_it_prompts_are_followed(attribute: str, least: float, scores: dict[str, tuple[int, int]]) -> None:
    right, total = scores[f"shape.{attribute}"]
    assert total >= 12
    assert right / total >= least, scores


def test_other_prompts_are_drawn_as_before(with_lora: Any) -> None:
    cases = evaluation_cases(shapes=8, scenes=2)
    found = score(generate(with_lora, cases, load_sampling_defaults(ROOT)), cases)
    assert all(right / total >= 0.75 for right, total in found.values()), found
    right, total = (sum(counts) for counts in zip(*found.values(), strict=True))
    assert right / total >= 0.9, found


def test_strength_goes_from_nothing_to_all(with_lora: Any, clips: list[np.ndarray]) -> None:
    """Half of it is on the way: the object's colour comes nearer to orange with the strength."""
    cases, found = new_cases()[:3], {1.0: clips[:3]}
    for strength in (0.0, 0.5):
        dit = load_dit(ROOT, dtype=torch.float32)
        apply_loras(dit, [(LORA, strength)])
        found[strength] = generate((dit, *with_lora[1:]), cases, load_sampling_defaults(ROOT))
    nothing, half, full = (np.mean([_blue_of_object(clip) for clip in found[strength]]) for strength in (0.0, 0.5, 1.0))
    assert nothing > half > full, (nothing, half, full)


def _blue_of_object(frames: np.ndarray) -> float:
    """Blue of the pixels that differ most from the background; orange has none."""
    pixels = frames.astype(np.float32) / 255
    distance = np.abs(pixels - np.median(pixels, axis=(0, 1, 2))).sum(-1)
    return float(pixels[distance > 0.6 * distance.max()][:, 2].mean())
