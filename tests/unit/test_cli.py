"""The command line: what it writes, what it says, and how it ends."""

from __future__ import annotations

import json
import mmap
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import run_command
from safetensors.torch import load_file, save_file
from snapshot import write_snapshot

from allegro_model import __version__, cli, memory
from allegro_model.cli import console, shortage
from allegro_model.cli.console import Console, StatusLine, duration, size
from allegro_model.cli.parser import parse_arguments
from allegro_model.cli.report import EXIT_CODES, exit_code
from allegro_model.errors import NonFiniteError, OutputError
from allegro_model.media import open_writer, read_frames, read_metadata
from allegro_model.pipeline import AllegroPipeline

pytest.importorskip("imageio_ffmpeg", reason="imageio-ffmpeg is not installed (extra: standalone)")
pytest.importorskip("transformers", reason="transformers is not installed (extra: standalone)")

ROOT = Path(cli.__file__).parents[2]
PROMPT = "a red circle moves to the right"
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_snapshot(tmp_path_factory.mktemp("models") / "Small"))


@pytest.fixture
def allegro(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], model: str) -> Run:
    """Runs a command in an empty folder with the small model; gives exit code, standard output and error."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object, with_model: bool = True) -> tuple[int, str, str]:
        words = [str(a) for a in arguments]
        if with_model and words[0] != "inspect":
            words += ["--model", model]
        return run_command(capsys, words)

    return run


def files() -> list[str]:
    return sorted(os.listdir())


def latents_of(path: str) -> torch.Tensor:
    return load_file(path)["latent_tensor"]


def clip(path: str, frames: int = 8, height: int = 32, width: int = 32, fps: float = 8) -> str:
    """Writes a moving gradient."""
    x = torch.linspace(-1, 1, width).expand(3, frames, height, width)
    with open_writer(path, width, height, fps=fps) as writer:
        writer.write(x * torch.linspace(-1, 1, frames).view(1, frames, 1, 1))
    return path


# Generate


def test_generate(allegro: Run) -> None:
    code, out, err = allegro("generate", PROMPT, "-o", "clip.mp4", "--seed", 7)
    assert (code, out) == (0, "clip.mp4\n")
    assert files() == ["clip.mp4"]
    assert "Small: 8 frames of 32x32, 4 steps of euler_ancestral, cfg 3, seed 7; float32 on cpu" in err
    for stage in ("Reading the prompt", "Sampling", "Decoding"):
        assert f"{stage} ...\n" in err
        assert re.search(rf"{stage}: done in \d", err)
    frames, fps = read_frames("clip.mp4")
    assert frames.shape == (3, 8, 32, 32)
    assert fps == 8
    settings = {"width": 32, "height": 32, "num_frames": 8, "num_steps": 4, "guidance_scale": 3.0,
                "sampler": "euler_ancestral", "seed": 7, "denoise": 1.0, "cache": "off"}
    metadata = read_metadata("clip.mp4")
    assert metadata.pop("model_hash").keys() == {"vae", "transformer"}
    assert metadata == {
        "prompt": PROMPT, "negative": "blurry", "template": False, "clean": True, "model": "Small", "fps": 8.0,
        "settings": settings, "version": __version__}


@pytest.mark.parametrize(("output", "written"), [
    ("clip.webm", ["clip.webm"]), ("clip.gif", ["clip.gif"]),
    ("clip.png", [f"clip_{i:05d}.png" for i in range(8)]),
])
def test_other_formats(allegro: Run, output: str, written: list[str]) -> None:
    code, out, _ = allegro("generate", PROMPT, "-o", output, "--steps", 2, "--fps", 10)
    assert code == 0
    assert out == (output if len(written) == 1 else "clip_00000.png ... clip_00007.png") + "\n"
    assert files() == written
    assert read_metadata(written[0])["fps"] == 10


def test_every_setting_arrives(allegro: Run) -> None:
    code, _, _ = allegro(
        "generate", PROMPT, "-o", "a.mp4", "--negative", "", "--frames", 12, "--width", 48, "--height", 16, "--steps", 3,
        "--cfg", 1, "--seed", 2**64 - 1, "--sampler", "dpmpp_2m", "--fps", 12, "--template", "--no-clean", "--device",
        "cpu", "--dtype", "bf16", "--quality", "small", "--tile", "8x16x16", "--overlap", "4x8x8", "--tiles-per-batch", 2)
    assert code == 0
    made = read_metadata("a.mp4")
    assert made["settings"] == {"width": 48, "height": 16, "num_frames": 12, "num_steps": 3, "guidance_scale": 1.0,
                                "sampler": "dpmpp_2m", "seed": 2**64 - 1, "denoise": 1.0, "cache": "off"}
    assert (made["negative"], made["template"], made["clean"], made["fps"]) == ("", True, False, 12)
    frames, fps = read_frames("a.mp4")
    assert (frames.shape, fps) == ((3, 12, 16, 48), 12)


def test_two_runs_are_identical(allegro: Run) -> None:
    for name in "ab":
        assert allegro("generate", PROMPT, "-o", f"{name}.png", "--save-latents", f"{name}.safetensors")[0] == 0
    assert torch.equal(latents_of("a.safetensors"), latents_of("b.safetensors"))
    for index in range(8):
        assert Path(f"a_{index:05d}.png").read_bytes() == Path(f"b_{index:05d}.png").read_bytes()
    assert allegro("generate", PROMPT, "-o", "c.png", "--save-latents", "c.safetensors", "--seed", 43)[0] == 0
    assert not torch.equal(latents_of("a.safetensors"), latents_of("c.safetensors"))


def test_the_command_line_equals_the_pipeline(allegro: Run, model: str) -> None:
    assert allegro("generate", PROMPT, "-o", "a.png", "--seed", 5)[0] == 0
    expected = AllegroPipeline.from_pretrained(model)(PROMPT, seed=5)[0]
    for index in range(8):
        shown, _ = read_frames(f"a_{index:05d}.png")
        assert (shown[:, 0] - expected[:, index]).abs().max() <= 1 / 255 + 1e-5  # half a level of [-1, 1]


@pytest.mark.parametrize("sampler", ["euler_ancestral", "euler", "dpmpp_2m", "dpmpp_2m_sde"])
def test_a_resumed_run_equals_one_run(allegro: Run, sampler: str) -> None:
    settings = (PROMPT, "--steps", 6, "--sampler", sampler, "--seed", 3, "--fps", 5, "--negative", "a")
    assert allegro("generate", *settings, "-o", "one.png", "--save-latents", "one.safetensors")[0] == 0
    code, out, err = allegro("generate", *settings, "--stop-at-step", 2, "--save-latents", "half.safetensors")
    assert (code, out) == (0, "half.safetensors\n")
    assert "2 of 6 steps are saved. Go on with: allegro generate --resume half.safetensors -o clip.mp4 --model" in err
    assert allegro("generate", "--resume", "half.safetensors", "--stop-at-step", 3, "--save-latents", "more.safetensors",
                   )[0] == 0
    code, _, err = allegro("generate", "--resume", "more.safetensors", "-o", "two.png", "--save-latents", "two.safetensors")
    assert code == 0
    assert torch.equal(latents_of("one.safetensors"), latents_of("two.safetensors"))
    assert Path("one_00003.png").read_bytes() == Path("two_00003.png").read_bytes()


def test_a_step_cache_says_what_it_left_out_and_stays_when_a_run_is_resumed(allegro: Run) -> None:
    settings = (PROMPT, "--steps", 12, "--seed", 3)
    assert allegro("generate", *settings, "-o", "exact.png", "--save-latents", "exact.safetensors")[0] == 0
    code, _, err = allegro("generate", *settings, "--cache", "draft", "-o", "a.png", "--save-latents", "a.safetensors",
                           "--json", "a.json")
    assert code == 0
    assert ", step cache draft, about" in err
    (line,) = re.findall(r"step cache draft: \d+ of \d+ predictions computed.*", err)
    assert json.loads(Path("a.json").read_text())["skipped"] == line
    assert not torch.equal(latents_of("a.safetensors"), latents_of("exact.safetensors"))
    assert allegro("generate", *settings, "--cache", "draft", "--stop-at-step", 5, "--save-latents", "half.safetensors")[0] == 0
    assert allegro("generate", "--resume", "half.safetensors", "--cache", "off", "-o", "b.png")[0] == 2
    code, _, err = allegro("generate", "--resume", "half.safetensors", "-o", "b.png")
    assert code == 0
    assert "step cache draft: " in err


def test_the_attention_is_named_and_one_that_cannot_be_used_is_replaced(allegro: Run) -> None:
    settings = ("generate", PROMPT, "--steps", 1, "-o", "a.png", "--force")
    code, out, err = allegro(*settings, "--json")
    assert (code, json.loads(out)["attention"]) == (0, {"name": "sdpa", "seconds": {}})
    assert ", attention sdpa, " in err
    assert ", attention sdpa-math, " in allegro(*settings, "--attention", "sdpa-math")[2]
    code, _, err = allegro(*settings, "--attention", "flash3")
    assert code == 0
    assert "WARNING: Attention flash3 cannot be used: it runs on cuda, not on cpu. Using sdpa.\n" in err
    assert ", attention sdpa, " in err


def test_blocks_are_compiled_when_it_is_asked_for(allegro: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the run goes on where they cannot be."""
    settings = ("generate", PROMPT, "--steps", 1, "--force", "-o")
    assert "compiled" not in allegro(*settings, "a.png")[2]
    assert allegro(*settings, "plain.png", "--save-latents", "plain.safetensors")[0] == 0

    def refuse(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no compiler on this system.")

    monkeypatch.setattr(torch, "compile", refuse)
    code, _, err = allegro(*settings, "a.png", "--save-latents", "a.safetensors", "--compile")
    assert code == 0
    assert ", compiled blocks, " in err
    assert err.count("WARNING: torch.compile failed, so the blocks run without it: no compiler on this system\n") == 1
    assert torch.equal(latents_of("a.safetensors"), latents_of("plain.safetensors"))


def test_latents_are_saved_before_decoding_and_decode_to_the_same_clip(allegro: Run) -> None:
    assert allegro("generate", PROMPT, "-o", "a.png", "--fps", 6, "--save-latents", "a.safetensors")[0] == 0
    code, out, _ = allegro("decode", "a.safetensors", "-o", "b.png")
    assert (code, out) == (0, "b_00000.png ... b_00007.png\n")
    for index in range(8):
        assert Path(f"a_{index:05d}.png").read_bytes() == Path(f"b_{index:05d}.png").read_bytes()
    assert allegro("decode", "a.safetensors", "-o", "c.mp4")[0] == 0
    made = read_metadata("c.mp4")
    assert (made["prompt"], made["fps"]) == (PROMPT, 6)
    assert read_frames("c.mp4")[1] == 6
    assert allegro("decode", "a.safetensors", "-o", "d.mp4", "--fps", 20)[0] == 0
    assert read_frames("d.mp4")[1] == 20


def test_encode(allegro: Run) -> None:
    clip("in.mp4", frames=10, height=40, width=50, fps=5)
    code, out, err = allegro("encode", "in.mp4", "-o", "l.safetensors")
    assert (code, out) == (0, "l.safetensors\n")
    assert "The last 2 of 10 frames are left out" in err
    assert latents_of("l.safetensors").shape == (1, 4, 2, 4, 6)
    assert allegro("encode", "in.mp4", "-o", "m.safetensors", "--frames", 4, "--width", 16, "--height", 32)[0] == 0
    assert latents_of("m.safetensors").shape == (1, 4, 1, 4, 2)
    assert allegro("decode", "l.safetensors", "-o", "back.mp4")[0] == 0
    assert read_frames("back.mp4")[1] == 5


def test_from_a_video_or_its_latents(allegro: Run) -> None:
    clip("in.mp4", fps=6)
    few = ("--steps", 4, "--denoise", 0.3)
    assert allegro("generate", PROMPT, "--init-video", "in.mp4", "-o", "a.gif", "--save-latents", "a.safetensors", "--fps", 6,
                   *few)[0] == 0
    assert read_metadata("a.gif")["settings"]["denoise"] == 0.3
    assert allegro("encode", "in.mp4", "-o", "in.safetensors")[0] == 0
    assert allegro("generate", PROMPT, "--init-video", "in.safetensors", "-o", "b.gif", "--save-latents", "b.safetensors",
                   *few)[0] == 0
    assert torch.allclose(latents_of("a.safetensors"), latents_of("b.safetensors"), atol=1e-4)
    assert read_metadata("b.gif")["fps"] == 6
    assert allegro("generate", PROMPT, "--init-video", "in.mp4", "-o", "c.gif")[0] == 0
    assert read_metadata("c.gif")["settings"]["denoise"] == 0.6


def test_a_short_video_sets_the_length(allegro: Run) -> None:
    clip("short.mp4", frames=6)
    assert allegro("generate", PROMPT, "--init-video", "short.mp4", "-o", "a.gif")[0] == 0
    assert read_metadata("a.gif")["settings"]["num_frames"] == 4


# Inspect


def test_inspect(allegro: Run, model: str) -> None:
    clip("foreign.mp4")
    assert allegro("generate", PROMPT, "-o", "a.mp4", "--save-latents", "a.safetensors")[0] == 0
    assert allegro("generate", PROMPT, "--stop-at-step", 1, "--save-latents", "half.safetensors")[0] == 0
    expected = {
        "a.mp4": ["a clip of 32x32 at 8 per second", f'prompt: "{PROMPT}"', '"seed": 42'],
        "foreign.mp4": ["a clip of 32x32"],
        "a.safetensors": ["latents, for decode", "8 frames of 32x32", '"num_steps": 4'],
        "half.safetensors": ["an unfinished run, for generate --resume", "step: 1"],
        model: ["a whole model: Allegro text-to-video transformer", "vae: Allegro VideoVAE", "text_encoder: T5", "num_steps: 4"],
        f"{model}/transformer": ["Allegro text-to-video transformer", "parameters in float32", "8 frames of 32x32"],
        f"{model}/vae/diffusion_pytorch_model.safetensors": ["Allegro VideoVAE"],
        "tiny-ti2v": ["a whole model: Allegro image-to-video transformer", "vae: Allegro VideoVAE, from tiny"],
        "tiny-vfi": ["EMA-VFI"],
        "tiny/orange": ["a LoRA"],
    }
    for path, parts in expected.items():
        code, out, _ = allegro("inspect", path)
        assert code == 0
        assert [part for part in parts if part not in out] == []
    assert "made with" not in allegro("inspect", "foreign.mp4")[1]
    code, out, _ = allegro("inspect", "a.mp4", "--json")
    assert json.loads(out)["file"]["made_with"]["prompt"] == PROMPT


def test_inspect_shows_what_the_file_is_though_its_config_is_another(allegro: Run, model: str) -> None:
    """Wrong width, then a malformed entry: the file is described, the config is blamed."""
    shutil.copytree(model, "mixed")
    config = Path("mixed/transformer/config.json")
    known = json.loads(config.read_text())
    for change, words in (({"num_layers": 7}, "num_layers is 2 in the tensors and 7 in the config"),
                          ({"sample_size": [4]}, "sample_size=[4], expected two whole numbers")):
        config.write_text(json.dumps(known | change))
        for path in ("mixed", "mixed/transformer"):
            code, out, _ = allegro("inspect", path)
            assert code == 0
            assert re.search(f"cannot be used: .*{re.escape(words)}", out)
            assert "parameters in" in out


def test_inspect_shows_a_broken_part(allegro: Run, model: str) -> None:
    shutil.copytree(model, "broken")
    Path("broken/vae/diffusion_pytorch_model.safetensors").write_bytes(b"PK\x03\x04" + bytes(100))
    code, out, _ = allegro("inspect", "broken")
    assert code == 0
    assert "vae: damaged" in out
    assert "cannot be read: " in out


# The report


def test_report(allegro: Run) -> None:
    code, out, _ = allegro("generate", PROMPT, "-o", "a.mp4", "--save-latents", "a.safetensors", "--json")
    report = json.loads(out)  # nothing but the report on standard output
    assert code == 0
    assert {key: report[key] for key in ("command", "status", "exit_code", "error", "output", "latents", "frames", "model",
                                         "device")} == {
        "command": "generate", "status": "ok", "exit_code": 0, "error": None, "output": ["a.mp4"], "latents": "a.safetensors",
        "frames": 8, "model": "Small", "device": "cpu"}
    assert report["settings"]["settings"]["seed"] == 42
    assert [s["name"] for s in report["stages"]] == ["reading the prompt", "sampling", "decoding"]
    for stage in report["stages"]:
        assert 0 <= stage["seconds"] < report["seconds"] < 60
        assert 10**7 < stage["peak_ram_bytes"] < 10**11
        assert stage["peak_gpu_bytes"] is None
    assert report["versions"]["torch"] == torch.__version__
    assert set(report["versions"]) == {"allegro-video", "python", "torch", "cuda", "transformers", "safetensors",
                                       "imageio-ffmpeg"}


def test_report_in_a_file(allegro: Run) -> None:
    assert allegro("generate", PROMPT, "-o", "a.mp4", "--json", "report.json")[:2] == (0, "a.mp4\n")
    assert json.loads(Path("report.json").read_text())["status"] == "ok"
    code, _, err = allegro("generate", PROMPT, "-o", "b.mp4", "--json", "report.json")
    assert code == 5
    assert err.count("report.json already exists") == 1
    assert files() == ["a.mp4", "report.json"]


def test_json_takes_no_word_that_is_not_a_report(allegro: Run) -> None:
    clip("in.mp4")
    code, out, _ = allegro("inspect", "--json", "in.mp4")
    assert (code, json.loads(out)["file"]["family"]) == (0, "clip")
    assert allegro("generate", "--json", PROMPT, "-o", "a.mp4")[0] == 0
    code, _, err = allegro("inspect", "in.mp4", "--json=report.txt")
    assert code == 2
    assert "'report.txt': expected a name that ends in .json" in err
    assert files() == ["a.mp4", "in.mp4"]


def test_report_of_a_failure(allegro: Run) -> None:
    code, out, _ = allegro("generate", PROMPT, "-o", "a.mp4", "--width", 33, "--json")
    report = json.loads(out)
    assert code == report["exit_code"] == 3
    assert report["status"] == "failed"
    assert report["error"]["type"] == "GeometryError"
    assert report["error"]["stage"] == "checking"
    assert "nearest: 32 or 48" in report["error"]["message"]


def test_peak_memory_is_per_stage(allegro: Run) -> None:
    """A stage that allocates 200 MB shows it, the next one does not."""
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("this system cannot reset the peak")
    report = cli.Report("test")
    for name, size_in_bytes in (("large", 2 * 10**8), ("small", 1)):
        with report.measure(name, torch.device("cpu")):
            # Not from the heap: there, memory that earlier tests have freed would serve and nothing would grow.
            with mmap.mmap(-1, size_in_bytes) as memory:
                torch.frombuffer(memory, dtype=torch.uint8).fill_(1)
    large, small = (stage["peak_ram_bytes"] for stage in report.stages)
    assert large - small > 1.5 * 10**8


def test_quiet_and_verbose(allegro: Run) -> None:
    assert allegro("generate", PROMPT, "-o", "a.mp4", "--quiet") == (0, "", "")
    code, out, err = allegro("generate", PROMPT, "-o", "a.mp4", "--quiet")
    assert (code, out) == (5, "")
    assert err.startswith("Error: a.mp4 already exists")
    assert len(err.splitlines()) == 1
    code, _, err = allegro("generate", PROMPT, "-o", "a.mp4", "--verbose")
    assert code == 5
    assert "Traceback" in err
    assert allegro("generate", PROMPT, "--quiet", "--verbose")[0] == 2


# Wrong input: (arguments, exit code, what the message says). The prompt, -o and the model are added when absent.

LONG = "word " * 20_000
WRONG: dict[str, tuple[list[object], int, str]] = {
    "width zero": (["--width", 0], 3, "width=0: must be a multiple of 16.*nearest: 16"),
    "width negative": (["--width", -16], 3, "width=-16: must be a multiple of 16"),
    "width odd": (["--width", 33], 3, "width=33: must be a multiple of 16.*nearest: 32 or 48"),
    "height odd": (["--height", 40], 3, "height=40: must be a multiple of 16.*nearest: 32 or 48"),
    "frames odd": (["--frames", 90], 3, "num_frames=90: must be a multiple of 4.*nearest: 88 or 92"),
    "width huge": (["--width", 10**9], 3, "width=1000000000: must be"),
    "clip huge": (["--width", 8192, "--height", 8192, "--frames", 4096], 6, r"needs about .* GiB, .* GiB are free\. Try, in"),
    "no steps": (["--steps", 0], 3, "steps=0: must be a whole number from 1"),
    "steps huge": (["--steps", 10**7], 3, "steps=10000000"),
    "cfg nan": (["--cfg", "nan"], 3, r"guidance scale \(cfg\) nan: must be a finite number"),
    "cfg infinite": (["--cfg", "inf"], 3, r"guidance scale \(cfg\) inf: must be a finite number"),
    "cfg word": (["--cfg", "much"], 2, "argument --cfg: invalid float value: 'much'"),
    "seed negative": (["--seed", -1], 3, "seed=-1: must be a whole number from 0"),
    "seed huge": (["--seed", 2**64], 3, "seed=18446744073709551616"),
    "sampler": (["--sampler", "magic"], 2, "invalid choice: 'magic'"),
    "fps zero": (["--fps", 0], 3, "fps=0.0: must be above 0"),
    "fps nan": (["--fps", "nan"], 3, "fps=nan: must be above 0"),
    "empty prompt": (["PROMPT", ""], 3, "The prompt is empty. Say what the video shows"),
    "blank prompt": (["PROMPT", " \n "], 3, "The prompt is empty"),
    "prompt cleaned away": (["PROMPT", "1920x1080"], 3, "cleaning deletes the whole prompt '1920x1080'.*--no-clean"),
    "long prompt": (["PROMPT", LONG], 3, "The prompt has 100,000 characters; at most 20,000"),
    "long negative": (["--negative", LONG], 3, "has 100,000 characters"),
    "no prompt": (["PROMPT"], 2, "Say what the video shows"),
    "no output": (["NO OUTPUT"], 2, "Say where the video goes: --output clip.mp4"),
    "extension": (["-o", "clip.avi"], 5, "the extension .avi is not a known format. Use one of .mp4, .webm, .gif, .png"),
    "no folder": (["-o", "none/clip.mp4"], 5, "the folder none does not exist. Create it first"),
    "quality": (["--quality", "best"], 3, "use high, small or a rate factor from 0"),
    "denoise alone": (["--denoise", 0.5], 2, "--denoise needs something to start from: add --init-video"),
    "denoise zero": (["--init-video", "in.mp4", "--denoise", 0], 3, "denoise=0.0: must be above 0 and at most 1"),
    "denoise nan": (["--init-video", "in.mp4", "--denoise", "nan"], 3, "denoise=nan: must be above 0"),
    "no video": (["--init-video", "none.mp4"], 3, "There is no video none.mp4"),
    "broken video": (["--init-video", "broken.mp4"], 3, "Cannot read broken.mp4 as a video"),
    "short video": (["--init-video", "in.mp4", "--frames", 80], 3, "has only 8 frames at 8 per second. Use --frames 8"),
    "other latents": (["--init-video", "l.safetensors", "--width", 64], 3, "width=64: l.safetensors is for 16. Leave"),
    "latents name": (["--save-latents", "l.bin"], 5, "latents are kept in .safetensors files"),
    "latents exist": (["--save-latents", "l.safetensors"], 5, "l.safetensors already exists and was left as it is"),
    "stop without file": (["NO OUTPUT", "--stop-at-step", 2], 2, "--stop-at-step needs a file to save the run in"),
    "stop with output": (["--stop-at-step", 2, "--save-latents", "n.safetensors"], 2, "leave out --output"),
    "stop too late": (["NO OUTPUT", "--stop-at-step", 4, "--save-latents", "n.safetensors"], 2, "must be from 1 to 3"),
    "resume and prompt": (["--resume", "half.safetensors", "--seed", 1], 2, "keeps its prompt and settings: leave out PROMPT, --seed"),
    "resume and words": (["PROMPT", "--resume", "half.safetensors", "--no-clean", "--no-template"], 2,
                         "leave out --template, --no-clean"),
    "latents of a batch": (["--init-video", "batch.safetensors"], 3, "batch.safetensors holds latents of shape.*one video"),
    "latents of nan": (["--init-video", "nan.safetensors"], 8, "NaN or Inf appeared in nan.safetensors"),
    "resume nothing": (["PROMPT", "--resume", "none.safetensors"], 4, "none.safetensors is not a readable file of latents"),
    "resume finished": (["PROMPT", "--resume", "l.safetensors"], 4, "expected a run saved with --stop-at-step"),
    "model": (["--model", "none"], 4, "--model none: there is no such folder"),
    "empty model": (["--model", "empty"], 4, "empty"),
    "device": (["--device", "gpu"], 3, "--device gpu: PyTorch .* cannot use it here. Use auto"),
    "device meta": (["--device", "meta"], 3, "--device meta: PyTorch .* cannot use it here"),
    "dtype": (["--dtype", "int8"], 2, "invalid choice: 'int8'"),
    "tile": (["--tile", "24x320"], 2, "argument --tile: '24x320': expected frames x height x width"),
    "tile size": (["--tile", "24x321x320"], 3, "tile_height=321: must be a positive multiple of 8"),
    "overlap": (["--tile", "8x32x32", "--overlap", "8x8x8"], 3, "overlap_frames=8: must be"),
    "tiles per batch": (["--tiles-per-batch", 0], 3, "tiles_per_batch=0: must be at least 1"),
    "abbreviation": (["--se", 1], 2, "unrecognized arguments: --se"),
}


@pytest.fixture(scope="module")
def wrong_inputs(tmp_path_factory: pytest.TempPathFactory, model: str) -> Path:
    """Files that the table above names."""
    folder = tmp_path_factory.mktemp("wrong")
    clip(str(folder / "in.mp4"))
    (folder / "broken.mp4").write_bytes(b"not a video")
    (folder / "empty").mkdir()
    save_file({"latent_tensor": torch.zeros(2, 4, 2, 4, 4)}, folder / "batch.safetensors")
    save_file({"latent_tensor": torch.full((1, 4, 2, 4, 4), float("nan"))}, folder / "nan.safetensors")
    save_file({"latent_tensor": torch.zeros(1, 4, 1, 2, 2)}, folder / "l.safetensors")
    assert cli.main(["generate", PROMPT, "--model", model, "--stop-at-step", "1", "--save-latents",
                     str(folder / "half.safetensors"), "--quiet"]) == 0
    return folder


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input(allegro: Run, wrong_inputs: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    arguments, expected_code, message = WRONG[case]
    monkeypatch.chdir(wrong_inputs)

    def no_weights(*_: object, **__: object) -> None:
        pytest.fail("weights were loaded before the input was checked")

    monkeypatch.setattr(AllegroPipeline, "load_text_encoder", no_weights)
    before = files()
    words: list[object] = [PROMPT]
    if arguments[0] == "PROMPT":
        words, arguments = arguments[1:2], arguments[2:]
        if words and str(words[0]).startswith("--"):
            words, arguments = [], [*words, *arguments]
    if arguments[:1] == ["NO OUTPUT"]:
        arguments = arguments[1:]
    elif "-o" not in arguments:
        arguments = ["-o", "clip.mp4", *arguments]
    code, out, err = allegro("generate", *words, *arguments, with_model="--model" not in arguments)
    assert code == expected_code, err
    assert re.search(message, err.replace("\n", " ")), err
    assert out == ""
    assert "Traceback" not in err
    assert files() == before


def test_refusals_of_decode_and_encode(allegro: Run) -> None:
    clip("in.mp4")
    save_file({"latent_tensor": torch.zeros(2, 4, 1, 2, 2)}, "batch.safetensors")
    save_file({"latent_tensor": torch.full((1, 4, 1, 2, 2), float("nan"))}, "nan.safetensors")
    save_file({"weight": torch.zeros(3)}, "other.safetensors")
    Path("text.safetensors").write_text("no tensors")
    assert allegro("generate", PROMPT, "--stop-at-step", 1, "--save-latents", "half.safetensors")[0] == 0
    before = files()
    for words, expected_code, message in [
        (["decode", "batch.safetensors", "-o", "a.mp4"], 3, "expected one video"),
        (["decode", "nan.safetensors", "-o", "a.mp4"], 8, "NaN or Inf appeared in nan.safetensors"),
        (["decode", "other.safetensors", "-o", "a.mp4"], 4, "expected latent_tensor"),
        (["decode", "text.safetensors", "-o", "a.mp4"], 4, "is not a readable file of latents"),
        (["decode", "none.safetensors", "-o", "a.mp4"], 4, "none.safetensors"),
        (["decode", "half.safetensors", "-o", "a.mp4"], 4, "stopped after step 1: finish it with `generate --resume`"),
        (["decode", "batch.safetensors"], 2, "Say where the video goes"),
        (["encode", "in.mp4", "-o", "a.pt"], 5, "latents are kept in .safetensors files"),
        (["encode", "in.mp4", "-o", "half.safetensors"], 5, "already exists"),
        (["encode", "none.mp4", "-o", "a.safetensors"], 3, "There is no video none.mp4"),
        (["encode", "in.mp4", "-o", "a.safetensors", "--width", 30], 3, "width=30: must be a multiple of 16"),
        (["encode", "in.mp4", "-o", "a.safetensors", "--frames", 80], 3, "has only 8 frames at 8 per second. Use --frames 8"),
        (["encode", "in.mp4", "-o", "a.safetensors", "--fps", 0], 3, "fps=0"),
        (["inspect", "none"], 3, "There is nothing at none"),
        (["inspect", "text.safetensors"], 4, "text.safetensors"),
        (["inspect", "."], 4, "holds"),
    ]:
        code, _, err = allegro(*words)
        assert code == expected_code, err
        assert message in err
        assert "Traceback" not in err
    assert files() == before


def test_a_run_goes_on_with_its_own_model(allegro: Run, model: str) -> None:
    assert allegro("generate", PROMPT, "--stop-at-step", 1, "--save-latents", "half.safetensors")[0] == 0
    shutil.copytree(model, "Other")
    for part, change in (("transformer", {"interpolation_scale_t": 1.5}), ("vae", {"scale_factor": 0.5})):
        config = Path("Other", part, "config.json")
        config.write_text(json.dumps(json.loads(config.read_text()) | change))
    code, _, err = allegro("generate", "--resume", "half.safetensors", "-o", "a.mp4", "--model", "Other", with_model=False)
    assert code == 2
    assert "was made with the model Small, not Other: give the folder of Small with --model" in err
    assert allegro("generate", PROMPT, "-o", "b.mp4", "--save-latents", "l.safetensors")[0] == 0
    for words in (["decode", "l.safetensors"], ["generate", PROMPT, "--init-video", "l.safetensors"]):
        code, _, err = allegro(*words, "-o", "a.mp4", "--model", "Other", with_model=False)
        assert code == 2
        assert "l.safetensors was made with the model Small, not Other" in err
    save_file({"latent_tensor": latents_of("l.safetensors")}, "foreign.safetensors")  # says nothing about its model
    assert allegro("decode", "foreign.safetensors", "-o", "a.mp4", "--model", "Other", with_model=False)[0] == 0


def test_a_model_may_be_renamed_and_its_tiles_changed(allegro: Run, model: str) -> None:
    """What counts is what the latents mean; files without hashes, of earlier versions, are judged by the name."""
    assert allegro("generate", PROMPT, "--stop-at-step", 1, "--save-latents", "half.safetensors")[0] == 0
    assert allegro("generate", PROMPT, "-o", "b.mp4", "--save-latents", "l.safetensors")[0] == 0
    shutil.copytree(model, "Renamed")
    config = Path("Renamed", "vae", "config.json")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"tile_overlap": [8, 8]}))
    runs = {"a": ["generate", "--resume", "half.safetensors"], "c": ["decode", "l.safetensors"],
            "d": ["generate", PROMPT, "--init-video", "l.safetensors"]}
    for name, words in runs.items():
        code, _, err = allegro(*words, "-o", f"{name}.mp4", "--model", "Renamed", with_model=False)
        assert code == 0, err
    saved = json.loads(_metadata("l.safetensors"))
    del saved["model_hash"]
    save_file(load_file("l.safetensors"), "l.safetensors", {"allegro": json.dumps(saved)})
    assert allegro("decode", "l.safetensors", "-o", "e.mp4", "--model", "Renamed", with_model=False)[0] == 2
    assert allegro("decode", "l.safetensors", "-o", "e.mp4")[0] == 0


