"""Training a LoRA: what is trained, what is written, and what it learns from."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from snapshot import write_snapshot
from tiny import DIT, tiny_dit

from allegro_model.dit import AllegroDiT
from allegro_model.errors import AllegroError, CheckpointMismatch
from allegro_model.latents import pack_latents
from allegro_model.loading import apply_loras, bundled_model, load_vae, read_lora
from allegro_model.training import lora
from allegro_model.training.adapters import Adapters, choose_layers, write_lora
from allegro_model.training.analyse import analyse
from allegro_model.training.captions import write_caption
from allegro_model.training.distributed import Workers
from allegro_model.training.lessons import (
    FixedCaptions,
    draw_lesson,
    encode_lessons,
    lora_combinations,
    read_folder,
)
from allegro_model.training.palette import BACKGROUND_COLOURS, LORA_COLOUR, OBJECT_COLOURS, combinations
from allegro_model.training.recipe import CANVAS
from allegro_model.training.scenes import draw_shape

TARGETS = ("attn2.to_v", "ff.net.2", "caption_projection.linear_1")


def adapters(dit: AllegroDiT, rank: int = 3, alpha: float = 6.0) -> Adapters:
    return Adapters(choose_layers(dit, TARGETS), rank, alpha, torch.Generator().manual_seed(1))


def inputs(seed: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn((1, 4, 2, 4, 4), generator=generator), torch.tensor([500.0]),
            torch.randn((1, 5, DIT.caption_channels), generator=generator))


# What is trained


def test_targets_are_ends_of_names() -> None:
    chosen = choose_layers(tiny_dit(), TARGETS)
    assert list(chosen) == ["caption_projection.linear_1", "transformer_blocks.0.attn2.to_v", "transformer_blocks.0.ff.net.2",
                            "transformer_blocks.1.attn2.to_v", "transformer_blocks.1.ff.net.2"]
    with pytest.raises(CheckpointMismatch, match=r"--targets o_v: no linear layer .* such as attn1\.to_k,"):
        choose_layers(tiny_dit(), ("o_v",))


def test_adapters_start_as_nothing_and_leave_the_layers_alone() -> None:
    dit = tiny_dit()
    before, weights = dit(*inputs()), {name: p.clone() for name, p in dit.named_parameters()}
    added = adapters(dit)
    assert torch.equal(dit(*inputs()), before)
    with torch.no_grad():
        for up in added.up:
            up.fill_(0.1)
    assert not torch.allclose(dit(*inputs()), before, atol=1e-4)
    added.remove()
    assert torch.equal(dit(*inputs()), before)
    assert {name for name, _ in dit.named_parameters()} == weights.keys()
    assert all(torch.equal(p, weights[name]) for name, p in dit.named_parameters())


def test_only_the_adapters_get_gradients() -> None:
    dit = tiny_dit()
    added = adapters(dit)
    dit(*inputs()).square().mean().backward()
    assert all(float(up.grad.abs().max()) > 0 for up in added.up)
    assert all(p.grad is None for p in dit.parameters())


def test_the_written_file_draws_what_was_trained(tmp_path: Path) -> None:
    """Merged into the weights it gives what the adapters gave beside them; alpha is not lost."""
    dit = tiny_dit()
    added = adapters(dit)
    with torch.no_grad():
        for i, up in enumerate(added.up):
            up.copy_(torch.linspace(-0.2, 0.2 + 0.1 * i, up.numel()).view_as(up).half())
        for down in added.down:
            down.copy_(down.half())
    expected = dit(*inputs())
    path = tmp_path / "new" / "a.safetensors"
    write_lora(path, added, added.state_dict(), {"title": "a"})
    merged = tiny_dit()
    apply_loras(merged, [(path, 1.0)])
    assert torch.allclose(merged(*inputs()), expected, atol=1e-5)
    assert not torch.allclose(tiny_dit()(*inputs()), expected, atol=1e-3)
    with safe_open(path, framework="pt") as opened:
        about = json.loads(opened.metadata()["lora_adapter_metadata"])
    assert (about["transformer.r"], about["transformer.lora_alpha"]) == (3, 6.0)
    assert about["transformer.target_modules"] == added.names
    shapes = {name: tuple(p.shape) for name, p in tiny_dit().state_dict().items()}
    assert {layer.alpha for layer in read_lora(path, shapes).values()} == {6.0}
    assert {name.split(".")[0] for name in load_file(path)} == {"diffusion_model"}
    assert [file.name for file in path.parent.iterdir()] == ["a.safetensors"]


# What it learns from


def test_the_new_colour_is_new_and_its_word_is_known() -> None:
    assert LORA_COLOUR not in OBJECT_COLOURS + BACKGROUND_COLOURS
    assert not any(LORA_COLOUR in combination for held_out in (True, False) for combination in combinations(held_out=held_out))
    vocabulary = json.loads((bundled_model("tiny") / "tokenizer" / "tokenizer.json").read_text(encoding="utf-8"))
    assert f"\u2581{LORA_COLOUR}" in [piece for piece, _ in vocabulary["model"]["vocab"]]


def test_lessons_hold_the_test_combinations_back_and_repeat_the_old() -> None:
    rng = np.random.default_rng(0)
    lessons = [draw_lesson(rng) for _ in range(300)]
    new = [a for a in lessons if a.get("object") == LORA_COLOUR]
    assert 0.5 < len(new) / len(lessons) < 0.7
    seen = {(a["object"], a["background"], a["shape"], a["direction"]) for a in new}
    held_out = set(lora_combinations(held_out=True))
    assert len(held_out) >= 5
    assert not seen & held_out
    assert {a["kind"] for a in lessons} == {"shape", "sea", "clouds", "ball"}


def test_captions_of_the_new_colour_have_the_right_article() -> None:
    attributes = {"kind": "shape", "object": LORA_COLOUR, "background": "gray", "shape": "circle", "direction": "left"}
    rng = np.random.default_rng(0)
    captions = {write_caption(attributes, rng) for _ in range(100)}
    assert any("an orange" in caption for caption in captions)
    assert not any("a orange" in caption for caption in captions)


def test_the_analysis_knows_the_new_colour() -> None:
    for colour in (*OBJECT_COLOURS, LORA_COLOUR):
        attributes = {"object": colour, "background": "black", "shape": "circle", "direction": "left"}
        frames = draw_shape(CANVAS, attributes, np.random.default_rng(3))
        assert analyse((frames * 255).round().astype(np.uint8), "shape")["object"] == colour


def test_lessons_are_the_same_every_time() -> None:
    vae = load_vae(bundled_model("tiny"))
    latents, attributes = encode_lessons(vae, 2, 5)
    again, same = encode_lessons(vae, 2, 5)
    assert latents.shape == (2, 4, 6, 8, 12)
    assert torch.equal(latents, again)
    assert attributes == same
    assert not torch.equal(latents, encode_lessons(vae, 2, 6)[0])


def write_clip(folder: Path, name: str, caption: str | None, size: tuple[int, int, int] = (2, 4, 4)) -> None:
    latents = torch.randn((1, 4, *size), generator=torch.Generator().manual_seed(len(name)))
    (folder / f"{name}.safetensors").write_bytes(pack_latents(latents, {}))
    if caption is not None:
        (folder / f"{name}.txt").write_text(caption, encoding="utf-8")


def test_a_folder_of_latents_and_captions(tmp_path: Path) -> None:
    write_clip(tmp_path, "one", "a cat")
    write_clip(tmp_path, "three", "a dog", (3, 4, 6))
    examples = read_folder(tmp_path, 0.5)
    assert [(list(e.latents.shape), e.caption) for e in examples] == [([1, 4, 2, 4, 4], "a cat"), ([1, 4, 3, 4, 6], "a dog")]
    seen = []

    def encode(texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        seen.extend(texts)
        return torch.ones((len(texts), 5, DIT.caption_channels)), torch.ones((len(texts), 5), dtype=torch.bool)

    dit = tiny_dit()
    added = adapters(dit)
    loss = FixedCaptions(dit, examples, encode, 2)
    assert seen == ["a cat", "a dog", ""]
    first, again, other = (loss(0, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    first.backward()
    assert all(float(up.grad.abs().max()) > 0 for up in added.up)


def test_a_folder_without_captions_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AllegroError, match="holds 0 files of latents"):
        read_folder(tmp_path, 1.0)
    write_clip(tmp_path, "one", None)
    with pytest.raises(AllegroError, match=r"holds 1 files of latents, 1 of them without a caption \['one.safetensors'\]"):
        read_folder(tmp_path, 1.0)


# The command


@pytest.mark.parametrize("arguments", [
    ["--out", "a.safetensors", "--model", "DIR"], ["--out", "a.safetensors", "--rank", "0"], ["--out", "a.safetensors", "--steps", "0"], []])
def test_impossible_commands_are_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit):
        lora.parse(arguments)


def test_a_run_on_own_clips_ends_with_a_file_and_nothing_else(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed (extra: standalone)")
    clips = tmp_path / "clips"
    clips.mkdir()
    write_clip(clips, "one", "a red circle")
    out = tmp_path / "out" / "mine.safetensors"
    model = write_snapshot(tmp_path / "Small")
    arguments = ["--out", str(out), "--model", str(model), "--data", str(clips), "--steps", "3", "--batch", "1",
                 "--rank", "2", "--alpha", "1", "--targets", "attn2.to_v"]
    lora.train(Workers(), lora.parse(arguments))
    assert [file.name for file in out.parent.iterdir()] == ["mine.safetensors"]
    tensors = load_file(out)
    assert len(tensors) == 3 * DIT.num_layers
    assert float(tensors["diffusion_model.transformer_blocks.0.attn2.to_v.lora_B.weight"].float().abs().max()) > 0
    assert float(tensors["diffusion_model.transformer_blocks.0.attn2.to_v.alpha"]) == 1.0


def test_large_models_keep_the_input_of_a_block_only() -> None:
    """Computed again for the gradients, which stay the same."""
    gradients = []
    for recompute in (False, True):
        dit = tiny_dit()
        if recompute:
            for block in dit.transformer_blocks:
                lora._recompute(block)
        added = adapters(dit)
        dit(*inputs()).square().mean().backward()
        gradients.append([up.grad for up in added.up])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients, strict=True))
