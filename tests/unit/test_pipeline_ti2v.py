"""Image to video in the pipeline: parts from two folders, the condition, kept latents, resuming."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from snapshot import write_snapshot, write_ti2v_snapshot
from torch import Tensor

from allegro_model import AllegroPipeline, pipeline
from allegro_model.conditioning import GivenFrames, build_condition
from allegro_model.dit import AllegroTI2V
from allegro_model.errors import (
    CheckpointError,
    CheckpointMismatch,
    GeometryError,
    NotEnoughMemory,
    UnsupportedCheckpoint,
)
from allegro_model.latents import pack_state, read_state
from allegro_model.loading import describe, load_sampling_defaults
from allegro_model.sampling import SAMPLERS
from allegro_model.vae import normalise

pytest.importorskip("transformers", reason="the text encoder needs transformers (extra: standalone)")

PROMPT = "a red circle moves to the right"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """T2V, a whole model, and beside it TI2V, which has a transformer only."""
    folder = tmp_path_factory.mktemp("models")
    write_snapshot(folder / "T2V")
    write_ti2v_snapshot(folder / "TI2V", "../T2V")
    return folder


@pytest.fixture(scope="module")
def ti2v(models: Path) -> AllegroPipeline:
    return AllegroPipeline.from_pretrained(models / "TI2V", device="cpu")


@pytest.fixture(scope="module")
def prompts(ti2v: AllegroPipeline) -> Any:
    return ti2v.encode_prompt(PROMPT, guidance_scale=8.0)


def picture(value: float = 0.5, height: int = 40, width: int = 70) -> Tensor:
    """[3, h, w] in [0, 1], brighter to the right."""
    return torch.linspace(0, value, width).expand(3, height, width)


def run(pipe: AllegroPipeline, prompts: Any, given: GivenFrames, **overrides: Any) -> Tensor:
    settings = pipe.settings(**overrides)
    return pipe.raw_latents(pipe.sample(prompts, pipe.start(settings, condition=pipe.condition(given))))


# Loading


def test_missing_parts_come_from_the_shared_folder(ti2v: AllegroPipeline, models: Path) -> None:
    own = AllegroPipeline.from_pretrained(models / "T2V", device="cpu")
    assert isinstance(ti2v.dit, AllegroTI2V)
    assert ti2v.image_to_video
    assert not own.image_to_video
    assert ti2v.vae_config == own.vae_config
    assert ti2v(PROMPT).shape == (1, 3, 8, 32, 32)
    described = describe(models / "TI2V")
    assert list(described["components"]) == ["transformer", "vae", "text_encoder", "tokenizer"]
    assert [part.get("shared_from") for part in described["components"].values()] == [None, "T2V", "T2V", "T2V"]
    assert "missing" not in described["title"]


def test_parts_of_its_own_win(models: Path, tmp_path: Path) -> None:
    shutil.copytree(models, tmp_path, dirs_exist_ok=True)
    shutil.copytree(tmp_path / "T2V" / "vae", tmp_path / "TI2V" / "vae")
    (tmp_path / "T2V" / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"damaged")
    assert AllegroPipeline.from_pretrained(tmp_path / "TI2V", device="cpu").vae_config.block_out_channels == (8, 8, 8, 16)


@pytest.mark.parametrize(("shared", "error", "words"), [
    ("../Lost", CheckpointError, r"takes its vae from .*Lost, which does not exist"),
    ("/etc", UnsupportedCheckpoint, "expected the name of a folder"),
    ("../../T2V", UnsupportedCheckpoint, "expected the name of a folder"),
    ("..", UnsupportedCheckpoint, "expected the name of a folder"),
    (7, UnsupportedCheckpoint, "expected the name of a folder"),
    ("../TI2V", CheckpointError, "has no folder vae/"),
])
def test_wrong_shared_folders_are_refused(models: Path, tmp_path: Path, shared: Any, error: type, words: str) -> None:
    shutil.copytree(models / "TI2V", tmp_path / "TI2V")
    index = json.loads((tmp_path / "TI2V" / "model_index.json").read_text())
    (tmp_path / "TI2V" / "model_index.json").write_text(json.dumps({**index, "allegro_shared": shared}))
    with pytest.raises(error, match=words):
        _ = AllegroPipeline.from_pretrained(tmp_path / "TI2V", device="cpu").vae_config


@pytest.mark.parametrize("path", ["TI2V", "TI2V/transformer", "TI2V/transformer/diffusion_pytorch_model.safetensors"])
def test_only_the_transformer_of_another_model(models: Path, ti2v: AllegroPipeline, path: str) -> None:
    pipe = AllegroPipeline.from_pretrained(models / "T2V", transformer=models / path, device="cpu")
    assert pipe.image_to_video
    assert pipe.defaults.guidance_scale == 8.0  # follows the transformer
    assert torch.equal(pipe(PROMPT, given={0: picture()}), ti2v(PROMPT, given={0: picture()}))


def test_defaults_of_a_released_transformer_win_over_those_of_the_folder(models: Path, tmp_path: Path) -> None:
    shutil.copytree(models / "T2V", tmp_path / "T2V")
    shutil.copytree(models / "TI2V" / "transformer", tmp_path / "downloaded")
    (tmp_path / "T2V" / "model_index.json").write_text("{}")
    found = load_sampling_defaults(tmp_path / "T2V", tmp_path / "downloaded")
    assert (found.guidance_scale, found.num_frames, found.width) == (8.0, 8, 32)
    assert load_sampling_defaults(tmp_path / "T2V").guidance_scale == 7.5


def test_a_transformer_for_another_text_encoder_is_refused(models: Path) -> None:
    with pytest.raises(CheckpointMismatch, match=r"text encoder of width 24; that of .*--model"):
        AllegroPipeline.from_pretrained("tiny", transformer=models / "TI2V", device="cpu")


def test_given_frames_need_the_image_to_video_model(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = AllegroPipeline.from_pretrained(models / "T2V", device="cpu")
    for loader in ("load_dit", "load_vae", "load_text_encoder"):
        monkeypatch.setattr(pipeline, loader, lambda *a, **k: pytest.fail("weights were touched"))
    with pytest.raises(GeometryError, match=r"text-to-video model.*Allegro-TI2V"):
        pipe(PROMPT, given={0: picture()})
    with pytest.raises(GeometryError, match=r"text-to-video model.*Allegro-TI2V"):
        pipe.condition(GivenFrames.fitted({}, 32, 32, 8))


# The condition


def test_condition_equals_the_steps_by_hand(ti2v: AllegroPipeline) -> None:
    given = GivenFrames.fitted({0: picture(), -1: picture(0.9)}, 32, 32, 8)
    calls: list[tuple[int, int]] = []
    condition = ti2v.condition(given, progress=lambda done, total: calls.append((done, total)))
    mean, logvar = ti2v.vae.encode(given.canvas())
    factor = ti2v.vae_config.scale_factor
    assert torch.equal(condition, build_condition(normalise(mean, factor), given))
    assert calls[-1] == (len(calls) - 1, len(calls) - 1)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(1))
    sampled = ti2v.condition(given, posterior_noise=noise)
    torch.testing.assert_close(sampled[:, :4], normalise(mean + (0.5 * logvar).exp() * noise, factor))


def test_what_is_given_changes_the_clip(ti2v: AllegroPipeline, prompts: Any) -> None:
    clips = [run(ti2v, prompts, GivenFrames.fitted(images, 32, 32, 8))
             for images in ({}, {0: picture()}, {-1: picture()}, {0: picture(0.9)})]
    for index, clip in enumerate(clips):
        for other in clips[index + 1 :]:
            assert not torch.allclose(clip, other, atol=1e-3)
    assert torch.equal(clips[1], run(ti2v, prompts, GivenFrames.fitted({0: picture()}, 32, 32, 8)))


def test_a_call_is_all_stages(ti2v: AllegroPipeline, prompts: Any) -> None:
    frames = ti2v(PROMPT, given={-1: picture()})
    latents = run(ti2v, prompts, GivenFrames.fitted({7: picture()}, 32, 32, 8))
    assert torch.equal(frames, torch.cat(list(ti2v.decode_stream(latents)), dim=2))
    as_given = ti2v(PROMPT, given=GivenFrames.fitted({7: picture()}, 32, 32, 8))
    assert torch.equal(frames, as_given)


def test_positions_are_checked_before_the_text_is_read(ti2v: AllegroPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "load_text_encoder", lambda *a, **k: pytest.fail("weights were touched"))
    with pytest.raises(GeometryError, match="position 8"):
        ti2v(PROMPT, given={8: picture()})
    with pytest.raises(GeometryError, match="frame 0 is given twice"):
        ti2v(PROMPT, given={0: picture(), -8: picture()})


def test_a_condition_of_another_size_is_refused(ti2v: AllegroPipeline) -> None:
    condition = ti2v.condition(GivenFrames.fitted({}, 48, 32, 8))
    with pytest.raises(GeometryError, match=r"condition of shape \[1, 8, 2, 4, 6\]: expected \[1, 8, 2, 4, 4\]"):
        ti2v.start(ti2v.settings(), condition=condition)


def test_an_encode_that_cannot_fit_is_refused(ti2v: AllegroPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "free_bytes", lambda device: 1 << 18)
    with pytest.raises(NotEnoughMemory):
        ti2v(PROMPT, given={0: picture()})


# Kept latents


@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
@pytest.mark.parametrize("start", [0, 2])
def test_kept_latents_stay_and_shape_the_others(ti2v: AllegroPipeline, prompts: Any, sampler: str, start: int) -> None:
    settings = ti2v.settings(num_frames=16, sampler=sampler)
    condition = ti2v.condition(GivenFrames.fitted({0: picture()}, 32, 32, 16))
    kept = torch.randn((1, 4, 2, 4, 4), generator=torch.Generator().manual_seed(3))
    state = ti2v.start(settings, condition=condition, kept=kept, kept_start=start)
    latents = ti2v.raw_latents(ti2v.sample(prompts, state))
    torch.testing.assert_close(latents[:, :, start : start + 2], kept)
    free = ti2v.raw_latents(ti2v.sample(prompts, ti2v.start(settings, condition=condition)))
    rest = slice(2, 4) if start == 0 else slice(0, 2)
    assert not torch.equal(latents[:, :, rest], free[:, :, rest])


def test_kept_latents_that_do_not_fit_are_refused(ti2v: AllegroPipeline) -> None:
    settings = ti2v.settings()
    for kept, start in ((torch.zeros(1, 4, 3, 4, 4), 0), (torch.zeros(1, 4, 1, 4, 4), 2), (torch.zeros(1, 4, 1, 4, 4), -1),
                        (torch.zeros(1, 4, 1, 4, 6), 0)):
        with pytest.raises(GeometryError, match="kept latents of shape"):
            ti2v.start(settings, kept=kept, kept_start=start)


# Resuming


@pytest.mark.parametrize("sampler", ["euler_ancestral", "dpmpp_2m_sde"])
def test_a_run_saved_half_way_and_resumed_equals_one_run(ti2v: AllegroPipeline, prompts: Any, sampler: str,
                                                         tmp_path: Path) -> None:
    settings = ti2v.settings(num_frames=16, sampler=sampler)
    kept = torch.randn((1, 4, 1, 4, 4), generator=torch.Generator().manual_seed(3))
    start = ti2v.start(settings, condition=ti2v.condition(GivenFrames.fitted({0: picture()}, 32, 32, 16)), kept=kept,
                       kept_start=3)
    whole = ti2v.sample(prompts, start)
    file = tmp_path / "half.safetensors"
    file.write_bytes(pack_state(ti2v.sample(prompts, start, stop=2), {"prompt": PROMPT}))
    state, _ = read_state(file)
    assert state.kept_start == 3
    assert torch.equal(ti2v.sample(prompts, state).latents, whole.latents)


