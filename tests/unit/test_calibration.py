"""Calibration of the step caches: what is measured, chosen, kept, and used afterwards."""

import itertools
import json
import math
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from commands import run_command
from snapshot import write_snapshot

from allegro_model import calibration as module
from allegro_model.calibration import (
    MIN_STEPS,
    SPEEDS,
    Calibrator,
    Speed,
    choose,
    evaluations,
    ssim,
    threshold_for,
)
from allegro_model.errors import UnsupportedCheckpoint
from allegro_model.loading.files import cache_file
from allegro_model.pipeline import AllegroPipeline
from allegro_model.sampling import StepCache
from allegro_model.sampling.cache import BUNDLED, CacheLevel

pytest.importorskip("transformers", reason="transformers is not installed (extra: standalone)")


@pytest.fixture
def model(tmp_path):
    return write_snapshot(tmp_path / "Small")


def calibrator(model, folder, **settings):
    """One of two prompts; with the titles of the runs that it made."""
    titles = []

    @contextmanager
    def watch(title):
        titles.append(title)
        yield lambda done, total: None

    pipeline = AllegroPipeline.from_pretrained(model, device="cpu")
    made = Calibrator(pipeline, pipeline.settings(num_steps=12, **settings), ["a red circle", "the sun"], folder, watch)
    return made, titles


def test_the_threshold_for_a_speed_is_the_smallest():
    settings = AllegroPipeline.from_pretrained("tiny").settings(num_steps=30)
    whole = evaluations(BUNDLED, 0.0, settings)
    assert whole == 60
    assert evaluations(BUNDLED, 0.0, replace(settings, guidance_scale=1.0)) == 30
    for fewer in SPEEDS:
        threshold = threshold_for(BUNDLED, fewer, settings)
        assert whole / evaluations(BUNDLED, threshold, settings) >= fewer
        assert whole / evaluations(BUNDLED, threshold - 0.01, settings) < fewer
    assert threshold_for(BUNDLED, 1000.0, settings) is None
    assert threshold_for(BUNDLED, SPEEDS[0], replace(settings, num_steps=MIN_STEPS)) is not None


def test_a_level_is_the_fastest_that_its_gate_lets_through():
    speeds = [Speed(1.5, 0.4, 33, 0.95), Speed(2.3, 0.7, 29, 0.85), Speed(4, 1.5, 24, 0.8), Speed(8, 3, 21, 0.5)]
    assert {name: level.threshold for name, level in choose(speeds).items()} == {"safe": 0.4, "fast": 1.5, "draft": 3}
    with pytest.raises(ValueError, match="no speed to choose from"):
        choose([])
    poor = [Speed(1.5, 0.4, 26, 0.95), Speed(2.3, 0.7, 15, 0.9)]
    levels = choose(poor)
    assert {name: level.threshold for name, level in levels.items()} == {"safe": 0.4, "fast": 0.4, "draft": 0.4}
    lines = module.describe(replace(BUNDLED, levels=levels), poor)
    assert lines[0].endswith("this does not reach 28 dB and 0.9, and nothing that was tried does")
    assert lines[1] == "fast: 1.50 times fewer evaluations, 26.0 dB, SSIM 0.950"


def test_likeness_of_clips():
    generator = torch.Generator().manual_seed(0)
    clip = torch.rand(3, 2, 16, 16, generator=generator)
    assert ssim(clip, clip) == pytest.approx(1)
    assert ssim(clip, 1 - clip) < 0 < ssim(clip, (clip + torch.rand(clip.shape, generator=generator)) / 2) < 1


def test_distances_are_those_of_the_exact_run(model, tmp_path):
    """By hand, from the predictions of a run without cache."""
    made, _ = calibrator(model, tmp_path / "parts")
    calibration, speeds = made.run("Small")
    pipeline, tables = made.pipeline, []
    for number, prompt in enumerate(made.prompts):
        settings, seen = replace(made.settings, seed=number), []
        embeds = pipeline.encode_prompt(prompt, guidance_scale=settings.guidance_scale)
        pipeline.sample(embeds, pipeline.start(settings), callback=lambda info, seen=seen: seen.append(info.denoised))
        size = seen[-1].square().mean().sqrt()
        tables.append(sum(math.sqrt((b - a).square().mean().sqrt() / size) for a, b in itertools.pairwise(seen)))
    assert calibration.timesteps[-1] == 999
    assert calibration.travelled[-1] == pytest.approx(sum(tables) / 2, abs=1e-3)
    assert calibration.travelled[0] == 0
    assert list(calibration.travelled) == sorted(calibration.travelled)
    assert {level.threshold for level in calibration.levels.values()} <= {speed.threshold for speed in speeds}
    assert all(speed.fewer >= wanted for speed, wanted in zip(speeds, SPEEDS, strict=False))


