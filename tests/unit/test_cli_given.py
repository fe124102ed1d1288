"""Image to video on the command line: pictures, clips and latents, what is written, and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import run_command
from safetensors.torch import load_file
from snapshot import write_snapshot, write_ti2v_snapshot
from torch import Tensor

from allegro_model import AllegroPipeline, pipeline
from allegro_model.cli.parser import parse_arguments
from allegro_model.conditioning import GivenFrames, fit_images
from allegro_model.joining import join_clips
from allegro_model.loading import bundled_models
from allegro_model.media import open_writer, read_frames, read_image, read_metadata
from allegro_model.media.ffmpeg import ffmpeg_exe
from allegro_model.media.writers import encode_png

pytest.importorskip("imageio_ffmpeg", reason="imageio-ffmpeg is not installed (extra: standalone)")
pytest.importorskip("transformers", reason="transformers is not installed (extra: standalone)")

PROMPT = "a red circle moves to the right"
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_snapshot(folder / "T2V")
    write_ti2v_snapshot(folder / "TI2V", "../T2V")
    return folder


@pytest.fixture
def allegro(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], models: Path) -> Run:
    """Runs a command with the image-to-video model in a folder that holds pictures and a clip of 12 frames."""
    monkeypatch.chdir(tmp_path)
    picture("a.png", 0, 60, 40)
    picture("b.png", 1, 33, 57)
    clip("clip.mp4", 12)

    def run(*arguments: object, model: str | None = "TI2V") -> tuple[int, str, str]:
        words = [*map(str, arguments), *([] if model is None else ["--model", str(models / model)])]
        return run_command(capsys, words)

    return run


def picture(path: str, seed: int, width: int, height: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Path(path).write_bytes(encode_png(pixels, {}))


def clip(path: str, num_frames: int, fps: float = 8, width: int = 32, height: int = 32) -> None:
    x = torch.linspace(-0.8, 0.8, width).expand(3, num_frames, height, width)
    with open_writer(path, width, height, fps=fps) as writer:
        writer.write(x * torch.linspace(-1, 1, num_frames).view(1, -1, 1, 1))


def frames_of(path: str) -> Tensor:
    """[3, T, H, W]; of "clip.png" its numbered pictures."""
    if not path.endswith(".png"):
        return read_frames(path)[0]
    files = sorted(Path().glob(f"{path.removesuffix('.png')}_*.png"))
    return torch.stack([_read_png(file) for file in files], dim=1)


def _read_png(file: Path) -> Tensor:
    """[3, H, W] of a picture that our writer made; a hundred times as fast as starting ffmpeg."""
    data = file.read_bytes()
    width, height = (int.from_bytes(data[start : start + 4], "big") for start in (16, 20))
    start = data.index(b"IDAT")
    rows = np.frombuffer(zlib.decompress(data[start + 4 : -16]), np.uint8).reshape(height, 1 + 3 * width)
    pixels = np.cumsum(rows[:, 1:], axis=0, dtype=np.uint8).reshape(height, width, 3)
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 127.5 - 1


def latents_of(path: str) -> Tensor:
    return load_file(path)["latent_tensor"]


def by_hand(models: Path, images: dict[int, Tensor], seed: int = 42, **settings: Any) -> Tensor:
    """Latents of the pipeline with frames [3, 32, 32] in [-1, 1]."""
    pipe = AllegroPipeline.from_pretrained(models / "TI2V")
    chosen = pipe.settings(seed=seed, **settings)
    prompts = pipe.encode_prompt(PROMPT, guidance_scale=chosen.guidance_scale)
    frames = torch.stack(list(images.values())) if images else torch.zeros(0, 3, 32, 32)
    condition = pipe.condition(GivenFrames.at(frames, list(images), chosen.num_frames))
    return pipe.raw_latents(pipe.sample(prompts, pipe.start(chosen, condition=condition)))


def fitted(path: str, fit: str = "crop") -> Tensor:
    return fit_images(read_image(path)[None], 32, 32, fit)[0]


# Pictures


@pytest.mark.parametrize(("options", "images"), [
    ((), {}),
    (("--first-frame", "a.png"), {0: "a.png"}),
    (("--last-frame", "b.png"), {7: "b.png"}),
    (("--first-frame", "a.png", "--last-frame", "b.png"), {0: "a.png", 7: "b.png"}),
    (("--keyframe", "2=a.png", "--keyframe", "-3=b.png"), {2: "a.png", 5: "b.png"}),
    (("--loop", "a.png"), {0: "a.png", 7: "a.png"}),
    (("--first-frame", "a.png", "--keyframe=-1=b.png"), {0: "a.png", 7: "b.png"}),
])
def test_pictures_arrive_at_their_positions(allegro: Run, models: Path, options: tuple[str, ...],
                                            images: dict[int, str]) -> None:
    code, _, err = allegro("generate", PROMPT, "-o", "out.mp4", "--save-latents", "out.safetensors", *options)
    assert code == 0, err
    assert "cfg 8" in err
    assert "Encoding the given frames" in err
    expected = by_hand(models, {position: fitted(file) for position, file in images.items()})
    assert torch.equal(latents_of("out.safetensors"), expected)
    assert frames_of("out.mp4").shape == (3, 8, 32, 32)


def test_what_was_given_is_kept_in_the_files(allegro: Run) -> None:
    os.mkdir("private")
    os.rename("a.png", "private/a.png")
    assert allegro("generate", PROMPT, "-o", "out.mp4", "--first-frame", "private/a.png", "--keyframe", "-2=b.png", "--fit",
                   "pad", "--save-latents", "out.safetensors")[0] == 0
    expected = {"images": [{"file": "a.png", "position": 0}, {"file": "b.png", "position": -2}], "fit": "pad"}
    assert read_metadata("out.mp4")["given"] == expected
    code, out, _ = allegro("inspect", "out.safetensors", model=None)
    assert code == 0
    assert json.dumps(expected) in out


@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
def test_fit(allegro: Run, models: Path, fit: str) -> None:
    assert allegro("generate", PROMPT, "-o", "out.mp4", "--first-frame", "a.png", "--fit", fit, "--save-latents",
                   "out.safetensors")[0] == 0
    assert torch.equal(latents_of("out.safetensors"), by_hand(models, {0: fitted("a.png", fit)}))


def test_of_a_video_the_first_frame_is_taken(allegro: Run, models: Path) -> None:
    assert allegro("generate", PROMPT, "-o", "out.mp4", "--first-frame", "clip.mp4", "--save-latents", "l.safetensors")[0] == 0
    torch.testing.assert_close(latents_of("l.safetensors"), by_hand(models, {0: frames_of("clip.mp4")[:, 0]}))


@pytest.mark.parametrize("options", [("--seed", 5, "--cfg", 2, "--frames", 12, "--sampler", "dpmpp_2m")])
def test_other_settings_still_arrive(allegro: Run, models: Path, options: tuple[object, ...]) -> None:
    assert allegro("generate", PROMPT, "-o", "out.mp4", "--last-frame", "a.png", "--save-latents", "l.safetensors",
                   *options)[0] == 0
    expected = by_hand(models, {11: fitted("a.png")}, seed=5, guidance_scale=2.0, num_frames=12, sampler="dpmpp_2m")
    assert torch.equal(latents_of("l.safetensors"), expected)


def test_a_transformer_beside_the_model(allegro: Run, models: Path) -> None:
    same = (PROMPT, "--first-frame", "a.png")
    assert allegro("generate", *same, "-o", "a.mp4", "--save-latents", "a.safetensors")[0] == 0
    code, _, err = allegro("generate", *same, "-o", "b.mp4", "--save-latents", "b.safetensors", "--transformer",
                           models / "TI2V" / "transformer", model="T2V")
    assert code == 0
    assert "TI2V: 8 frames of 32x32, 4 steps of euler_ancestral, cfg 8" in err
    assert torch.equal(latents_of("a.safetensors"), latents_of("b.safetensors"))
    assert (read_metadata("b.mp4")["model"], read_metadata("b.mp4")["transformer"]) == ("T2V", "TI2V")


def test_inspect_names_the_shared_parts(allegro: Run, models: Path) -> None:
    code, out, _ = allegro("inspect", models / "TI2V", model=None)
    assert code == 0
    assert "a whole model: Allegro image-to-video transformer (TI2V), 2 layers" in out
    assert "vae: Allegro VideoVAE, from T2V" in out


# Clips


def test_continue_a_video(allegro: Run, models: Path) -> None:
    code, _, err = allegro("generate", PROMPT, "-o", "out.png", "--continue-from", "clip.mp4", "--keep-frames", 3,
                           "--save-latents", "l.safetensors")
    assert code == 0, err
    given = frames_of("clip.mp4")
    latents = latents_of("l.safetensors")
    assert torch.equal(latents, by_hand(models, {i: given[:, 9 + i] for i in range(3)}))
    new = torch.cat(list(AllegroPipeline.from_pretrained(models / "TI2V").decode_stream(latents)), dim=2)[0]
    out = frames_of("out.png")
    assert out.shape == (3, 12 + 8 - 3, 32, 32)
    torch.testing.assert_close(out, join_clips(given, new, 3), atol=1 / 255 + 1e-5, rtol=0)
    (metadata,) = [read_metadata("out_00000.png")["given"]]
    assert metadata == {"clip": {"file": "clip.mp4", "keep_frames": 3, "mode": "continue"}, "fit": "crop"}


def test_put_something_in_front_of_a_video(allegro: Run, models: Path) -> None:
    assert allegro("generate", PROMPT, "-o", "out.png", "--prepend-to", "clip.mp4", "--keep-frames", 3, "--save-latents",
                   "l.safetensors")[0] == 0
    given = frames_of("clip.mp4")
    latents = latents_of("l.safetensors")
    assert torch.equal(latents, by_hand(models, {5 + i: given[:, i] for i in range(3)}))
    new = torch.cat(list(AllegroPipeline.from_pretrained(models / "TI2V").decode_stream(latents)), dim=2)[0]
    torch.testing.assert_close(frames_of("out.png"), join_clips(new, given, 3, adjust="first"), atol=1 / 255 + 1e-5, rtol=0)


@pytest.mark.parametrize("option", ["--continue-from", "--prepend-to"])
@pytest.mark.parametrize("source", ["clip.mp4", "clip.safetensors"])
def test_only_the_new_part(allegro: Run, option: str, source: str) -> None:
    assert allegro("encode", "clip.mp4", "-o", "clip.safetensors")[0] == 0
    same = (PROMPT, option, source, "--keep-frames", 4)
    assert allegro("generate", *same, "-o", "all.png")[0] == 0
    assert allegro("generate", *same, "-o", "new.png", "--new-part")[0] == 0
    both, new = frames_of("all.png"), frames_of("new.png")
    assert (both.shape[1], new.shape[1]) == (12 + 4, 4)
    if source == "clip.mp4":  # latents are decoded in one piece, so that the last digits differ
        assert torch.equal(new, both[:, 12:] if option == "--continue-from" else both[:, :4])


def test_a_clip_of_another_size_is_fitted(allegro: Run) -> None:
    clip("wide.mp4", 12, width=80, height=40)
    assert allegro("generate", PROMPT, "-o", "out.png", "--continue-from", "wide.mp4", "--keep-frames", 4, "--fit", "pad")[0] == 0
    out, wide = frames_of("out.png"), frames_of("wide.mp4")
    expected = fit_images((wide.transpose(0, 1) + 1) / 2, 32, 32, "pad").transpose(0, 1)
    torch.testing.assert_close(out[:, :8], expected[:, :8], atol=1 / 255 + 1e-5, rtol=0)


def test_the_clip_sets_the_frame_rate_and_another_than_the_models_is_remarked_on(allegro: Run) -> None:
    clip("fast.mp4", 12, fps=20)
    code, _, err = allegro("generate", PROMPT, "-o", "out.mp4", "--continue-from", "fast.mp4")
    assert code == 0, err
    assert read_metadata("out.mp4")["given"]["clip"]["keep_frames"] == 4  # half of a short clip
    assert "fast.mp4 has 20 frames per second, and the model draws 8" in err
    assert read_frames("out.mp4")[1] == 20
    assert "frames per second" not in allegro("generate", PROMPT, "-o", "o.mp4", "--continue-from", "clip.mp4")[2]


def test_lost_sound_is_remarked_on(allegro: Run) -> None:
    subprocess.run([ffmpeg_exe(), "-v", "error", "-i", "clip.mp4", "-f", "lavfi", "-i", "sine=d=1", "-c:v", "copy", "loud.mp4"],
                   check=True)
    for name, sound in (("clip.mp4", False), ("loud.mp4", True)):
        code, _, err = allegro("generate", PROMPT, "--continue-from", name, "--stop-at-step", 1, "--save-latents",
                               f"{name}.safetensors", "--keep-frames", 4)
        assert (code, f"{name} has sound, which is left out" in err) == (0, sound), err


def test_a_picture_and_a_clip_together(allegro: Run, models: Path) -> None:
    assert allegro("generate", PROMPT, "-o", "out.mp4", "--continue-from", "clip.mp4", "--keep-frames", 2, "--last-frame",
                   "a.png", "--save-latents", "l.safetensors")[0] == 0
    given = frames_of("clip.mp4")
    images = {7: fitted("a.png"), 0: given[:, 10], 1: given[:, 11]}
    assert torch.equal(latents_of("l.safetensors"), by_hand(models, images))


# Latents


@pytest.mark.parametrize("option", ["--continue-from", "--prepend-to"])
def test_latents_are_carried_exactly(allegro: Run, option: str) -> None:
    assert allegro("generate", PROMPT, "-o", "one.mp4", "--frames", 16, "--save-latents", "one.safetensors")[0] == 0
    old = latents_of("one.safetensors")
    code, _, err = allegro("generate", "the circle", "-o", "two.mp4", option, "one.safetensors", "--keep-frames", 4, "--seed", 1,
                           "--save-latents", "two.safetensors")
    assert code == 0, err
    both = latents_of("two.safetensors")
    assert both.shape == (1, 4, 5, 4, 4)
    assert torch.equal(both[:, :, :4] if option == "--continue-from" else both[:, :, 1:], old)
    assert frames_of("two.mp4").shape[1] == 20
    assert allegro("generate", "the circle", "-o", "three.mp4", option, "two.safetensors", "--keep-frames", 4)[0] == 0
    assert frames_of("three.mp4").shape[1] == 24


# Resuming


@pytest.mark.parametrize("given", [("--first-frame", "a.png"), ("--continue-from", "clip.mp4", "--keep-frames", 3),
                                   ("--prepend-to", "clip.mp4", "--keep-frames", 3),
                                   ("--continue-from", "clip.safetensors", "--keep-frames", 4)])
def test_a_resumed_run_equals_one_run(allegro: Run, given: tuple[object, ...]) -> None:
    assert allegro("encode", "clip.mp4", "-o", "clip.safetensors")[0] == 0
    same = (PROMPT, *given, "--fit", "stretch")
    assert allegro("generate", *same, "-o", "one.png", "--save-latents", "one.safetensors")[0] == 0
    code, _, err = allegro("generate", *same, "--stop-at-step", 2, "--save-latents", "half.safetensors")
    assert code == 0, err
    again = given[:2] if given[0] != "--first-frame" else ()
    assert f"--resume half.safetensors -o clip.mp4 --model {err.split('--model ')[1].split()[0]}" in err
    assert all(str(word) in err for word in again)
    os.remove("a.png")  # what was given is in the file
    assert allegro("generate", "--resume", "half.safetensors", "-o", "two.png", "--save-latents", "two.safetensors",
                   *again)[0] == 0
    assert torch.equal(latents_of("one.safetensors"), latents_of("two.safetensors"))
    assert torch.equal(frames_of("one.png"), frames_of("two.png"))
    assert read_metadata("two_00000.png")["given"] == read_metadata("one_00000.png")["given"]


def test_a_resumed_run_without_its_clip_says_what_it_writes(allegro: Run) -> None:
    assert allegro("generate", PROMPT, "--continue-from", "clip.mp4", "--stop-at-step", 2, "--save-latents", "h.safetensors",
                   "--keep-frames", 4)[0] == 0
    code, _, err = allegro("generate", "--resume", "h.safetensors", "-o", "new.mp4")
    assert code == 0
    assert "The new part is written alone. To join it, add --continue-from clip.mp4" in err
    assert frames_of("new.mp4").shape[1] == 8


@pytest.mark.parametrize(("width", "seed"), [(32, 1), (48, 0)])
def test_a_resumed_run_is_not_joined_to_other_latents(allegro: Run, width: int, seed: int) -> None:
    for name, options in (("own", ()), ("other", ("--width", width, "--seed", seed))):
        assert allegro("generate", PROMPT, "-o", f"{name}.mp4", "--save-latents", f"{name}.safetensors", *options)[0] == 0
    assert allegro("generate", PROMPT, "--continue-from", "own.safetensors", "--keep-frames", 4, "--stop-at-step", 2,
                   "--save-latents", "h.safetensors")[0] == 0
    code, _, err = allegro("generate", "--resume", "h.safetensors", "-o", "new.mp4", "--continue-from", "other.safetensors")
    assert (code, "give --continue-from own.safetensors as it was then" in err) == (2, True), err


def test_a_run_that_fails_while_it_is_joined_can_be_finished(allegro: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    same = (PROMPT, "--continue-from", "clip.mp4", "--keep-frames", 3)
    assert allegro("generate", *same, "-o", "one.png")[0] == 0
    with monkeypatch.context() as broken:
        broken.setattr(AllegroPipeline, "decode_stream", lambda *a, **k: 1 / 0)
        code, _, err = allegro("generate", *same, "-o", "two.png")
    assert code == 1
    assert "4 of 4 steps are saved. Go on with: allegro generate --resume two.latents.safetensors -o two.png" in err
    assert "--continue-from clip.mp4" in err
    assert allegro("generate", "--resume", "two.latents.safetensors", "-o", "two.png", "--continue-from", "clip.mp4")[0] == 0
    assert torch.equal(frames_of("one.png"), frames_of("two.png"))


@pytest.mark.parametrize(("options", "words"), [
    (("--first-frame", "a.png"), "leave out --first-frame"),
    (("--keyframe", "0=a.png"), "leave out --keyframe"),
    (("--keep-frames", "4", "--continue-from", "clip.mp4"), "leave out --keep-frames"),
    (("--continue-from", "clip.mp4"), "was not begun with --continue-from"),
    (("--transformer", "T"), "leave out --transformer"),
])
def test_a_resumed_run_keeps_what_it_was_given(allegro: Run, models: Path, options: tuple[str, ...], words: str) -> None:
    options = tuple(str(models / "TI2V") if word == "T" else word for word in options)
    assert allegro("generate", PROMPT, "--last-frame", "b.png", "--stop-at-step", 2, "--save-latents", "h.safetensors")[0] == 0
    code, _, err = allegro("generate", "--resume", "h.safetensors", "-o", "o.mp4", *options)
    assert (code, words in err) == (2, True), err


def test_a_run_of_the_other_kind_of_model_is_refused(allegro: Run, models: Path) -> None:
    assert allegro("generate", PROMPT, "--stop-at-step", 2, "--save-latents", "h.safetensors", model="T2V")[0] == 0
    code, _, err = allegro("generate", "--resume", "h.safetensors", "-o", "o.mp4", "--transformer", models / "TI2V",
                           model="T2V")
    assert (code, "leave out --transformer" in err) == (2, True), err


# Refused before anything is loaded


@pytest.mark.parametrize(("options", "code", "words"), [
    (("--first-frame", "a.png", "--keyframe", "0=b.png"), 3, "frame 0 is given twice"),
    (("--keyframe", "7=a.png", "--last-frame", "b.png"), 3, "frame 7 is given twice"),
    (("--loop", "a.png", "--first-frame", "b.png"), 3, "frame 0 is given twice"),
    (("--keyframe", "8=a.png"), 3, "position 8: the clip has 8 frames"),
    (("--keyframe", "-9=a.png"), 3, "position -9"),
    (("--keyframe", "a.png"), 2, "expected INDEX=FILE"),
    (("--keyframe", "1.5=a.png"), 2, "expected INDEX=FILE"),
    (("--first-frame", "none.png"), 3, "There is no picture none.png"),
    (("--first-frame", "bad.png"), 3, "Cannot read bad.png as a picture"),
    (("--continue-from", "none.mp4"), 3, "There is no video none.mp4"),
    (("--continue-from", "bad.safetensors"), 4, "not a readable file of latents"),
    (("--continue-from", "clip.mp4", "--keep-frames", "13", "--frames", "16"), 3, "has only 12 frames"),
    (("--continue-from", "clip.mp4", "--keep-frames", "8"), 3, "must be from 1 to 7"),
    (("--continue-from", "clip.mp4", "--keep-frames", "0"), 3, "must be from 1 to 7"),
    (("--continue-from", "clip.mp4", "--prepend-to", "clip.mp4"), 2, "not allowed with"),
    (("--continue-from", "clip.mp4", "--init-video", "clip.mp4"), 2, "leave out one"),
    (("--continue-from", "clip.mp4", "--keep-frames", "2", "--first-frame", "a.png"), 3, "frame 0 is given twice"),
    (("--keep-frames", "4"), 2, "add --continue-from CLIP"),
    (("--new-part",), 2, "add --continue-from CLIP"),
    (("--fit", "pad"), 2, "needs a picture"),
    (("--first-frame", "a.png", "--frames", "4"), 3, "image to video needs a multiple of 4, at least 8"),
    (("--transformer", "nowhere"), 4, "nowhere does not exist"),
])
def test_what_cannot_be_is_refused(allegro: Run, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], code: int,
                                   words: str) -> None:
    for name in ("bad.png", "bad.safetensors"):
        Path(name).write_bytes(b"nonsense")
    for loader in ("load_dit", "load_vae", "load_text_encoder"):
        monkeypatch.setattr(pipeline, loader, lambda *a, **k: pytest.fail("weights were touched"))
    found, _, err = allegro("generate", PROMPT, "-o", "out.mp4", *options)
    assert (found, words in err) == (code, True), err
    assert not Path("out.mp4").exists()


def test_latents_are_kept_in_whole_frames_and_sizes(allegro: Run) -> None:
    assert allegro("encode", "clip.mp4", "-o", "clip.safetensors")[0] == 0
    for options, words in ((("--keep-frames", 3), "must be a multiple of 4"), (("--width", 48), "width=48")):
        code, _, err = allegro("generate", PROMPT, "-o", "out.mp4", "--continue-from", "clip.safetensors", *options)
        assert (code, words in err) == (3, True), err


def test_latents_of_another_kind_of_model_are_refused(allegro: Run) -> None:
    assert allegro("encode", "clip.mp4", "-o", "clip.safetensors", "--model", "tiny", model=None)[0] == 0
    code, _, err = allegro("generate", PROMPT, "-o", "out.mp4", "--continue-from", "clip.safetensors")
    assert (code, "was made with the model tiny, not TI2V" in err) == (2, True), err


@pytest.mark.parametrize("options", [("--first-frame", "a.png"), ("--continue-from", "clip.mp4")])
def test_the_text_to_video_model_takes_no_frames(allegro: Run, options: tuple[str, ...]) -> None:
    code, _, err = allegro("generate", PROMPT, "-o", "out.mp4", *options, model="T2V")
    assert code == 3
    assert "text-to-video model, which takes no given frames. Use the image-to-video one: rhymes-ai/Allegro-TI2V" in err


def test_negative_positions_are_no_options() -> None:
    args = parse_arguments(["generate", "p", "--keyframe", "-3=a.png", "--keyframe", "2=b=c.png", "--json", "--", "--keyframe"][:-2])
    assert args.keyframe == [(-3, "a.png"), (2, "b=c.png")]
    assert args.json == "-"


@pytest.mark.skipif("tiny-ti2v" not in bundled_models(), reason="this copy has no assets/tiny-ti2v")
def test_the_bundled_model(allegro: Run) -> None:
    code, _, err = allegro("generate", "a red circle moves right", "-o", "out.mp4", "--first-frame", "a.png", "--steps", 2,
                           "--model", "tiny-ti2v", model=None)
    assert code == 0, err
    assert read_metadata("out.mp4")["model"] == "tiny-ti2v"


# Storyboards


def story(text: str) -> str:
    Path("story.txt").write_text(text, encoding="utf-8")
    return "story.txt"


def test_a_storyboard_is_the_same_as_its_clips_one_by_one(allegro: Run) -> None:
    small = ("--steps", 2, "--frames", 8, "--keep-frames", 4)
    code, _, err = allegro("generate", "--storyboard", story("# two\nall: at night\na red circle\na blue circle"), "-o", "film.mp4",
                           "--first-frame", "a.png", *small, "--seed", 0, "--save-latents", "film.safetensors")
    assert code == 0, err
    assert "Clip 2 of 2: a blue circle, at night" in err
    first = ("--steps", 2, "--frames", 8)
    assert allegro("generate", "a red circle, at night", "--first-frame", "a.png", *first, "--seed", 0, "-o", "1.mp4",
                   "--save-latents", "1.safetensors")[0] == 0
    assert allegro("generate", "a blue circle, at night", "--continue-from", "1.safetensors", *small, "--seed", 1, "-o", "2.mp4",
                   "--save-latents", "2.safetensors")[0] == 0
    assert torch.equal(load_file("film.safetensors")["latent_tensor"], load_file("2.safetensors")["latent_tensor"])
    assert read_frames("film.mp4")[0].shape[1] == 12
    assert read_metadata("film.mp4")["storyboard"] == ["a red circle, at night", "a blue circle, at night"]
    assert not list(Path().glob("film.part*")), "what the clips were continued from is left behind"


def test_a_storyboard_that_fails_says_how_to_go_on(allegro: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    real, seeds = AllegroPipeline.sample, []

    def sample(self: AllegroPipeline, prompts: Any, state: Any, **kwargs: Any) -> Any:
        seeds.append(state.settings.seed)
        if len(seeds) == 3:
            raise KeyboardInterrupt
        return real(self, prompts, state, **kwargs)

    monkeypatch.setattr(AllegroPipeline, "sample", sample)
    small = ("--steps", 1, "--frames", 8, "--keep-frames", 4)
    code, _, err = allegro("generate", "--storyboard", story("a\nb\nc"), "-o", "film.mp4", *small)
    assert (code, seeds) == (130, [42, 43, 44])
    assert "The first 2 clips are in film.part2.safetensors" in err
    assert "--seed 44" in err
    assert [p.name for p in Path().glob("film*")] == ["film.part2.safetensors"]
    assert load_file("film.part2.safetensors")["latent_tensor"].shape[2] == 3  # 8 + 4 new frames
    code, _, err = allegro("generate", "--storyboard", story("c"), "--continue-from", "film.part2.safetensors", "--seed", 44,
                           "-o", "film.mp4", *small)
    assert code == 0, err
    assert read_frames("film.mp4")[0].shape[1] == 16


@pytest.mark.parametrize(("words", "told"), [
    (("a prompt",), "does not go together with PROMPT"), (("--last-frame", "a.png"), "--last-frame"),
    (("--resume", "x.safetensors"), "--resume"), (("--storyboard", "none.txt"), "none.txt cannot be read"),
])
def test_what_a_storyboard_does_not_go_with_is_refused(allegro: Run, words: tuple[str, ...], told: str) -> None:
    code, _, err = allegro("generate", "--storyboard", story("a\nb"), "-o", "film.mp4", *words)
    assert code in (2, 3)
    assert told in err


def test_a_storyboard_needs_the_image_to_video_model(allegro: Run) -> None:
    code, _, err = allegro("generate", "--storyboard", story("a\nb"), "-o", "film.mp4", model="T2V")
    assert code == 3
    assert "is the text-to-video model" in err
    assert not list(Path().glob("film*"))
