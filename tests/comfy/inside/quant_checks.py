"""Checks of quantised files that need ComfyUI's Python objects; see checks.py."""

import shutil
from pathlib import Path
from typing import Any

import torch
from bootstrap import Host, call
from checks import conditioning, model, parts, prompts, raises, relative, sample
from lora_checks import lora_tensors, with_lora
from safetensors.torch import save_file
from torch import Tensor


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


PACKED = {"int8": "packed_int8.safetensors", "gguf-q8_0": "packed_q8.gguf"}


def packed_dit(h: Host, kind: str) -> Any:
    """The random transformer as `allegro convert` packs it, through the loader."""
    convert = h.module("allegro_model.loading.convert").convert_checkpoint
    path = h.base / "models" / "diffusion_models" / PACKED[kind]
    if not path.exists():
        convert(h.base / "models" / "allegro" / "tiny-random" / "transformer", path, kind)
    return model(h, path.name)


def by_the_package(h: Host, kind: str, *loras: tuple[Path, float]) -> Tensor:
    """What `sample` gives, by the package's own loader and sampling."""
    loading, sampling = h.module("allegro_model.loading"), h.module("allegro_model.sampling")
    file, beside = h.base / "models" / "diffusion_models" / PACKED[kind], h.base / "models" / "allegro" / "tiny-random"
    config = loading.load_dit(beside).config
    dit = loading.load_dit(file, config=config, loras=loras)
    as_prompt = [sampling.Prompt(c[0][0].float(), c[0][1]["attention_mask"].bool()) for c in prompts(h)]
    source, sigmas = sampling.NoiseSource([3], (4, 6, 8, 12)), sampling.reference_sigmas(4)
    denoiser = sampling.Denoiser(dit, *as_prompt, 3.0, batched=True)
    x = sampling.SAMPLERS["euler_ancestral"](denoiser, source.draw() * sigmas[0], sigmas, source.draw)
    return x / h.module("allegro_model.config").VAE_720P.scale_factor


def check_packed_transformers_equal_the_package(h: Host) -> None:
    """int8 and GGUF: the latents of the package, in the memory of the file; LoRAs on top, one on the other."""
    lora, style = h.base / "models" / "loras" / "style.safetensors", 0.05
    for kind in PACKED:
        dit = packed_dit(h, kind)
        plain = sample(h, dit)
        assert relative(plain, by_the_package(h, kind)) < 1e-4, kind
        assert relative(plain, sample(h)) > 1e-5, f"{kind}: it is not packed"
        file = h.base / "models" / "diffusion_models" / PACKED[kind]
        assert abs(dit.model_size() - file.stat().st_size) < 0.02 * file.stat().st_size, (dit.model_size(), kind)
        assert dit.model.get_dtype() == torch.float32
        first = with_lora(h, lora.name, style, dit)
        both = with_lora(h, lora.name, style, first)
        alone = sample(h, first)
        assert relative(alone, plain) > 1e-4
        assert relative(alone, by_the_package(h, kind, (lora, style))) < 1e-4, kind
        assert relative(sample(h, both), by_the_package(h, kind, (lora, style), (lora, style))) < 1e-4, kind
        assert torch.equal(sample(h, first), alone)
        assert torch.equal(sample(h, dit), plain), f"{kind}: the LoRA is still there"
        assert not dit.object_patches