def test_a_stopped_calibration_goes_on(model, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SPEEDS", SPEEDS[:2])
    whole = calibrator(model, tmp_path / "a")[0].run("Small")
    made, titles = calibrator(model, tmp_path / "b")
    start = made.pipeline.start
    monkeypatch.setattr(made.pipeline, "start", lambda *a, **k: start(*a, **k) if len(titles) < 4 else (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        made.run("Small")
    assert made.pipeline.calibration is None
    made, titles = calibrator(model, tmp_path / "b")
    assert made.run("Small") == whole
    assert len(titles) == 3, "of six runs three were finished"
    (tmp_path / "b" / "1-exact.safetensors").write_bytes(b"cut off")
    for settings, runs in (({}, 1), ({"seed": 5}, 6)):
        made, titles = calibrator(model, tmp_path / "b", **settings)
        made.run("Small")
        assert len(titles) == runs, "what is broken, or of other settings, is made anew"


def test_speeds_that_few_steps_cannot_tell_apart_are_one(model, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SPEEDS", (1.45, 1.5))
    calibration, speeds = calibrator(model, tmp_path / "parts")[0].run("Small")
    assert len(speeds) == 1
    assert len(module.describe(calibration, speeds)) == len(module.GATES)


def test_a_file_that_cannot_be_written_is_known_before_the_first_run(model, tmp_path, capsys):
    (tmp_path / "taken").mkdir()
    for name, why in (("taken", "a folder has that name"), ("none/a.json", "does not exist")):
        words = ["calibrate", "--model", str(model), "--steps", "12", "--force", "-o", str(tmp_path / name)]
        code, _, err = run_command(capsys, words)
        assert (code, why in err, "Clip 1" in err) == (5, True, False), err
    assert [entry.name for entry in tmp_path.iterdir() if "parts" in entry.name] == []


def test_the_command_writes_beside_the_weights_what_runs_use(model, tmp_path, capsys):
    words = ["calibrate", "--model", str(model), "--steps", "12", "--prompts", str(tmp_path / "prompts.txt")]
    assert run_command(capsys, words)[0] != 0
    (tmp_path / "prompts.txt").write_text("\ufeffa red circle\n\n", encoding="utf-8")
    assert "--steps 3: with so few" in run_command(capsys, [*words, "--steps", "3"])[2]
    code, out, err = run_command(capsys, words)
    file = model / "transformer" / "cache.json"
    assert (code, out) == (0, f"{file}\n"), err
    assert "Small: 1 prompts, 8 frames of 32x32, 12 steps of euler_ancestral: as long as" in err
    assert "safe: " in err
    assert [entry.name for entry in file.parent.iterdir() if "cache" in entry.name] == ["cache.json"]
    saved = json.loads(file.read_text(encoding="utf-8"))
    assert saved["measured"]["prompts"] == ["a red circle"]
    calibration = AllegroPipeline.from_pretrained(model).cache_calibration()
    assert calibration.to_dict()["travelled"] == saved["travelled"]
    clip = ["generate", "sun", "--model", str(model), "--cache", "fast", "-o", str(tmp_path / "a.png")]
    assert ", calibrated on Small" in run_command(capsys, clip)[2]
    assert "already exists" in run_command(capsys, words)[2]
    file.write_text("{}", encoding="utf-8")
    assert "no calibration of a step cache" in run_command(capsys, [*clip, "--force"])[2]
    assert "calibrated already" in run_command(capsys, ["calibrate"])[2]


def test_where_a_calibration_lies(tmp_path):
    (tmp_path / "Model" / "transformer").mkdir(parents=True)
    assert cache_file(tmp_path / "Model") == tmp_path / "Model" / "transformer" / "cache.json"
    assert cache_file(tmp_path / "Model" / "transformer") == tmp_path / "Model" / "transformer" / "cache.json"
    for name in ("allegro_dit.safetensors", "allegro_dit.gguf"):
        assert cache_file(f"models/{name}") == Path("models/allegro_dit.cache.json")
    assert cache_file("models/model.safetensors.index.json") == Path("models/cache.json")
    with pytest.raises(UnsupportedCheckpoint):
        BUNDLED.from_dict({}, "x")
    assert StepCache("safe", replace(BUNDLED, levels={"safe": CacheLevel(3)})).level.threshold == 3