@pytest.mark.parametrize("damage", ["size", "settings", "extra", "cfg", "step", "no step", "shape", "denoised", "nan", "prompt"])
def test_an_edited_run_is_refused(allegro: Run, damage: str) -> None:
    assert allegro("generate", PROMPT, "--stop-at-step", 1, "--save-latents", "half.safetensors")[0] == 0
    tensors, run = load_file("half.safetensors"), json.loads(_metadata("half.safetensors"))
    edits = {
        "size": lambda: run["settings"].update(width="wide"),
        "settings": lambda: run.update(settings=[1, 2]),
        "extra": lambda: run["settings"].update(extra=1),
        "cfg": lambda: run["settings"].update(guidance_scale="much"),
        "step": lambda: run.update(step=9),
        "no step": lambda: run.pop("step"),
        "prompt": lambda: run.update(prompt=["a"]),
        "denoised": lambda: tensors.update(denoised=tensors["denoised"][:, :3].contiguous()),
        "nan": lambda: tensors["noisy_latents"].fill_(float("nan")),
        "shape": lambda: tensors.update(noisy_latents=tensors["noisy_latents"][:, :, :1].contiguous()),
    }
    edits[damage]()
    save_file(tensors, "edited.safetensors", metadata={"allegro": json.dumps(run)})
    code, _, err = allegro("generate", "--resume", "edited.safetensors", "-o", "a.mp4")
    assert code == 8 if damage == "nan" else code in (3, 4)
    assert err.startswith("Error: ")
    assert files() == ["edited.safetensors", "half.safetensors"]


