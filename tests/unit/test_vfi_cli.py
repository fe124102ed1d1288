"""The command line of frame interpolation: clips with sound, pickles, and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch
from commands import run_command
from safetensors.torch import save_file
from snapshot import write_snapshot
from tiny import VFI, tiny_vfi

from allegro_model.errors import CheckpointError
from allegro_model.loading import interpolator_metadata, load_interpolator
from allegro_model.media import open_writer, probe_clip, probe_contents, read_frames, read_metadata
from allegro_model.media.ffmpeg import ffmpeg_exe
from allegro_model.media.metadata import foreign_tags

pytest.importorskip("imageio_ffmpeg", reason="imageio-ffmpeg is not installed (extra: standalone)")

command = import_module("allegro_model.cli.interpolate")  # the package has a function of that name
Run = Callable[..., tuple[int, str, str]]
SETTINGS = {"prompt": "a red circle", "fps": 8, "seed": 7}


@pytest.fixture
def allegro(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command in a folder with a clip and two interpolators; gives exit code, standard output and error."""
    monkeypatch.chdir(tmp_path)
    for name, arbitrary in (("vfi.safetensors", False), ("vfi_t.safetensors", True)):
        save_file(tiny_vfi().state_dict(), name, interpolator_metadata(replace(VFI, arbitrary_time=arbitrary)))
    write("clip.mp4")

    def run(*arguments: object, model: str | None = "vfi_t.safetensors") -> tuple[int, str, str]:
        words = [str(a) for a in arguments] + (["--model", model] if model else [])
        return run_command(capsys, words)

    return run


def write(path: str, frames: int = 5, height: int = 32, width: int = 48, fps: float = 8) -> str:
    """A gradient that grows brighter."""
    x = torch.linspace(-1, 1, width).expand(3, frames, height, width)
    with open_writer(path, width, height, fps=fps, metadata=SETTINGS) as writer:
        writer.write(x * torch.linspace(0.5, 1, frames).view(1, frames, 1, 1))
    return path


def add_sound(clip: str, output: str, codec: str = "aac") -> str:
    subprocess.run([ffmpeg_exe(), "-v", "error", "-i", clip, "-f", "lavfi", "-i", "sine=f=440:d=0.625", "-map", "0:v",
                    "-map", "1:a", "-c:v", "copy", "-c:a", codec, "-strict", "-2", output], check=True)
    return output


def sound_of(path: str) -> bytes:
    """The encoded sound, without its container."""
    done = subprocess.run([ffmpeg_exe(), "-v", "error", "-i", path, "-map", "0:a", "-c", "copy", "-f", "data", "-"],
                          check=True, capture_output=True)
    return done.stdout


@pytest.mark.parametrize(("options", "frames", "fps"), [
    (("--factor", 2), 10, 16), (("--factor", 3, "--no-hold-last"), 13, 24), (("--fps", 12), 8, 12), (("--fps", 20), 13, 20),
], ids=str)
def test_counts_and_rates(allegro: Run, options: tuple[object, ...], frames: int, fps: float) -> None:
    code, out, err = allegro("interpolate", "clip.mp4", "-o", "out.mp4", *options)
    assert (code, out) == (0, "out.mp4\n"), err
    made, rate = read_frames("out.mp4")
    assert made.shape == (3, frames, 32, 48)
    assert rate == fps
    saved = read_metadata("out.mp4")
    assert saved["prompt"] == SETTINGS["prompt"]
    assert saved["fps"] == fps
    assert saved["interpolation"]["model"] == "vfi_t.safetensors"


def test_source_frames_are_written_unchanged(allegro: Run) -> None:
    code, _, err = allegro("interpolate", "clip.mp4", "-o", "out.png", "--factor", 2, "--no-hold-last", "--dtype", "bf16")
    assert code == 0, err
    source, _ = read_frames("clip.mp4")
    for i in range(5):
        picture, _ = read_frames(f"out_{2 * i:05d}.png")
        assert torch.equal(picture[:, 0], source[:, i])
    assert not os.path.exists("out_00009.png")


@pytest.mark.parametrize(("codec", "source", "output", "kept"), [
    ("aac", "sound.mp4", "out.mp4", True), ("libopus", "sound.mkv", "out.webm", True),
    ("aac", "sound.mp4", "out.webm", False), ("pcm_s16le", "sound.mkv", "out.mp4", False)])
