"""Checks of the LoRA loader that need ComfyUI's Python objects; see checks.py."""

import shutil
from collections.abc import Callable
from typing import Any

import torch
from bootstrap import Host, call
from checks import model, parts, raises, relative, same, sample
from safetensors.torch import save_file
from torch import Tensor


def lora_tensors(rename: Callable[[str], str], down: str, up: str) -> dict[str, Tensor]:
    """A LoRA for two layers of the random model, with another rank and alpha for each."""
    shapes = {"transformer_blocks.0.attn2.to_v": (192, 192), "transformer_blocks.1.ff.net.0.proj": (768, 192)}
    tensors = {}
    for rank, (layer, (rows, columns)) in enumerate(shapes.items(), 2):
        generator = torch.Generator().manual_seed(rank)
        stem = rename(layer)
        tensors[f"{stem}.{down}.weight"] = torch.randn((rank, columns), generator=generator) * 0.2
        tensors[f"{stem}.{up}.weight"] = torch.randn((rows, rank), generator=generator) * 0.2
        tensors[f"{stem}.alpha"] = torch.tensor(float(rank * rank))
    return tensors


def with_lora(h: Host, name: str, strength: float = 1.0, dit: Any = None) -> Any:
    return h.run("AllegroLoraLoader", model=dit or parts(h)[0], lora_name=name, strength_model=strength)


def check_loras_of_every_dialect_give_the_same_clip(h: Host) -> None:
    """The same to the bit, and the same as the package's merged weights; ComfyUI's own loader knows some of them only."""
    folder = h.base / "models" / "loras"
    dialects = {"comfyui": ("diffusion_model.{}", "lora_A", "lora_B"), "diffusers": ("transformer.{}", "lora_A", "lora_B"),
                "peft": ("base_model.model.{}", "lora_A.default", "lora_B.default"), "bare": ("{}", "lora.down", "lora.up"),
                "kohya": ("lora_unet_{}", "lora_down", "lora_up"), "flat": ("lora_transformer_{}", "lora_down", "lora_up")}
    results = {}
    for name, (pattern, down, up) in dialects.items():
        def rename(layer: str, pattern: str = pattern) -> str:
            return pattern.format(layer if "." in pattern or pattern == "{}" else layer.replace(".", "_"))

        save_file(lora_tensors(rename, down, up), str(folder / f"dialect_{name}.safetensors"))
        results[name] = sample(h, with_lora(h, f"dialect_{name}.safetensors", 0.7))
    reference = results["comfyui"]
    assert relative(reference, sample(h)) > 1e-3
    for name, result in results.items():
        assert torch.equal(result, reference), name
    merged = h.base / "models" / "allegro" / "merged"
    shutil.copytree(h.base / "models" / "allegro" / "tiny-random", merged)
    try:
        loading = h.module("allegro_model.loading")
        dit = loading.load_dit(merged, loras=[(folder / "dialect_kohya.safetensors", 0.7)])
        save_file(dit.state_dict(), str(merged / "transformer" / "diffusion_pytorch_model.safetensors"))
        error = relative(sample(h, model(h, "merged/transformer")), reference)
        assert error < 1e-6, error
    finally:
        shutil.rmtree(merged)
    theirs = call(h.core.NODE_CLASS_MAPPINGS["LoraLoaderModelOnly"], model=parts(h)[0],
                  lora_name="dialect_comfyui.safetensors", strength_model=0.7)
    assert torch.equal(sample(h, theirs), reference)


def check_loras_stack_and_leave_their_input_alone(h: Host) -> None:
    dit = parts(h)[0]
    before = sample(h, dit)  # ComfyUI takes what others patched off again when it loads this one
    weights = {name: p.clone() for name, p in dit.model.diffusion_model.state_dict().items()}
    first = with_lora(h, "style.safetensors", 0.05)
    alone = sample(h, first)
    both = sample(h, with_lora(h, "style.safetensors", 0.05, first))
    assert relative(both, alone) > 1e-4
    assert relative(both, sample(h, with_lora(h, "style.safetensors", 0.1))) < 1e-5
    undone = with_lora(h, "style.safetensors", -0.05, first)
    assert relative(sample(h, undone), before) < 1e-5
    assert torch.equal(sample(h, first), alone)
    assert torch.equal(sample(h, dit), before)
    assert not dit.patches
    assert same(dit.model.diffusion_model.state_dict(), weights)
    assert with_lora(h, "style.safetensors", 0.0) is dit


def check_loras_fit_eight_bit_weights(h: Host) -> None:
    for name, dtype in (("dit_scaled.safetensors", "default"), ("tiny-random/transformer", "fp8_e4m3fn"),
                        ("tiny-random/transformer", "bf16")):
        dit = model(h, name, dtype)
        plain, styled = sample(h, dit), sample(h, with_lora(h, "style.safetensors", 0.05, dit))
        expected = sample(h, with_lora(h, "style.safetensors", 0.05))
        assert relative(styled, plain) > 1e-4, (name, dtype)
        assert relative(styled, expected) < 0.15, (name, dtype, relative(styled, expected))


def check_loras_that_do_not_fit_are_explained(h: Host) -> None:
    raises("UnsupportedCheckpoint", "is a LoRA for another model: none of its 2 tensors fits",
           lambda: with_lora(h, "for_another_model.safetensors"))
    raises("UnsupportedCheckpoint", "expected a LoRA for Allegro", lambda: with_lora(h, "no_lora.safetensors"))
    raises("CheckpointError", "is not among the LoRAs that ComfyUI lists", lambda: with_lora(h, "../style.safetensors"))
    raises("ScheduleError", "must be a finite number", lambda: with_lora(h, "style.safetensors", float("nan")))
    extra = {"lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.ones(2, 8)}
    path = h.base / "models" / "loras" / "with_text.safetensors"
    save_file(lora_tensors(lambda layer: f"transformer.{layer}", "lora_A", "lora_B") | extra, str(path))
    h.log.clear()
    assert len(with_lora(h, "with_text.safetensors").patches) == 2
    (line,) = [line for line in h.log if "fit no layer" in line]
    assert line.startswith("WARNING with_text.safetensors: 1 of 7 tensors"), line
    assert "lora_te1_text_model_encoder_layers_0_mlp_fc1" in line


def check_loras_fit_the_image_to_video_model(h: Host) -> None:
    """Also the layers that text to video has not; the weights become those that the package merges."""
    name, path = "pos_embed_masked_video.1", h.base / "models" / "loras" / "for_images.safetensors"
    stem = f"lora_unet_{name.replace('.', '_')}"
    generator = torch.Generator().manual_seed(9)
    save_file({f"{stem}.lora_down.weight": torch.randn((2, 192), generator=generator),
               f"{stem}.lora_up.weight": torch.randn((192, 2), generator=generator)}, str(path))
    patched = with_lora(h, path.name, 0.5, model(h, "tiny-random-ti2v/transformer"))
    assert list(patched.patches) == [f"diffusion_model.{name}.weight"]
    folder = h.base / "models" / "allegro" / "tiny-random-ti2v"
    load_dit = h.module("allegro_model.loading").load_dit
    expected, plain = load_dit(folder, loras=[(path, 0.5)]).state_dict(), load_dit(folder).state_dict()
    patched.patch_model()
    try:
        found = patched.model.diffusion_model.state_dict()
        assert relative(found[f"{name}.weight"], expected[f"{name}.weight"]) < 1e-6
        assert relative(found[f"{name}.weight"], plain[f"{name}.weight"]) > 0.1
        assert torch.equal(found["proj_out.weight"], plain["proj_out.weight"])
    finally:
        patched.unpatch_model()