def _metadata(path: str) -> str:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return str(file.metadata()["allegro"])


def test_existing_files_and_force(allegro: Run) -> None:
    Path("a.mp4").write_bytes(b"mine")
    code, _, err = allegro("generate", PROMPT, "-o", "a.mp4")
    assert code == 5
    assert "a.mp4 already exists and was left as it is. Add --force" in err
    assert Path("a.mp4").read_bytes() == b"mine"
    Path("l.safetensors").write_bytes(b"mine")
    assert allegro("generate", PROMPT, "-o", "a.mp4", "--save-latents", "l.safetensors", "--force")[0] == 0
    assert read_frames("a.mp4")[0].shape[1] == 8
    assert latents_of("l.safetensors").shape == (1, 4, 2, 4, 4)


def test_incomplete_models(allegro: Run, model: str) -> None:
    weights = "diffusion_pytorch_model.safetensors"
    for part in ("transformer", "vae", "text_encoder", "tokenizer"):
        shutil.copytree(model, "m")
        shutil.rmtree(f"m/{part}")
        code, _, err = allegro("generate", PROMPT, "-o", "a.mp4", "--model", "m", with_model=False)
        assert code == 4, (part, err)
        assert part in err
        shutil.rmtree("m")
    shutil.copytree(model, "m")
    Path(f"m/vae/{weights}").write_bytes(Path(f"m/transformer/{weights}").read_bytes())
    code, _, err = allegro("generate", PROMPT, "-o", "a.mp4", "--model", "m", with_model=False)
    assert code == 4
    assert "expected the Allegro VideoVAE" in err
    Path(f"m/vae/{weights}").write_bytes(Path(f"{model}/vae/{weights}").read_bytes()[:5000])
    assert allegro("generate", PROMPT, "-o", "a.mp4", "--model", "m", with_model=False)[0] == 4
    assert files() == ["m"]