def check_packed_transformers_say_what_does_not_fit_them(h: Host) -> None:
    dit = packed_dit(h, "int8")
    raises("UnsupportedCheckpoint", "is packed as int8", lambda: model(h, PACKED["int8"], "bf16"))
    save_file(lora_tensors(lambda layer: f"diffusion_model.{layer}", "lora_A", "lora_B"),
              str(h.base / "models" / "loras" / "plain_names.safetensors"))
    theirs = h.core.NODE_CLASS_MAPPINGS["LoraLoaderModelOnly"]
    raises("UnsupportedCheckpoint", "Use Load Allegro LoRA",
           lambda: call(theirs, model=dit, lora_name="plain_names.safetensors", strength_model=0.7))
    create, attach = (h.extra("nodes_hooks", name) for name in ("CreateHookLoraModelOnly", "ConditioningSetProperties"))
    hooks = call(create, lora_name="plain_names.safetensors", strength_model=0.7)
    hooked = call(attach, cond_NEW=prompts(h)[0], strength=1.0, set_cond_area="default", hooks=hooks)
    assert relative(sample(h, positive=hooked), sample(h)) > 1e-4, "the hook does nothing"
    raises("UnsupportedCheckpoint", "Use Load Allegro LoRA", lambda: sample(h, dit, positive=hooked))


def check_packed_transformers_fit_a_small_device(h: Host) -> None:
    """What ComfyUI has no room for stays where it is, and is fetched as it is used."""
    dit = packed_dit(h, "int8")
    layer = dit.model.diffusion_model.transformer_blocks[0].attn1.to_q
    x = torch.randn((1, 3, layer.in_features), device="meta")  # another device, which every machine has
    assert layer(x).device.type == "meta"
    assert layer.weight.device.type == "cpu"


def check_gguf_files_are_listed(h: Host) -> None:
    packed_dit(h, "gguf-q8_0")
    paths = h.module("nodes.bridge.paths")
    folder = h.base / "models" / "diffusion_models" / "below"
    folder.mkdir()
    (folder / "more.gguf").touch()
    try:
        assert {PACKED["gguf-q8_0"], "below/more.gguf"} <= set(paths.choices("transformer"))
        raises("UnsupportedCheckpoint", "more.gguf is empty", lambda: model(h, "below/more.gguf"))
    finally:
        shutil.rmtree(folder)
    assert ".gguf" not in h.folder_paths.folder_names_and_paths["diffusion_models"][1]
    assert not any(name.endswith(".gguf") for name in paths.choices("vae"))
    for name in ("below/more.gguf", f"../diffusion_models/{PACKED['gguf-q8_0']}",
                 str(h.base / "models" / "diffusion_models" / PACKED["gguf-q8_0"])):
        raises("CheckpointError", "is not among the models that ComfyUI lists", lambda name=name: model(h, name))


def check_packed_text_encoders_equal_the_package(h: Host) -> None:
    convert, text = h.module("allegro_model.loading.convert").convert_checkpoint, h.module("allegro_model.text")
    root, small = (h.base / "models" / "allegro" / name for name in ("tiny-random", "packed"))
    for kind in PACKED:
        shutil.copytree(root, small, ignore=shutil.ignore_patterns("model.safetensors"))
        try:
            file = small / "text_encoder" / f"model{Path(PACKED[kind]).suffix}"
            convert(root / "text_encoder", file, kind)
            clip = h.run("LoadAllegroT5", clip_name="packed/text_encoder", device="default")
            found = h.run("AllegroT5Encode", clip=clip, text="a red circle", role="positive", clean_caption=True,
                          prompt_weighting=False)[0]
            encoder = h.module("allegro_model.loading").load_text_encoder(small, dtype=torch.float32, max_length=96)
            embeds, mask = encoder.encode([text.format_prompt("a red circle", template=False)])
            assert relative(found[0][mask].float(), embeds[mask].float()) < 1e-4, kind
            reference = conditioning(h, "a red circle")[0]
            assert relative(found[0][mask].float(), reference[0][mask].float()) > 1e-5, f"{kind}: it is not packed"
            layers = [m for m in clip.cond_stage_model.modules() if type(m).__name__ == "QuantisedLinear"]
            saved = sum(4 * m.rows * m.columns - sum(p.nbytes for p in m.parameters()) for m in layers)
            assert saved > 0
            assert clip.patcher.model_size() == parts(h)[1].patcher.model_size() - saved, kind
        finally:
            shutil.rmtree(small)