def test_sound_is_kept(allegro: Run, codec: str, source: str, output: str, kept: bool) -> None:
    add_sound("clip.mp4", source, codec)
    code, _, err = allegro("interpolate", source, "-o", output, "--factor", 2)
    assert code == 0, err
    found = probe_contents(output)
    assert found.audio == {".mp4": "aac", ".webm": "opus"}[Path(output).suffix]
    assert found.seconds == pytest.approx(0.625, abs=0.1)
    assert probe_clip(output).fps == 16
    assert (sound_of(output) == sound_of(source)) == kept


@pytest.mark.parametrize("output", ["out.mp4", "out.webm"])
def test_tags_of_other_programs_are_kept(allegro: Run, output: str) -> None:
    workflow = '{"nodes": ["a=b;", "#\\\\"], "x": 1}'
    subprocess.run([ffmpeg_exe(), "-v", "error", "-i", "clip.mp4", "-c", "copy", "-metadata", f"workflow={workflow}",
                    "-metadata", "title=two\nlines", "-movflags", "use_metadata_tags", "tagged.mp4"], check=True)
    code, _, err = allegro("interpolate", "tagged.mp4", "-o", output, "--factor", 2)
    assert code == 0, err
    tags = foreign_tags(Path(output))
    assert tags.lower() == foreign_tags(Path("tagged.mp4")).lower()
    assert '"nodes"' in tags
    assert read_metadata(output)["prompt"] == SETTINGS["prompt"]


def test_a_format_without_sound_says_so(allegro: Run) -> None:
    add_sound("clip.mp4", "sound.mp4")
    code, _, err = allegro("interpolate", "sound.mp4", "-o", "out.gif", "--factor", 2)
    assert code == 0
    assert ".gif has no sound: that of sound.mp4 is left out." in err


def test_report(allegro: Run) -> None:
    code, out, _ = allegro("interpolate", "clip.mp4", "-o", "out.mp4", "--factor", 2, "--json", "--flow-scale", 0.5, "--tta")
    assert code == 0
    report = json.loads(out)
    assert report["frames"] == 10
    assert report["output"] == ["out.mp4"]
    assert report["interpolator"] == "vfi_t.safetensors"
    assert report["settings"] | {"source_fps": 8, "fps": 16, "flow_scale": 0.5, "tta": True} == report["settings"]
    assert [stage["name"] for stage in report["stages"]] == ["loading the interpolator", "interpolating"]


@pytest.mark.parametrize(("arguments", "code", "said"), [
    (("clip.mp4", "-o", "a.mp4"), 2, "--factor 2"),
    (("clip.mp4", "-o", "a.mp4", "--factor", 2, "--fps", 30), 2, "--factor 2"),
    (("clip.mp4", "-o", "a.mp4", "--factor", 1), 3, "from 2 to 64"),
    (("clip.mp4", "-o", "a.mp4", "--fps", 900), 3, "at most 64 times"),
    (("clip.mp4", "-o", "a.mp4", "--factor", 2, "--flow-scale", 0.3), 2, "invalid choice"),
    (("clip.mp4", "-o", "a.mp4", "--factor", 2, "--scene-threshold", 2), 3, "scene_threshold"),
    (("clip.mp4", "-o", "clip.mp4", "--factor", 2), 5, "--force"),
    (("none.mp4", "-o", "a.mp4", "--factor", 2), 3, "no video"),
    (("clip.mp4", "-o", "a.mp4", "--factor", 2, "--device", "quantum"), 3, "--device"),
], ids=str)
def test_refusals(allegro: Run, arguments: tuple[object, ...], code: int, said: str) -> None:
    before = sorted(os.listdir())
    found, _, err = allegro("interpolate", *arguments)
    assert found == code, err
    assert said in err
    assert sorted(os.listdir()) == before


def test_wrong_models(allegro: Run) -> None:
    code, _, err = allegro("interpolate", "clip.mp4", "-o", "a.mp4", "--factor", 2, model="none.safetensors")
    assert (code, "does not exist" in err) == (4, True)
    torch.save(tiny_vfi().state_dict(), "vfi.pkl")
    code, _, err = allegro("interpolate", "clip.mp4", "-o", "a.mp4", "--factor", 2, model="vfi.pkl")
    assert (code, "convert-vfi vfi.pkl vfi.safetensors" in err) == (4, True)


def test_the_bundled_model_has_a_name(allegro: Run) -> None:
    for output, model in (("a.png", None), ("b.png", "tiny-vfi")):
        code, out, err = allegro("interpolate", "clip.mp4", "-o", output, "--factor", 2, "--json", model=model)
        assert code == 0, err
        assert json.loads(out)["interpolator"] == "tiny-vfi"