@pytest.mark.parametrize(("command", "stage", "error", "message"), [
    ("generate a --device cpu", "sampling", torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has"),
     "memory ran out during: sampling. 2.5 GiB more were needed, 3.0 GiB are free in main memory. Try, in this order: "
     "--offload stream; --dtype bf16; weights that `allegro convert` made smaller; fewer --frames; a smaller --width and --height; "
     "closing other programs."),
    ("generate a --device cpu --offload stream --dtype fp16 --resume b", "sampling", torch.OutOfMemoryError("no"),
     "sampling. 3.0 GiB are free in main memory. Try, in this order: weights that `allegro convert` made smaller; closing"),
    ("generate a --device cpu", "decoding", RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1024 bytes."),
     "1.0 KiB more were needed, 3.0 GiB are free in main memory. Try, in this order: a smaller --tile; fewer --frames; a smaller"),
    ("decode a --device cpu --tiles-per-batch 3", "decoding", MemoryError("Unable to allocate 1.5 MiB for an array"),
     "1.5 MiB more were needed, 3.0 GiB are free in main memory. Try, in this order: a smaller --tile; closing"),
    ("generate a --device cuda:0 --offload stream", "sampling", MemoryError(), "order: weights that `allegro convert` made"),
    ("generate a --device cpu --interpolate 2", "loading the interpolator", MemoryError(), "order: closing other programs."),
    ("interpolate a --device cpu", "interpolating", MemoryError(), "order: --dtype bf16; a smaller video; closing"),
    ("interpolate a --device cuda:0", "interpolating", MemoryError(), "order: a smaller video; closing"),
    ("bench --device cpu", "measuring dit", MemoryError(), "order: fewer --layers; a smaller --size; closing"),
    ("estimate --device cpu", "measuring", MemoryError(), "order: fewer --frames; a smaller --width and --height; closing"),
    ("interpolate a --device cpu --dtype bf16", "interpolating", torch.OutOfMemoryError("no"),
     "Try, in this order: a smaller video; closing other programs."),
    ("convert a b --format int8", "converting", MemoryError(), "Try, in this order: closing other programs."),
])
def test_memory_that_ran_out(monkeypatch: pytest.MonkeyPatch, command: str, stage: str, error: BaseException, message: str) -> None:
    """Nothing is advised that the command has no option for, or that was done already."""
    monkeypatch.setattr(shortage, "free_bytes", lambda device: 3 * 2**30)
    assert message in shortage.explain_shortage(parse_arguments(command.split()), stage, error)


