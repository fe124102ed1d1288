"""`allegro generate --lora`: how it is written, what it draws, what files say about it, and resumed runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from snapshot import write_snapshot
from tiny import tiny_dit

from allegro_model import AllegroPipeline, cli
from allegro_model.cli.parser import parse_arguments
from allegro_model.loading import apply_loras

pytest.importorskip("imageio_ffmpeg", reason="imageio-ffmpeg is not installed (extra: standalone)")
pytest.importorskip("transformers", reason="transformers is not installed (extra: standalone)")

PROMPT = "a red circle moves to the right"
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_snapshot(tmp_path_factory.mktemp("models") / "Small")


@pytest.fixture
def allegro(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], model: Path) -> Run:
    """Runs `generate` in a folder with two LoRAs; gives exit code, standard output and error."""
    monkeypatch.chdir(tmp_path)
    for name, seed in (("style.safetensors", 1), ("other.safetensors", 2)):
        write_lora(name, seed)

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            code = cli.main(["generate", *map(str, arguments), "--model", str(model)])
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def write_lora(name: str, seed: int, layer: str = "transformer_blocks.0.attn1.to_q") -> None:
    generator = torch.Generator().manual_seed(seed)
    save_file({f"transformer.{layer}.lora_A.weight": torch.randn((2, 48), generator=generator),
               f"transformer.{layer}.lora_B.weight": torch.randn((48, 2), generator=generator)}, name)


def latents_of(path: str) -> torch.Tensor:
    return load_file(path)["latent_tensor"]


def metadata_of(path: str) -> dict[str, object]:
    from allegro_model.latents import read_latents

    return read_latents(path)[1]


# The command line


@pytest.mark.parametrize(("text", "expected"), [
    ("style.safetensors", ("style.safetensors", 1.0)),
    ("style.safetensors:0.8", ("style.safetensors", 0.8)),
    ("style.safetensors:-1", ("style.safetensors", -1.0)),
    ("style.safetensors:+.5", ("style.safetensors", 0.5)),
    ("style.safetensors:1e-05", ("style.safetensors", 1e-05)),
    ("tiny/orange:2.", ("tiny/orange", 2.0)),
    (r"C:\loras\style.safetensors", (r"C:\loras\style.safetensors", 1.0)),
    (r"C:\loras\style.safetensors:0.8", (r"C:\loras\style.safetensors", 0.8)),
    ("C:/loras/1:0.8", ("C:/loras/1", 0.8)),
    (r"C:2", ("C:2", 1.0)),
    ("folder/a:b/x.safetensors:3", ("folder/a:b/x.safetensors", 3.0)),
])
def test_file_and_strength(text: str, expected: tuple[str, float]) -> None:
    assert parse_arguments(["generate", PROMPT, "--lora", text]).lora == [expected]


def test_several_in_the_order_given() -> None:
    words = ["generate", PROMPT, "--lora", "a.safetensors", "--lora", "b.safetensors:-0.5"]
    assert parse_arguments(words).lora == [("a.safetensors", 1.0), ("b.safetensors", -0.5)]
    assert parse_arguments(["generate", PROMPT]).lora == []


@pytest.mark.parametrize("text", ["x.safetensors:0,8", "x.safetensors:much", "x.safetensors:"])
def test_a_strength_that_is_no_number(text: str, allegro: Run) -> None:
    code, _, err = allegro(PROMPT, "-o", "a.mp4", "--lora", text)
    assert code == 2
    assert "expected FILE or FILE:STRENGTH, such as style.safetensors:0.8" in err


@pytest.mark.parametrize(("lora", "code", "words"), [
    ("none.safetensors:0.5", 4, "none.safetensors does not exist"),
    ("foreign.safetensors", 4, "foreign.safetensors is a LoRA for another model: none of its 2 tensors fits"),
    ("Small/vae", 4, "is an Allegro VideoVAE; expected a LoRA for Allegro"),
])
def test_a_wrong_file_is_refused_before_the_run(lora: str, code: int, words: str, allegro: Run, model: Path) -> None:
    write_lora("foreign.safetensors", 3, "blocks.7.q")
    Path("Small").symlink_to(model)
    assert allegro(PROMPT, "-o", "a.mp4", "--lora", lora)[0] == code
    found = allegro(PROMPT, "-o", "a.mp4", "--lora", lora, "--json", "report.json", "--force")
    assert words in found[2]
    assert json.loads(Path("report.json").read_text())["error"]["stage"] == "checking"


# What is drawn


def test_the_clip_is_that_of_the_merged_weights(allegro: Run, model: Path) -> None:
    loras = [("style.safetensors", 0.5), ("other.safetensors", -1.0)]
    code, _, err = allegro(PROMPT, "-o", "a.png", "--save-latents", "a.safetensors", "--lora", "style.safetensors:0.5",
                           "--lora", "other.safetensors:-1")
    assert code == 0
    assert "Small + style.safetensors at 0.5 + other.safetensors at -1: 8 frames" in err
    merged = tiny_dit()
    apply_loras(merged, loras)
    copy = Path("Merged")
    copy.mkdir()
    for part in ("vae", "text_encoder", "tokenizer", "model_index.json"):
        (copy / part).symlink_to(model / part)
    (copy / "transformer").mkdir()
    save_file(merged.state_dict(), copy / "transformer" / "diffusion_pytorch_model.safetensors")
    (copy / "transformer" / "config.json").write_text((model / "transformer" / "config.json").read_text())
    expected = AllegroPipeline.from_pretrained(copy, device="cpu")(PROMPT, seed=42)
    given = AllegroPipeline.from_pretrained(model, device="cpu", loras=loras)(PROMPT, seed=42)
    assert torch.equal(given, expected)
    plain = AllegroPipeline.from_pretrained(model, device="cpu")(PROMPT, seed=42)
    assert not torch.allclose(plain, expected, atol=1e-3)
    pipeline = AllegroPipeline.from_pretrained(copy, device="cpu")
    decoded = torch.cat(list(pipeline.decode_stream(latents_of("a.safetensors"))), dim=2)
    assert torch.equal(decoded, expected)


def test_a_lora_is_merged_in_the_type_of_the_run(allegro: Run, model: Path) -> None:
    """A half-precision file that is computed in float32: rounding the sum to half precision would be a loss."""
    half = Path("Half")
    half.mkdir()
    for part in ("vae", "text_encoder", "tokenizer", "model_index.json"):
        (half / part).symlink_to(model / part)
    (half / "transformer").mkdir()
    weights = {name: p.half() for name, p in tiny_dit().state_dict().items()}
    save_file(weights, half / "transformer" / "diffusion_pytorch_model.safetensors")
    (half / "transformer" / "config.json").write_text((model / "transformer" / "config.json").read_text())
    dit = AllegroPipeline.from_pretrained(half, device="cpu", loras=[("style.safetensors", 1.0)]).dit
    exact = AllegroPipeline.from_pretrained(half, device="cpu").dit
    apply_loras(exact, [("style.safetensors", 1.0)])
    assert all(torch.equal(a, b) for a, b in zip(dit.parameters(), exact.parameters(), strict=True))
    assert {p.dtype for p in dit.parameters()} == {torch.float32}


# What files say, and resumed runs


def test_files_name_their_loras(allegro: Run) -> None:
    assert allegro(PROMPT, "-o", "a.png", "--steps", 1, "--save-latents", "a.safetensors", "--lora", "style.safetensors:0.5")[0] == 0
    (entry,) = metadata_of("a.safetensors")["loras"]
    assert entry == {"name": "style.safetensors", "strength": 0.5, "hash": entry["hash"]}
    assert len(entry["hash"]) == 10
    assert allegro(PROMPT, "-o", "b.png", "--steps", 1, "--save-latents", "b.safetensors")[0] == 0
    assert "loras" not in metadata_of("b.safetensors")


def test_a_resumed_run_needs_the_same_loras(allegro: Run) -> None:
    lora = ("--lora", "style.safetensors:0.3", "--lora", "other.safetensors:-1")
    assert allegro(PROMPT, "-o", "one.png", "--save-latents", "one.safetensors", *lora)[0] == 0
    code, _, err = allegro(PROMPT, "--stop-at-step", 2, "--save-latents", "half.safetensors", *lora)
    assert code == 0
    assert "--lora style.safetensors:0.3 --lora other.safetensors:-1.0" in err
    resume = ("--resume", "half.safetensors", "-o", "two.png", "--save-latents", "two.safetensors")
    for wrong in ((), lora[:2], ("--lora", "style.safetensors:0.4", *lora[2:]), ("--lora", "other.safetensors:0.3", *lora[2:])):
        code, _, err = allegro(*resume, *wrong)
        assert code == 2, wrong
        assert "half.safetensors was made with style.safetensors:0.3 (" in err
        assert "give --lora style.safetensors:0.3 --lora other.safetensors:-1.0. In brackets, a hash of the file." in err
    Path("style.safetensors").rename("renamed.safetensors")
    assert allegro(*resume, "--lora", "renamed.safetensors:0.3", *lora[2:])[0] == 0
    assert torch.equal(latents_of("one.safetensors"), latents_of("two.safetensors"))


def test_a_plain_run_is_not_resumed_with_a_lora(allegro: Run) -> None:
    assert allegro(PROMPT, "--stop-at-step", 1, "--save-latents", "half.safetensors")[0] == 0
    code, _, err = allegro("--resume", "half.safetensors", "-o", "a.png", "--lora", "style.safetensors")
    assert code == 2
    assert "was made with no LoRA, not with style.safetensors:1.0 (" in err
    assert "leave out --lora" in err


def test_a_damaged_list_of_loras_is_refused(allegro: Run) -> None:
    assert allegro(PROMPT, "--stop-at-step", 1, "--save-latents", "half.safetensors", "--lora", "style.safetensors")[0] == 0
    from safetensors import safe_open

    with safe_open("half.safetensors", framework="pt") as opened:
        metadata = json.loads(opened.metadata()["allegro"])
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}
    for broken in ("style", [{"name": "style.safetensors"}], [3]):
        save_file(tensors, "edited.safetensors", {"allegro": json.dumps({**metadata, "loras": broken})})
        code, _, err = allegro("--resume", "edited.safetensors", "-o", "a.png", "--lora", "style.safetensors")
        assert code == 2
        assert "holds no usable list of LoRAs" in err
