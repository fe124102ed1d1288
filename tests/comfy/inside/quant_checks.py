"""Checks of quantised files that need ComfyUI's Python objects; see checks.py."""

import shutil

from bootstrap import Host
from checks import conditioning, model, parts, raises, relative, sample
from lora_checks import with_lora


def check_converted_fp8_is_read_by_comfyui(h: Host) -> None:
    """What `allegro convert` writes, by ComfyUI's own mechanism; a LoRA on top."""
    convert = h.module("allegro_model.loading.convert").convert_checkpoint
    root = h.base / "models" / "allegro" / "tiny-random"
    convert(root / "transformer", h.base / "models" / "diffusion_models" / "converted.safetensors", "fp8", force=True)
    dit = model(h, "converted.safetensors")
    error = relative(sample(h, dit), sample(h))
    assert 1e-4 < error < 0.15, error
    styled, expected = sample(h, with_lora(h, "style.safetensors", 0.05, dit)), sample(h, with_lora(h, "style.safetensors", 0.05))
    assert relative(styled, sample(h, dit)) > 1e-4
    assert relative(styled, expected) < 0.15, relative(styled, expected)
    small = h.base / "models" / "allegro" / "converted"
    shutil.copytree(root, small, ignore=shutil.ignore_patterns("model.safetensors"))
    try:
        convert(root / "text_encoder", small / "text_encoder" / "model.safetensors", "fp8")
        clip = h.run("LoadAllegroT5", clip_name="converted/text_encoder", device="cpu")
        found = h.run("AllegroT5Encode", clip=clip, text="a red circle", role="positive", clean_caption=True,
                      prompt_weighting=False)[0]
        reference = conditioning(h, "a red circle")[0]
        mask = reference[1]["attention_mask"].bool()
        error = relative(found[0][mask].float(), reference[0][mask].float())
        assert 1e-5 < error < 0.2, error
    finally:
        shutil.rmtree(small)


def check_formats_that_are_not_read_are_refused(h: Host) -> None:
    convert = h.module("allegro_model.loading.convert").convert_checkpoint
    path = h.base / "models" / "diffusion_models" / "converted_int8.safetensors"
    convert(h.base / "models" / "allegro" / "tiny-random" / "transformer", path, "int8", force=True)
    raises("UnsupportedCheckpoint", "is stored as int8, which these nodes do not read yet", lambda: model(h, path.name))
    assert parts(h)