# What must not be lost


def test_latents_are_kept_when_decoding_fails(allegro: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert allegro("generate", PROMPT, "-o", "good.png", "--save-latents", "good.safetensors")[0] == 0
    before = files()
    for error, expected_code in [
            (torch.OutOfMemoryError("no"), 6), (RuntimeError("[enforce fail] DefaultCPUAllocator: no"), 6), (KeyboardInterrupt(), 130),
            (RuntimeError("bug"), 1)]:
        def fail(*_: object, error: BaseException = error, **__: object) -> None:
            raise error
        monkeypatch.setattr(AllegroPipeline, "decode_stream", fail)
        code, out, err = allegro("generate", PROMPT, "-o", "clip.mp4", "--json")
        assert code == expected_code
        assert json.loads(out)["latents"] == "clip.latents.safetensors"
        assert ("memory ran out during: decoding." in err) is (code == 6)
        assert "The finished latents are in clip.latents.safetensors. Decode them with: allegro decode clip.latents" in err
        assert [f for f in files() if f not in before] == ["clip.latents.safetensors"]
        assert torch.equal(latents_of("clip.latents.safetensors"), latents_of("good.safetensors"))
        Path("clip.latents.safetensors").unlink()
    assert ("Traceback" in err, "please report them" in err) == (True, True)
    # Nothing that is there is written over, and latents that were saved already are not saved twice.
    Path("clip.latents.safetensors").write_bytes(b"older")
    assert allegro("generate", PROMPT, "-o", "clip.mp4")[0] == 1
    assert Path("clip.latents.safetensors").read_bytes() == b"older"
    assert torch.equal(latents_of("clip.latents-1.safetensors"), latents_of("good.safetensors"))
    before = files()
    assert "in mine.safetensors. Decode" in allegro("generate", PROMPT, "-o", "clip.mp4", "--save-latents", "mine.safetensors")[2]
    assert sorted([*before, "mine.safetensors"]) == files()
    monkeypatch.undo()
    monkeypatch.chdir(Path("good.safetensors").absolute().parent)


@pytest.mark.parametrize("error", [NonFiniteError("NaN"), torch.OutOfMemoryError("no"), KeyboardInterrupt()], ids=repr)
def test_steps_are_kept_when_sampling_fails(allegro: Run, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    from allegro_model import pipeline
    assert allegro("generate", PROMPT, "-o", "good.mp4", "--save-latents", "good.safetensors")[0] == 0

    def fail(_: torch.Tensor, where: str, *__: str) -> None:
        if where == "step 3 of 4":
            raise error

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "check_finite", fail)
        code, _, err = allegro("generate", PROMPT, "-o", "clip.mp4")
    assert code == exit_code(error)
    assert "2 of 4 steps are saved. Go on with: allegro generate --resume clip.latents.safetensors -o clip.mp4 --model" in err
    assert allegro("generate", "--resume", "clip.latents.safetensors", "-o", "clip.mp4", "--save-latents", "l.safetensors")[0] == 0
    assert torch.equal(latents_of("l.safetensors"), latents_of("good.safetensors"))


def test_a_run_whose_steps_are_all_done_goes_on(allegro: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert allegro("generate", PROMPT, "-o", "good.mp4", "--save-latents", "good.safetensors")[0] == 0

    def fail(*_: object) -> None:
        raise RuntimeError("no VAE")

    with monkeypatch.context() as patch:
        patch.setattr(AllegroPipeline, "raw_latents", fail)
        code, _, err = allegro("generate", PROMPT, "-o", "clip.mp4")
    assert code == 1
    assert "4 of 4 steps are saved. Go on with: allegro generate --resume clip.latents.safetensors" in err
    code, _, err = allegro("generate", "--resume", "clip.latents.safetensors", "--stop-at-step", 2, "--save-latents", "l.safetensors")
    assert code == 2
    assert "all 4 steps of this run are done" in err
    assert allegro("generate", "--resume", "clip.latents.safetensors", "-o", "clip.mp4", "--save-latents", "l.safetensors")[0] == 0
    assert torch.equal(latents_of("l.safetensors"), latents_of("good.safetensors"))


def test_an_interruption_after_the_last_step_keeps_finished_latents(allegro: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt_at_the_end(self: console.Progress, done: int, total: int) -> None:
        if self.title == "Sampling" and done == total:
            raise KeyboardInterrupt

    monkeypatch.setattr(console.Progress, "update", interrupt_at_the_end)
    code, _, err = allegro("generate", PROMPT, "-o", "clip.mp4")
    assert code == 130
    assert "The finished latents are in clip.latents.safetensors. Decode them with" in err
    assert allegro("decode", "clip.latents.safetensors", "-o", "clip.mp4")[0] == 0


def test_an_unfinished_run_finds_another_place(allegro: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from allegro_model.cli import job
    real = job.write_bytes
    refused: list[Path] = []

    def refuse(path: Path, data: bytes, *, force: bool) -> None:
        if path.parent == Path() and not path.is_absolute():
            refused.append(path)
            if len(refused) > 1:
                signal.raise_signal(signal.SIGINT)  # Ctrl-C, while rescuing
            raise OutputError(f"Cannot write {path}: the disk is full.")
        real(path, data, force=force)

    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "elsewhere"))
    for module in (sys.modules["allegro_model.cli.generate"], job):
        monkeypatch.setattr(module, "write_bytes", refuse)
    code, _, err = allegro("generate", PROMPT, "--stop-at-step", 2, "--save-latents", "half.safetensors")
    assert code == 5
    assert [str(path) for path in refused] == ["half.safetensors", "half.safetensors", "half.latents.safetensors"]
    kept = tmp_path / "elsewhere" / "half.latents.safetensors"
    assert f"2 of 4 steps are saved. Go on with: allegro generate --resume {kept} -o clip.mp4" in err
    assert allegro("generate", "--resume", kept, "-o", "clip.mp4")[0] == 0
    # Nobody takes it: the first error is the one to show.
    refused.clear()
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path / "none"))
    code, _, err = allegro("generate", PROMPT, "--stop-at-step", 2, "--save-latents", "more.safetensors")
    assert code == 5
    assert err.count("The latents could not be kept: ") == 3