def test_without_a_bundled_model(allegro: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> Path:
        raise CheckpointError("there is no bundled frame interpolator")

    monkeypatch.setattr(command, "bundled_interpolator", missing)
    code, _, err = allegro("interpolate", "clip.mp4", "-o", "a.mp4", "--factor", 2, model=None)
    assert (code, "no bundled frame interpolator" in err) == (4, True)


def test_the_middle_only_warns_at_other_positions(allegro: Run) -> None:
    code, _, err = allegro("interpolate", "clip.mp4", "-o", "a.mp4", "--factor", 3, model="vfi.safetensors")
    assert code == 0
    assert "nearest eighth" in err
    code, _, err = allegro("interpolate", "clip.mp4", "-o", "b.mp4", "--factor", 4, model="vfi.safetensors")
    assert code == 0
    assert "nearest eighth" not in err


def test_a_failure_leaves_nothing_behind(allegro: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(self: object, *arguments: object) -> None:
        raise KeyboardInterrupt

    before = sorted(os.listdir())
    monkeypatch.setattr(command.EMAInterpolator, "between", interrupt)
    assert allegro("interpolate", "clip.mp4", "-o", "a.mp4", "--factor", 2)[0] == 130
    assert sorted(os.listdir()) == before


# Conversion


def test_convert(allegro: Run) -> None:
    torch.save({f"module.{name}": value for name, value in tiny_vfi().state_dict().items()}, "ours_t.pkl")
    code, out, err = allegro("convert-vfi", "ours_t.pkl", "new.safetensors", model=None)
    assert (code, out) == (0, "new.safetensors\n"), err
    assert "any position" in err
    assert load_interpolator("new.safetensors").config == VFI
    assert allegro("convert-vfi", "ours_t.pkl", "new.safetensors", model=None)[0] == 5
    assert allegro("convert-vfi", "ours_t.pkl", "new.safetensors", "--force", "--no-arbitrary-time", model=None)[0] == 0
    assert not load_interpolator("new.safetensors").config.arbitrary_time
    code, _, err = allegro("convert-vfi", "ours_t.pkl", "new.pkl", model=None)
    assert (code, ".safetensors" in err) == (5, True)
    assert allegro("convert-vfi", "clip.mp4", "other.safetensors", model=None)[0] == 4
    assert not os.path.exists("other.safetensors")


# With generate


def test_generate_and_interpolate(allegro: Run, tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed (extra: standalone)")
    model = str(write_snapshot(tmp_path / "Small"))
    plain = allegro("generate", "a red circle", "-o", "plain.png", model=model)
    assert plain[0] == 0, plain[2]
    code, _, err = allegro("generate", "a red circle", "-o", "smooth.png", "--interpolate", 2, "--interpolator",
                           "vfi.safetensors", model=model)
    assert code == 0, err
    assert not os.path.exists("smooth_00016.png")
    for i in range(8):
        own, _ = read_frames(f"plain_{i:05d}.png")
        kept, _ = read_frames(f"smooth_{2 * i:05d}.png")
        assert torch.equal(own, kept)
    saved = read_metadata("smooth_00000.png")
    assert saved["interpolation"]["step"] == "1/2"
    assert saved["fps"] == 2 * read_metadata("plain_00000.png")["fps"]
    code, _, err = allegro("generate", "a red circle", "-o", "a.mp4", "--interpolate", 1, model=model)
    assert (code, "from 2 to 64" in err) == (3, True)
    code, _, err = allegro("generate", "a red circle", "-o", "a.mp4", "--interpolator", "vfi.safetensors", model=model)
    assert (code, "--interpolate 2" in err) == (2, True)
    code, _, err = allegro("generate", "a red circle", "--stop-at-step", 2, "--save-latents", "half.safetensors",
                           "--interpolate", 4, "--interpolator", "vfi.safetensors", model=model)
    assert code == 0, err
    assert "--interpolate 4 --interpolator vfi.safetensors" in err


def test_latents_survive_a_failed_interpolation(allegro: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed (extra: standalone)")
    monkeypatch.setattr(command.EMAInterpolator, "between", lambda *_: 1 / 0)
    code, _, err = allegro("generate", "a red circle", "-o", "new.mp4", "--interpolate", 2, "--interpolator", "vfi.safetensors",
                           model=str(write_snapshot(tmp_path / "Small")))
    assert code == 1
    assert "Decode them with: allegro decode new.latents.safetensors -o new.mp4" in err
    assert err.rstrip().endswith("and interpolate the video with: allegro interpolate")