def test_space_for_an_unfinished_run_is_checked(allegro: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 99, 1))  # type: ignore[attr-defined]
    code, _, err = allegro("generate", PROMPT, "--stop-at-step", 2, "--save-latents", "half.safetensors")
    assert code == 5
    assert "Cannot write half.safetensors: about 0.0 MiB are needed" in err
    assert files() == []


def test_smaller_tiles_overlap_by_half_at_most(model: str) -> None:
    from argparse import Namespace

    from allegro_model.cli.job import _tiling
    pipeline = AllegroPipeline.from_pretrained(model)
    own = _tiling(Namespace(tile=None, overlap=None, tiles_per_batch=2), pipeline)
    small = _tiling(Namespace(tile=(12, 24, 8), overlap=None, tiles_per_batch=None), pipeline)
    assert own is not None
    assert small is not None
    assert (small.overlap_frames, small.overlap_height, small.overlap_width) == (
        min(own.overlap_frames, 4), min(own.overlap_height, 8), 0)


def test_latents_survive_a_full_disk(allegro: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: str) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(disk)], capture_output=True, check=False)
    if not mounted or mounted.returncode:
        pytest.skip("mounting a small disk needs root")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(elsewhere))
    try:
        (disk / "kept.mp4").write_bytes(b"mine")
        code, _, err = allegro("generate", PROMPT, "-o", "disk/clip.mp4", "--frames", 64, "--width", 64, "--height", 64)
        assert code == 5
        assert "MiB are needed and the disk has 0.0 MiB left" in err
        # A disk that fills up while the clip is written.
        from allegro_model.cli import job
        monkeypatch.setattr(job, "check_free_space", lambda *_: None)
        code, _, err = allegro("generate", PROMPT, "-o", "disk/clip.png", "--frames", 64, "--width", 64, "--height", 64)
        assert code == 5
        assert "the disk is full" in err
        assert os.listdir(disk) == ["kept.mp4"]
        assert (disk / "kept.mp4").read_bytes() == b"mine"
        assert os.listdir(elsewhere) == ["clip.latents.safetensors"]
        assert str(elsewhere / "clip.latents.safetensors") in err
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_read_only_folder(allegro: Run, tmp_path: Path) -> None:
    folder = tmp_path / "locked"
    folder.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(folder)], capture_output=True, check=False)
    if not mounted or mounted.returncode:
        pytest.skip("mounting a read-only disk needs root")
    try:
        code, _, err = allegro("generate", PROMPT, "-o", "locked/clip.mp4")
        assert code == 5
        assert "Cannot write locked/clip.mp4: the disk is read-only. Choose another folder." in err
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_nan_is_named(allegro: Run, model: str) -> None:
    shutil.copytree(model, "m")
    path = "m/transformer/diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["proj_out.bias"][:] = float("nan")
    save_file(tensors, path)
    code, _, err = allegro("generate", PROMPT, "-o", "a.mp4", "--model", "m", with_model=False)
    assert code == 8
    assert "NaN or Inf appeared in step 1 of 4" in err
    assert files() == ["m"]


def test_memory_is_checked_first(allegro: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    clip("in.mp4", frames=40)
    from allegro_model import pipeline
    from allegro_model.cli import convert, given
    for module in (memory, pipeline, convert, given):
        monkeypatch.setattr(module, "free_bytes", lambda device: 100_000)
    code, _, err = allegro("generate", PROMPT, "-o", "a.mp4", "--width", 512, "--height", 512)
    assert code == 6
    assert "Try, in this order: fewer frames" in err
    code, _, err = allegro("generate", PROMPT, "-o", "a.mp4", "--init-video", "in.mp4", "--width", 512, "--height", 512)
    assert code == 6
    code, _, err = allegro("encode", "in.mp4", "-o", "a.safetensors", "--frames", 40)
    assert code == 6
    code, _, err = allegro("encode", "in.mp4", "-o", "a.safetensors")
    assert code == 6
    assert "in.mp4 has more than the 4 frames of 32x32 that fit into memory" in err
    assert files() == ["in.mp4"]


# Ctrl-C, in real processes


def _child(words: list[str], folder: str) -> None:
    """Runs a command in a process of its own that writes to `log` and notes how much work it did after the signal."""
    os.chdir(folder)
    log = os.open("log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout = os.fdopen(1, "w")
    sys.stderr = os.fdopen(2, "w")
    console._LINE_SECONDS = 0.0  # one line per step and tile, to wait for
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, _note_time)
    code = cli.main(words)
    Path("seconds").write_text(str(time.process_time() - float(Path("seconds").read_text())))
    sys.exit(code)


def _note_time(number: int, frame: object) -> None:
    Path("seconds").write_text(str(time.process_time()))
    raise KeyboardInterrupt


def interrupt(folder: Path, words: list[str], marker: str, number: int = signal.SIGINT) -> tuple[int, str]:
    """Starts a command, sends a signal when it says `marker`; gives exit code and what it said.

    It must be gone within five seconds: of its own time, since other programs may keep the machine busy.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["allegro_model.cli"])
    process = context.Process(target=_child, args=(words, str(folder)))
    log, seconds = folder / "log", folder / "seconds"
    seconds.write_text("0")
    process.start()
    assert process.pid is not None
    while not (log.exists() and marker in log.read_text()):
        assert process.is_alive(), log.read_text()
        time.sleep(0.02)
    os.kill(process.pid, number)
    process.join(120)
    assert process.exitcode is not None, "it did not end"
    if number == signal.SIGINT:
        assert float(seconds.read_text()) < 5
    said = log.read_text()
    log.unlink()
    seconds.unlink()
    return process.exitcode, said


# Tiles that decode slowly enough to be stopped in the middle.
LARGE = ["--frames", "32", "--width", "128", "--height", "128", "--tile", "8x32x32", "--overlap", "4x24x24"]
MAKE = ["generate", PROMPT, "-o", "clip.mp4"]
KEPT = ["clip.latents.safetensors"]
STAGES: dict[str, tuple[list[str], str, list[str]]] = {
    "text": (MAKE, "Reading the prompt ...", []),
    "sampling": ([*MAKE, "--steps", "9999"], "Sampling: step 3 of", KEPT),
    "sampling, to be saved": ([*MAKE, "--steps", "9999", "--save-latents", "l.safetensors"], "Sampling: step 3 of",
                              ["l.safetensors"]),
    "decoding": ([*MAKE, "--steps", "1", *LARGE], "Decoding: tile 2 of", KEPT),
    "decoding pictures": (["generate", PROMPT, "-o", "clip.png", "--steps", "1", *LARGE], "Decoding: tile 2 of", KEPT),
    "encoding": (["encode", "in.mp4", "-o", "l.safetensors", *LARGE[6:]], "Encoding: tile 2 of", []),
    "terminated": ([*MAKE, "--steps", "1", *LARGE], "Decoding: tile 2 of", KEPT),
}


@pytest.mark.skipif(os.name != "posix", reason="signals between processes are a POSIX feature")
@pytest.mark.parametrize("stage", STAGES)
def test_ctrl_c(tmp_path: Path, model: str, stage: str) -> None:
    words, marker, kept = STAGES[stage]
    clip(str(tmp_path / "in.mp4"), frames=32, height=128, width=128)
    number = signal.SIGTERM if stage == "terminated" else signal.SIGINT
    code, said = interrupt(tmp_path, [*words, "--model", model], marker, number)
    assert code == 130, said
    assert "Cancelled during: " in said
    assert "Traceback" not in said
    assert sorted(os.listdir(tmp_path)) == sorted(["in.mp4", *kept])


@pytest.mark.skipif(os.name != "posix", reason="signals between processes are a POSIX feature")
def test_a_run_stopped_by_ctrl_c_goes_on(tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["generate", PROMPT, "--model", model, "--steps", "100"]
    code, said = interrupt(tmp_path, [*words, "-o", "a.png", "--save-latents", "half.safetensors"], "Sampling: step 3 of")
    assert code == 130, said
    assert "of 100 steps are saved. Go on with: allegro generate --resume half.safetensors -o a.png" in said
    assert cli.main(["generate", "--resume", "half.safetensors", "-o", "a.png", "--model", model, "--quiet"]) == 0
    assert cli.main([*words, "-o", "b.png", "--quiet"]) == 0
    assert Path("a_00005.png").read_bytes() == Path("b_00005.png").read_bytes()


# The program


def test_module_and_exit_codes(tmp_path: Path) -> None:
    """`python -m allegro_model` from another folder; the exit code reaches the shell."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-m", "allegro_model", "inspect", "none"], cwd=tmp_path, env=environment,
                          capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr == "Error: There is nothing at none. Check the path.\n"


def test_help(allegro: Run) -> None:
    code, out, _ = allegro("--help", with_model=False)
    assert code == 0
    for number, meaning, _ in EXIT_CODES:
        assert re.search(rf"^ +{number}  {re.escape(meaning)}$", out, re.MULTILINE)
    for command in ("generate", "decode", "encode", "inspect"):
        assert f"    {command}" in out
        code, text, _ = allegro(command, "--help", with_model=False)
        assert code == 0
        assert f"examples:\n  allegro {command} " in text
        assert "130  cancelled with Ctrl-C" in text
    assert allegro("--version", with_model=False)[:2] == (0, f"allegro {__version__}\n")
    code, _, err = allegro("generate", "--seed", "x", with_model=False)
    assert code == 2
    assert err.endswith("argument --seed: invalid int value: 'x'\nTry: allegro generate --help\n")


def test_documented_examples_parse() -> None:
    """Every command line shown in the help is accepted by the parser."""
    import shlex

    from allegro_model.cli import parser as module
    from allegro_model.cli import submit_options
    lines = [line.strip() for text in (*vars(module).values(), *vars(submit_options).values()) if isinstance(text, str)
             for line in text.splitlines() if line.startswith("  allegro ")]
    assert len(lines) >= 13
    for line in lines:
        module.parse_arguments(shlex.split(line)[1:])


# The console


class Terminal:
    """A stream that says it is a terminal, and keeps what is written."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> int:
        self.text += text
        return len(text)

    def flush(self) -> None:
        pass

    def isatty(self) -> bool:
        return True


def test_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setenv("COLUMNS", "90")
    terminal = Terminal()
    with Console(terminal).progress("Sampling", "step") as bar:  # type: ignore[arg-type]
        for step in range(1, 101):
            now[0] += 2.0
            bar.update(step, 100)
    drawn = terminal.text.split("\r\x1b[K")
    assert drawn[1] == "Sampling ..."
    assert drawn[51] == "Sampling [############............] step 50 of 100, 2.0 s each, 1:40 left"
    assert drawn[-1] == "Sampling: done in 3:20\n"
    assert all(len(line) < 90 for line in drawn)


def test_lines_elsewhere(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def steps(first: int) -> None:
        with Console().progress("Sampling", "step") as bar:
            for step in range(first, 101):
                now[0] += 1.0
                bar.update(step, 100)

    steps(1)
    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == ["Sampling ...", "Sampling: step 3 of 100, 1.0 s each, 1:37 left"]
    assert lines[-1] == "Sampling: done in 1:40"
    assert 8 < len(lines) < 14
    steps(91)  # a resumed run counts its own steps only
    assert "Sampling: step 100" not in capsys.readouterr().err

    def stop() -> None:
        with Console().progress("Decoding", "tile") as bar:
            bar.update(2, 8)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop()
    assert capsys.readouterr().err.splitlines()[-1] == "Decoding: stopped after 0.0 s, at tile 2 of 8"


def test_time_passes_where_nothing_can_be_counted(monkeypatch: pytest.MonkeyPatch,
                                                 capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(console, "_TICK_SECONDS", 0.01)
    monkeypatch.setattr(console, "_LINE_SECONDS", 0.02)
    terminal = Terminal()
    for target in (terminal, None):
        with Console(target).progress("Reading the prompt"):  # type: ignore[arg-type]
            time.sleep(0.5)
    assert len(re.findall(r"Reading the prompt \.\.\. 0\.\d s", terminal.text)) > 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Reading the prompt ..."
    assert re.fullmatch(r"Reading the prompt: 0\.\d s", lines[1])
    assert re.fullmatch(r"Reading the prompt: done in \d\.\d s", lines[-1])


def test_a_console_that_lacks_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    import io
    plain = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", plain)
    Console().result("prompt: \u732b \udcff")
    plain.seek(0)
    assert plain.read() == "prompt: ? ?\n"


def test_what_a_terminal_would_obey_is_not_passed_on() -> None:
    """Messages hold what servers and files say."""
    terminal = Terminal()
    said = Console(terminal)  # type: ignore[arg-type]
    said.error("a\x1b[2J\x07\r\x9bb\tc\nd")
    with StatusLine(said) as line:
        line.show("\x1b]0;title\x07")
    assert terminal.text.replace("\r\x1b[K", "") == "a?[2J???b\tc\nd\n?]0;title?"


def test_units() -> None:
    assert [duration(s) for s in (0.04, 9.94, 10, 59.4, 59.6, 61, 3599.6, 3723)] == [
        "0.0 s", "9.9 s", "10 s", "59 s", "1:00", "1:01", "1:00:00", "1:02:03"]
    assert [size(n) for n in (17, 1024, 1.5 * 2**20, 2**30, 2**44)] == [
        "17 B", "1.0 KiB", "1.5 MiB", "1.0 GiB", "16384.0 GiB"]


def test_log_messages_are_shown_once_and_the_logger_is_left_alone(allegro: Run) -> None:
    import logging
    logger = logging.getLogger("allegro_model")
    before = (logger.level, logger.propagate, list(logger.handlers))
    assert allegro("inspect", "none")[0] == 3
    assert (logger.level, logger.propagate, list(logger.handlers)) == before


def test_signal_handlers_are_restored(allegro: Run) -> None:
    before: Any = signal.getsignal(signal.SIGTERM)
    assert allegro("inspect", "none")[0] == 3
    assert signal.getsignal(signal.SIGTERM) is before
