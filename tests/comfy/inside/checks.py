"""Checks that need ComfyUI's Python objects. Run by bootstrap.py in one process; reported by test_inside.py."""

import copy
import gc
import inspect
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path, PureWindowsPath
from types import SimpleNamespace
from typing import Any

import comfy.k_diffusion.sampling
import comfy.model_management
import comfy.patcher_extension
import comfy.sample
import comfy.samplers
import comfy.sd
import comfy.utils
import packed
import psutil
import torch
from bootstrap import PACK, Host, Skipped, call, load_pack, only_new_objects
from safetensors.torch import load_file, save_file
from torch import Tensor

SIZE = {"width": 96, "height": 64, "length": 24}
TILES = {"tile_size": 0, "overlap": 0, "temporal_size": 0, "temporal_overlap": 0}


def model(h: Host, name: str = "tiny-random/transformer", dtype: str = "default") -> Any:
    return h.run("LoadAllegroDiT", model_name=name, weight_dtype=dtype)


@lru_cache(maxsize=1)
def parts(h: Host) -> tuple[Any, Any, Any]:
    """MODEL, CLIP, VAE with random weights, loaded once."""
    clip = h.run("LoadAllegroT5", clip_name="tiny-random/text_encoder", device="default")
    return model(h), clip, h.run("LoadAllegroVAE", vae_name="tiny-random/vae", dtype="default")


@lru_cache(maxsize=4)
def conditioning(h: Host, text: str, role: str = "positive") -> Any:
    return h.run("AllegroT5Encode", clip=parts(h)[1], text=text, role=role, clean_caption=True, prompt_weighting=False)


def prompts(h: Host) -> tuple[Any, Any]:
    return conditioning(h, "a red circle moves right over a blue background"), conditioning(h, "", "negative")


def empty(h: Host, batch_size: int = 1) -> Any:
    return h.run("EmptyAllegroLatentVideo", **SIZE, batch_size=batch_size)


def sample(h: Host, dit: Any = None, latent: Any = None, **changes: Any) -> Tensor:
    positive, negative = prompts(h)
    settings = {"seed": 3, "steps": 4, "cfg": 3.0, "denoise": 1.0, "noise_source": "reference",
                "positive": positive, "negative": negative, **changes}
    latent = empty(h) if latent is None else latent
    return h.run("AllegroSampler", model=dit or parts(h)[0], latent_image=latent, **settings)["samples"]


def relative(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape, f"{a.shape} and {b.shape}"
    return float((a - b).abs().max() / b.abs().max())


def raises(kind: str, words: str, function: Callable[[], Any]) -> None:
    caught: Exception | None = None
    try:
        function()
    except Exception as error:  # noqa: BLE001 (the classes live in the loaded pack; compared by name)
        caught = error
    assert type(caught).__name__ == kind, f"{type(caught).__name__}: {caught}"
    assert words in str(caught), str(caught)


# Definitions


def check_every_input_and_output_is_described(h: Host) -> None:
    """Tooltips, descriptions, help pages and both languages: all of them, for everything."""
    english, chinese = (json.loads((PACK / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))
                        for language in ("en", "zh"))
    assert list(english) == list(chinese) == list(h.nodes)
    for node_id, node in h.nodes.items():
        definition = node.define_schema()
        page = (PACK / "web" / "docs" / f"{node_id}.md").read_text(encoding="utf-8")
        assert english[node_id]["display_name"] == definition.display_name
        assert english[node_id]["description"] == definition.description
        assert chinese[node_id]["display_name"]
        assert chinese[node_id]["description"]
        for entry in definition.inputs:
            assert entry.tooltip, f"{node_id}.{entry.id}"
            assert english[node_id]["inputs"][entry.id]["tooltip"] == entry.tooltip, f"{node_id}.{entry.id}"
            assert chinese[node_id]["inputs"][entry.id]["tooltip"], f"{node_id}.{entry.id}"
            assert chinese[node_id]["inputs"][entry.id]["name"], f"{node_id}.{entry.id}"
            assert f"`{entry.id}`" in page, f"the help page of {node_id} does not explain {entry.id}"
        for language in (english, chinese):
            assert len(language[node_id]["inputs"]) == len(definition.inputs)
        for i, entry in enumerate(definition.outputs):
            assert entry.tooltip
            assert english[node_id]["outputs"][str(i)]["tooltip"] == entry.tooltip
            assert chinese[node_id]["outputs"][str(i)]["tooltip"]
            assert entry.display_name in page


def check_import_is_fast_and_frugal(h: Host) -> None:
    assert h.import_seconds < 1.0
    assert not {"diffusers", "imageio_ffmpeg", "ftfy", "bs4", "flash_attn"} & {
        name for name in sys.modules if getattr(sys.modules[name], "__name__", "") == name}


def check_an_ordinary_run_warns_of_nothing(h: Host) -> None:
    """From the import over the loaders to the frames, with the bundled model at its own size; no exceptions to the rule."""
    bundled = "allegro-tiny (bundled)"
    clip = h.run("LoadAllegroT5", clip_name=bundled, device="default")
    positive, negative = (h.run("AllegroT5Encode", clip=clip, text=text, role=role, clean_caption=True, prompt_weighting=False)
                          for text, role in (("a red circle moving left on a blue background", "positive"), ("", "negative")))
    samples = sample(h, model(h, bundled), positive=positive, negative=negative, steps=2)
    vae = h.run("LoadAllegroVAE", vae_name=bundled, dtype="default")
    images = h.run("AllegroVideoVAEDecode", samples={"samples": samples}, vae=vae, **TILES)
    h.run("AllegroVideoVAEEncode", pixels=images, vae=vae, **TILES)
    assert h.import_warnings + h.own_warnings == []
    sample(h, model(h, bundled), positive=positive, negative=negative, steps=1, latent={"samples": torch.zeros((1, 4, 2, 4, 4))})
    assert any("draws less well" in line for line in h.own_warnings), "warnings are not seen"


def check_a_broken_feature_leaves_the_others(h: Host) -> None:
    package = h.module("nodes")
    package.FEATURES["no_such_module"] = ("Missing",)
    try:
        assert len(package.load_nodes()) == len(h.nodes)
    finally:
        del package.FEATURES["no_such_module"]
    assert any("Missing are missing" in line for line in h.log), h.log


# The same as outside ComfyUI


def check_a_second_copy_is_warned_about(h: Host) -> None:
    package = h.module("nodes")
    package.warn_about_second_copy()
    assert h.own_warnings == []
    sys.modules["custom_nodes.older.allegro_model"] = package
    try:
        package.warn_about_second_copy()
    finally:
        del sys.modules["custom_nodes.older.allegro_model"]
    (line,) = h.own_warnings
    assert "the other copy is custom_nodes.older. Remove one of them." in line


def check_sampler_equals_the_package(h: Host) -> None:
    """AllegroSampler against the same weights and prompts in allegro_model's own sampling, 20 steps."""
    positive, negative = prompts(h)
    result = sample(h, steps=20, seed=5, cfg=7.5)
    loading, sampling = h.module("allegro_model.loading"), h.module("allegro_model.sampling")
    dit = loading.load_dit(h.base / "models" / "allegro" / "tiny-random", dtype=torch.float32)
    as_prompt = [sampling.Prompt(c[0][0].float(), c[0][1]["attention_mask"].bool()) for c in (positive, negative)]
    source = sampling.NoiseSource([5], (4, 6, 8, 12))
    sigmas = sampling.reference_sigmas(20)
    denoiser = sampling.Denoiser(dit, *as_prompt, 7.5, batched=True)
    x = sampling.SAMPLERS["euler_ancestral"](denoiser, source.draw() * sigmas[0], sigmas, source.draw)
    scaled = x / h.module("allegro_model.config").VAE_720P.scale_factor
    assert relative(result, scaled) < 2e-6, relative(result, scaled)


def check_text_encoder_equals_the_package(h: Host) -> None:
    text = h.module("allegro_model.text")
    encoder = h.module("allegro_model.loading").load_text_encoder(
        h.base / "models" / "allegro" / "tiny-random", dtype=torch.float32, max_length=96)
    for prompt in ("a red circle moves right", "", "many words " * 100):
        found = h.run("AllegroT5Encode", clip=parts(h)[1], text=prompt, role="positive", clean_caption=True,
                      prompt_weighting=False)[0]
        embeds, mask = encoder.encode([text.format_prompt(prompt, template=False)])
        assert torch.equal(found[1]["attention_mask"].bool(), mask), prompt
        assert found[0].shape == embeds.shape == (1, 96, 64)
        assert relative(found[0][mask].float(), embeds[mask].float()) < 1e-4


def check_text_encoders_of_other_precision(h: Host) -> None:
    """Files people have for other models: half precision and scaled fp8."""
    reference = conditioning(h, "a red circle")[0]
    mask = reference[1]["attention_mask"].bool()
    for name, tolerance in (("half", 0.01), ("eight-bit", 0.2)):
        clip = h.run("LoadAllegroT5", clip_name=f"{name}/text_encoder", device="cpu")
        found = h.run("AllegroT5Encode", clip=clip, text="a red circle", role="positive", clean_caption=True,
                      prompt_weighting=False)[0]
        error = relative(found[0][mask].float(), reference[0][mask].float())
        assert 1e-5 < error < tolerance, (name, error)


def check_single_file_encoder_with_the_published_tokenizer(h: Host) -> None:
    """What everybody has: one file, 32,128 tokens, ComfyUI's tokenizer, 512 tokens, the end token kept when cut."""
    clip = h.run("LoadAllegroT5", clip_name="published_vocabulary.safetensors", device="default")
    known = {"": [1], "a cat": [3, 9, 1712, 1]}
    for text, ids in known.items():
        tokens = [t for t, _ in clip.tokenize(text)["t5xxl"][0]]
        assert tokens == ids + [0] * (512 - len(ids)), tokens[:8]
    long = [t for t, _ in clip.tokenize("word " * 700)["t5xxl"][0]]
    assert (len(long), long[-1], long[-2] > 1) == (512, 1, True)
    found = h.run("AllegroT5Encode", clip=clip, text="A cat", role="positive", clean_caption=True, prompt_weighting=False)[0]
    assert found[0].shape == (1, 512, 64)
    assert int(found[1]["attention_mask"].sum()) > 40, "the template of the released models"
    plain = h.run("AllegroT5Encode", clip=clip, text="A (cat:1.3)", role="raw", clean_caption=True, prompt_weighting=False)[0]
    weighted = h.run("AllegroT5Encode", clip=clip, text="A (cat:1.3)", role="raw", clean_caption=True, prompt_weighting=True)[0]
    assert int(weighted[1]["attention_mask"].sum()) < int(plain[1]["attention_mask"].sum())


def check_vae_equals_the_package(h: Host) -> None:
    loading = h.module("allegro_model.loading")
    vae = loading.load_vae(h.base / "models" / "allegro" / "tiny-random")
    latents = torch.randn((1, 4, 6, 8, 14), generator=torch.Generator().manual_seed(1))
    expected = (vae.decode(latents) / 2 + 0.5).clamp(0, 1)
    images = h.run("AllegroVideoVAEDecode", samples={"samples": latents}, vae=parts(h)[2], **TILES)
    assert images.shape == (24, 64, 112, 3)
    assert relative(images, expected[0].movedim(0, -1)) < 1e-6
    mean, _ = vae.encode(images.movedim(-1, 0)[None] * 2 - 1)
    encoded = h.run("AllegroVideoVAEEncode", pixels=images, vae=parts(h)[2], **TILES)["samples"]
    assert relative(encoded, mean) < 1e-6


def check_scale_factor_is_the_models_own(h: Host) -> None:
    of = h.module("nodes.bridge.model").vae_config_of
    scale = lambda path: of(path).scale_factor  # noqa: E731
    assert scale(str(h.base / "models" / "allegro" / "tiny-random" / "transformer")) == 0.13235
    root = h.base / "other"
    for part in ("transformer", "vae"):
        (root / part).mkdir(parents=True)
    (root / "vae" / "config.json").write_text('{"scale_factor": 0.5}')
    assert scale(str(root / "transformer")) == 0.5
    assert scale(str(h.base / "models" / "diffusion_models" / "dit.safetensors")) == 0.13235
    assert parts(h)[0].model.latent_format.scale_factor == 0.13235


# Sampling


def check_second_run_is_identical(h: Host) -> None:
    assert torch.equal(sample(h), sample(h))
    assert not torch.equal(sample(h), sample(h, seed=4))


def check_items_of_a_batch_do_not_know_each_other(h: Host) -> None:
    both = sample(h, latent=empty(h, batch_size=2), seed=10)
    for item in (0, 1):
        assert relative(both[item : item + 1], sample(h, seed=10 + item)) < 1e-5
    chosen = call(h.core.NODE_CLASS_MAPPINGS["LatentFromBatch"], samples=empty(h, batch_size=3), batch_index=1, length=1)
    assert torch.equal(sample(h, latent=chosen, seed=9), sample(h, seed=10))


def check_inputs_are_never_changed(h: Host) -> None:
    """Every tensor and dictionary that goes into a node is the same afterwards, to the bit."""
    dit, clip, vae = parts(h)
    positive, negative = prompts(h)
    generator = torch.Generator().manual_seed(0)
    latent = {"samples": torch.randn((1, 4, 6, 8, 12), generator=generator),
              "noise_mask": torch.ones((1, 1, 6, 8, 12)), "batch_index": [0]}
    images = torch.rand((6, 50, 60, 3), generator=generator)
    weights = {name: p.clone() for name, p in dit.model.diffusion_model.state_dict().items()}
    inputs = {"positive": positive, "negative": negative, "latent": latent, "images": images,
              "options": dit.model_options, "patches": dit.patches}
    before = copy.deepcopy(inputs)
    sample(h, dit, latent, denoise=0.5)
    sample(h, dit, latent, noise_source="comfy")
    decoded = h.run("AllegroVideoVAEDecode", samples=latent, vae=vae, **TILES)
    h.run("AllegroVideoVAEEncode", pixels=images, vae=vae, **TILES)
    h.run("AllegroT5Encode", clip=clip, text="A Cat", role="raw", clean_caption=True, prompt_weighting=True)
    assert decoded.shape == (24, 64, 96, 3)
    assert same(inputs, before)
    assert same(dit.model.diffusion_model.state_dict(), weights)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return callable(a) or a == b


def check_denoise_keeps_part_of_the_latent(h: Host) -> None:
    latent = {"samples": sample(h)}
    little, much = (relative(sample(h, latent=latent, denoise=d, seed=8, cfg=1.0), latent["samples"]) for d in (0.05, 0.9))
    assert little < much / 2, (little, much)


def check_noise_mask_is_honoured(h: Host) -> None:
    latent = {"samples": torch.ones((1, 4, 6, 8, 12))}
    mask = torch.zeros((1, 1, 6, 8, 12))
    mask[..., 6:] = 1
    result = sample(h, latent={**latent, "noise_mask": mask}, denoise=0.9)
    assert relative(result[..., :6], latent["samples"][..., :6]) < 1e-4
    assert relative(result[..., 6:], latent["samples"][..., 6:]) > 0.1


def check_empty_latents_of_other_packs_are_repaired(h: Host) -> None:
    image = call(h.core.NODE_CLASS_MAPPINGS["EmptyLatentImage"], width=96, height=64, batch_size=1)
    assert sample(h, latent=image).shape == (1, 4, 1, 8, 12)
    hunyuan = {"samples": torch.zeros((1, 16, 6, 8, 12))}
    assert sample(h, latent=hunyuan).shape == (1, 4, 6, 8, 12)
    raises("GeometryError", "expected [batch, 4,", lambda: sample(h, latent={"samples": torch.ones((1, 16, 6, 8, 12))}))


def check_odd_latents_are_padded_and_cropped(h: Host) -> None:
    assert sample(h, latent={"samples": torch.zeros((1, 4, 3, 7, 11))}).shape == (1, 4, 3, 7, 11)


def check_other_clips_work_without_a_mask(h: Host) -> None:
    """GGUF and other loaders: any object that tokenizes and encodes to [[embeds, {}]]; no mask attends to all."""

    class OtherClip:
        tokenizer = object()

        def tokenize(self, text: str, **kwargs: Any) -> str:
            assert kwargs == {"disable_weights": True}
            return text

        def encode_from_tokens_scheduled(self, tokens: str) -> Any:
            assert tokens.startswith("( masterpiece ) ") or "masterpiece" in tokens
            return [[torch.ones((1, 20, 64)), {"pooled_output": None}]]

    encoded = h.run("AllegroT5Encode", clip=OtherClip(), text="a cat", role="positive", clean_caption=True,
                    prompt_weighting=False)
    plain = sample(h, positive=encoded, negative=encoded)
    masked = [[encoded[0][0], {"pooled_output": None, "attention_mask": torch.ones((1, 20), dtype=torch.long)}]]
    assert relative(plain, sample(h, positive=masked, negative=masked)) < 1e-5


def check_encoder_with_packed_weights(h: Host) -> None:
    """As GGUF loaders make it: T5 Encode works with its CLIP, and its mask reaches the transformer."""
    weights, sizes = packable_encoder(h)
    with packed.small_t5(sizes):
        clip = packed.load_packed_clip(weights)
    assert_encodes_like_ours(h, clip)


def check_encoder_of_the_gguf_pack(h: Host) -> None:
    """The same with a real GGUF file and the pack that reads it."""
    if "COMFYUI_GGUF_PATH" not in os.environ:
        raise Skipped("set COMFYUI_GGUF_PATH to a checkout of ComfyUI-GGUF whose requirements ComfyUI's interpreter has")
    weights, sizes = packable_encoder(h)
    packed.write_gguf(weights, h.base / "models" / "text_encoders" / "t5.gguf")
    loader = load_pack("custom_nodes_gguf", Path(os.environ["COMFYUI_GGUF_PATH"])).NODE_CLASS_MAPPINGS["CLIPLoaderGGUF"]
    with packed.small_t5(sizes):
        clip = call(loader, clip_name="t5.gguf", type="mochi")
    assert type(clip.patcher).__name__ == "GGUFModelPatcher"
    assert_encodes_like_ours(h, clip)


def packable_encoder(h: Host) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A T5 that ComfyUI's tokenizer fits and that loses nothing in 8 bits: weights, and sizes under ComfyUI's names.

    Written for our loader as packable.safetensors.
    """
    folder = h.base / "models" / "text_encoders"
    weights = packed.without_loss(load_file(folder / "published_vocabulary.safetensors"))
    save_file(weights, folder / "packable.safetensors")
    config = h.module("allegro_model.loading").t5_config_from_shapes({name: tuple(w.shape) for name, w in weights.items()})
    return weights, h.module("nodes.bridge.text")._comfy_config(config)


def assert_encodes_like_ours(h: Host, clip: Any) -> None:
    """A CLIP with the weights of `packable_encoder`, against our loader's."""
    text = {"text": "A red circle moves right", "role": "positive", "clean_caption": True, "prompt_weighting": False}
    ours = h.run("LoadAllegroT5", clip_name="packable.safetensors", device="default")
    (expected, mask), (found, their_mask) = (
        (entry[0], entry[1]["attention_mask"].bool())
        for entry in (h.run("AllegroT5Encode", clip=c, **text)[0] for c in (ours, clip)))
    words = int(mask.sum())
    assert words == int(their_mask.sum()) > 40, "the template of the released models"
    assert found.shape == (1, 256, 64), "padded by ComfyUI's type mochi"
    error = relative(found[:, :words].float(), expected[:, :words].float())
    assert error < 1e-2, error  # ComfyUI keeps the norms, and the pack unpacks, in half precision
    encoded = h.run("AllegroT5Encode", clip=clip, **text)
    trimmed = [[found[:, :words], {"pooled_output": None}]]
    assert relative(sample(h, positive=encoded), sample(h, positive=trimmed)) < 1e-5, "padding was attended to"


def check_prompts_of_different_lengths_work(h: Host) -> None:
    """Conditioning that ComfyUI cannot put into one batch, as from CLIPs that do not pad."""
    short = [[torch.ones((1, 7, 64)), {"attention_mask": torch.ones((1, 7), dtype=torch.long)}]]
    assert torch.isfinite(sample(h, positive=short)).all()


def check_embeddings_of_another_encoder_are_refused(h: Host) -> None:
    wide = [[torch.zeros((1, 8, 4096)), {}]]
    raises("TextError", "4096 wide, this model reads 64", lambda: sample(h, positive=wide))
    sampler = h.core.NODE_CLASS_MAPPINGS["KSampler"]
    raises("TextError", "4096 wide", lambda: call(
        sampler, model=parts(h)[0], seed=1, steps=2, cfg=3.0, sampler_name="euler", scheduler="normal", positive=wide,
        negative=wide, latent_image=empty(h), denoise=1.0))


def check_nan_is_reported_after_the_first_step(h: Host) -> None:
    steps = []
    dit = parts(h)[0].clone()
    dit.set_model_unet_function_wrapper(lambda apply, args: steps.append(1) or apply(
        args["input"], args["timestep"], **args["c"]) * float("nan"))
    raises("NonFiniteError", "The first step gave NaN or Inf. The weights are float32", lambda: sample(h, dit))
    assert len(steps) <= 2
    raises("NonFiniteError", "Decoding gave NaN or Inf", lambda: h.run(
        "AllegroVideoVAEDecode", samples={"samples": torch.full((1, 4, 6, 8, 12), float("nan"))}, vae=parts(h)[2], **TILES))


def check_a_second_run_is_foretold_from_the_first(h: Host) -> None:
    sampling = h.module("nodes.bridge.sampling")
    sampling._speeds.clear()
    told: list[str] = []
    handler = logging.Handler(logging.INFO)
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    worth, level = sampling._WORTH_SAYING, sampling.logger.level
    sampling.logger.addHandler(handler)
    sampling.logger.setLevel(logging.INFO)
    sampling._WORTH_SAYING = 0
    try:
        counts = []
        for _ in range(2):
            sample(h, parts(h)[0])
            counts.append(sum("by the last run of this model" in line for line in told))
    finally:
        sampling._WORTH_SAYING = worth
        sampling.logger.setLevel(level)
        sampling.logger.removeHandler(handler)
    assert counts == [0, 1], told
    (seconds,) = sampling._speeds.values()
    assert 0 < seconds < 1e-6
    for number in range(100):
        sampling._remember((number % 50,), float(number))
    assert list(sampling._speeds.values()) == [float(number) for number in range(68, 100)]
    sampling._speeds.clear()


def check_impossible_sizes_are_refused_before_allocation(h: Host) -> None:
    huge = torch.zeros(1).expand(1, 4, 1024, 1024, 1024)
    sampling = h.module("nodes.bridge.sampling")
    settings = sampling.RunSettings(1, 4, 3.0, 1.0, "reference")
    shape = h.module("allegro_model.geometry").LatentShape(*huge.shape[2:])
    raises("NotEnoughMemory", "Allegro sampling needs about", lambda: sampling._announce(
        parts(h)[0], parts(h)[0].model.diffusion_model.config, shape, 1, settings))


# ComfyUI's own nodes


def ksampler(h: Host, dit: Any, **changes: Any) -> Tensor:
    positive, negative = prompts(h)
    inputs = {"model": dit, "seed": 3, "steps": 6, "cfg": 3.0, "sampler_name": "euler_ancestral", "scheduler": "normal",
              "positive": positive, "negative": negative, "latent_image": empty(h), "denoise": 1.0, **changes}
    return call(h.core.NODE_CLASS_MAPPINGS["KSampler"], **inputs)["samples"]


def advanced(h: Host, dit: Any, sigmas: Tensor, cfg: float = 3.0) -> Tensor:
    nodes = {name: h.extra("nodes_custom_sampler", name)
             for name in ("CFGGuider", "RandomNoise", "KSamplerSelect", "SamplerCustomAdvanced")}
    positive, negative = prompts(h)
    guider = call(nodes["CFGGuider"], model=dit, positive=positive, negative=negative, cfg=cfg)
    return call(nodes["SamplerCustomAdvanced"], noise=call(nodes["RandomNoise"], noise_seed=3), guider=guider,
                sampler=call(nodes["KSamplerSelect"], sampler_name="euler_ancestral"), sigmas=sigmas,
                latent_image=empty(h))["samples"]


def check_core_samplers_agree_with_each_other_and_with_ours(h: Host) -> None:
    dit = parts(h)[0]
    sigmas = h.run("AllegroScheduler", steps=6, denoise=1.0)
    custom, plain = advanced(h, dit, sigmas), ksampler(h, dit)
    assert relative(plain, custom) < 2e-3, relative(plain, custom)
    ours = sample(h, dit, steps=6, noise_source="comfy")
    assert relative(custom, ours) < 1e-6, relative(custom, ours)


def check_core_sampler_with_our_noise_equals_ours(h: Host) -> None:
    """ComfyUI's euler_ancestral, fed from the reference's generator: only rounding is left."""
    dit, (positive, negative) = parts(h)[0], prompts(h)
    source = h.module("allegro_model.sampling").NoiseSource([3], (4, 6, 8, 12))
    noise = source.draw()
    sampler = comfy.samplers.ksampler("euler_ancestral", {"noise_sampler": lambda sigma, following: source.draw()})
    sigmas = h.run("AllegroScheduler", steps=20, denoise=1.0)
    theirs = comfy.sample.sample_custom(dit, noise, 3.0, sampler, sigmas, positive, negative, empty(h)["samples"], seed=3)
    assert relative(theirs, sample(h, dit, steps=20)) < 2e-6


def check_core_samplers_equal_diffusers(h: Host) -> None:
    """ComfyUI's euler_ancestral with guidance round our network against diffusers' scheduler round diffusers' network:
    the noises are those that ComfyUI drew. What is left is rounding, about 2e-6."""
    sigmas = h.run("AllegroScheduler", steps=20, denoise=1.0)
    runs: dict[str, Callable[[], Tensor]] = {
        "KSampler, scheduler normal": lambda: ksampler(h, parts(h)[0], steps=20, cfg=7.5),
        "SamplerCustomAdvanced, Allegro Scheduler": lambda: advanced(h, parts(h)[0], sigmas, cfg=7.5),
    }
    found, noises = [], []
    first = comfy.sample.prepare_noise(empty(h)["samples"], 3)
    for run in runs.values():
        result, drawn = with_recorded_noise(run)
        assert len(drawn) == 19, "one per step but the last"
        found.append(result * 0.13235)
        noises.append(torch.stack([first, *drawn]))
    expected = diffusers_run(h, torch.cat(noises, dim=1), cfg=7.5)
    for name, ours, theirs in zip(runs, found, expected.split(1), strict=True):
        assert relative(ours, theirs) < 1e-5, (name, relative(ours, theirs))


def with_recorded_noise(run: Callable[[], Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The result, and what ComfyUI's ancestral samplers drew meanwhile."""
    module, drawn = comfy.k_diffusion.sampling, []
    original = module.default_noise_sampler

    def recording(*args: Any, **kwargs: Any) -> Callable[[Any, Any], Tensor]:
        draw = original(*args, **kwargs)

        def noise(sigma: Any, following: Any) -> Tensor:
            drawn.append(draw(sigma, following))
            return drawn[-1]

        return noise

    module.default_noise_sampler = recording
    try:
        return run(), drawn
    finally:
        module.default_noise_sampler = original


def diffusers_run(h: Host, noise: Tensor, *, cfg: float) -> Tensor:
    """The latents [B, ...] of diffusers' loop with noise [steps, B, ...] in a process of the tests' Python; see diffusers_loop.py."""
    inputs = {"noise": noise, "cfg": torch.tensor(cfg)}
    for name, entry in zip(("positive", "negative"), prompts(h), strict=True):
        inputs |= {name: entry[0][0].float().contiguous(), f"{name}_mask": entry[0][1]["attention_mask"]}
    given, result = h.base / "given.safetensors", h.base / "result.safetensors"
    save_file(inputs, given)
    command = [os.environ["REFERENCE_PYTHON"], str(Path(__file__).parent / "diffusers_loop.py"),
               str(h.base / "models" / "allegro" / "tiny-random" / "transformer"), str(given), str(result)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    if "No module named 'diffusers'" in done.stderr:
        raise Skipped("the reference of this comparison is diffusers (test extra)")
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(result)["latents"]


def check_other_samplers_and_schedulers_run(h: Host) -> None:
    for name, scheduler in (("euler", "simple"), ("dpmpp_2m", "karras"), ("dpmpp_2m_sde", "sgm_uniform"), ("ddim", "ddim_uniform")):
        assert torch.isfinite(ksampler(h, parts(h)[0], sampler_name=name, scheduler=scheduler)).all(), name


def check_two_halves_of_the_advanced_sampler_equal_one_run(h: Host) -> None:
    """What lies between can be saved; euler draws no noise after the first."""
    positive, negative = prompts(h)
    node = h.core.NODE_CLASS_MAPPINGS["KSamplerAdvanced"]
    same = {"model": parts(h)[0], "noise_seed": 3, "steps": 6, "cfg": 3.0, "sampler_name": "euler", "scheduler": "normal",
            "positive": positive, "negative": negative}
    empty = {"samples": torch.zeros((1, 4, 6, 8, 12))}
    whole = call(node, **same, add_noise="enable", latent_image=empty, start_at_step=0, end_at_step=6,
                 return_with_leftover_noise="disable")
    half = call(node, **same, add_noise="enable", latent_image=empty, start_at_step=0, end_at_step=3,
                return_with_leftover_noise="enable")
    other = call(node, **same, add_noise="disable", latent_image=half, start_at_step=3, end_at_step=6,
                 return_with_leftover_noise="disable")
    found = [relative(x["samples"], whole["samples"]) for x in (half, other)]
    assert found[0] > 1e-3, "the second half has nothing to do"
    assert found[1] < 1e-5, found


def check_lora_loader_changes_the_result_of_its_copy_only(h: Host) -> None:
    dit = parts(h)[0]
    before = ksampler(h, dit)
    styled = call(h.core.NODE_CLASS_MAPPINGS["LoraLoaderModelOnly"], model=dit, lora_name="style.safetensors", strength_model=1.0)
    assert len(styled.patches) == 2
    assert relative(ksampler(h, styled), before) > 1e-3
    assert torch.equal(ksampler(h, dit), before)


def check_easy_cache_skips_steps(h: Host) -> None:
    dit = call(h.extra("nodes_easycache", "EasyCacheNode"), model=parts(h)[0], reuse_threshold=10.0, start_percent=0.0,
               end_percent=1.0, verbose=False)
    cached = ksampler(h, dit, steps=10)
    assert any(re.search(r"EasyCache - skipped [1-9]\d*/", line) for line in h.log), h.log
    assert torch.isfinite(cached).all()


def check_the_line_about_a_run_names_the_cache(h: Host) -> None:
    dit = parts(h)[0]
    range_ = {"reuse_threshold": 0.1, "start_percent": 0.0, "end_percent": 1.0, "verbose": False}
    for node, words in ((None, "no cache"), ("EasyCacheNode", "EasyCache"), ("LazyCacheNode", "LazyCache")):
        h.log.clear()
        sample(h, dit if node is None else call(h.extra("nodes_easycache", node), model=dit, **range_))
        (line,) = [line for line in h.log if "Allegro: 2 layers" in line]
        assert f", {words}, about" in line, line


def check_torch_compile_equals_eager(h: Host) -> None:
    """Backend eager of the compiler: the graph is captured as for any other backend, no C++ compiler is needed."""
    node = h.extra("nodes_torch_compile", "TorchCompileModel")
    dit = call(node, model=parts(h)[0], backend="eager")
    torch.compiler.reset()  # nothing that was compiled before serves here
    captured = torch._dynamo.utils.counters["stats"]
    before = captured["unique_graphs"]
    assert relative(ksampler(h, dit, steps=2), ksampler(h, parts(h)[0], steps=2)) < 1e-5
    assert captured["unique_graphs"] > before, "nothing was compiled"


def check_torch_compile_with_its_usual_backend(h: Host) -> None:
    """ComfyUI's node as in its menu: inductor, which builds kernels; on one block, since that takes time."""
    if not any(map(shutil.which, ("c++", "g++", "clang++", "cl"))):
        raise Skipped("the inductor backend needs a C++ compiler")
    folder = h.base / "models" / "diffusion_models"
    weights = load_file(folder / "dit.safetensors")
    save_file({k: w for k, w in weights.items() if "blocks." not in k or "blocks.0." in k}, folder / "one_block.safetensors")
    plain = model(h, "one_block.safetensors")
    compiled = call(h.extra("nodes_torch_compile", "TorchCompileModel"), model=plain, backend="inductor")
    assert compiled.model_options["torch_compile_kwargs"]["backend"] == "inductor"
    captured = torch._dynamo.utils.counters["stats"]
    before = captured["unique_graphs"]
    result = ksampler(h, compiled, steps=2)
    assert captured["unique_graphs"] > before, "nothing was compiled"
    assert relative(result, ksampler(h, plain, steps=2)) < 1e-5


def check_patches_of_other_nodes(h: Host) -> None:
    dit = parts(h)[0]
    plain = sample(h, dit)
    skipping = call(h.extra("nodes_slg", "SkipLayerGuidanceDiT"), model=dit, double_layers="1", single_layers="", scale=3.0,
                    start_percent=0.0, end_percent=1.0, rescaling_scale=0.0)
    assert relative(sample(h, skipping), plain) > 1e-3
    rescaled = call(h.extra("nodes_model_advanced", "RescaleCFG"), model=dit, multiplier=0.7)
    assert relative(sample(h, rescaled), plain) > 1e-3
    computed = call(h.extra("nodes_model_advanced", "ModelComputeDtype"), model=dit, dtype="bf16")
    assert 1e-5 < relative(sample(h, computed), plain) < 0.3


def check_hooks_of_other_packs(h: Host) -> None:
    """Wrapper round the network, patch after each block, replacement of attention: each is called and can act."""
    dit, seen = parts(h)[0].clone(), []

    def wrapper(executor: Any, x: Tensor, timestep: Tensor, context: Tensor, mask: Any, options: dict, **kwargs: Any) -> Tensor:
        seen.append("wrapper")
        return executor(x, timestep, context, mask, options, **kwargs)

    def after_block(args: dict[str, Any]) -> dict[str, Any]:
        seen.append(f"block {args['block_index']}")
        return args

    def attention(function: Any, *args: Any, **kwargs: Any) -> Tensor:
        options = kwargs["transformer_options"]
        seen.append(f"attention {options['block_type']} {options['block_index']} of {options['total_blocks']}")
        return function(*args, **kwargs)

    dit.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, "test", wrapper)
    dit.set_model_patch(after_block, "double_block")
    dit.model_options["transformer_options"]["optimized_attention_override"] = attention
    result = sample(h, dit, steps=1)
    assert {"wrapper", "block 0", "block 1", "attention double 0 of 2", "attention double 1 of 2"} <= set(seen), seen
    assert relative(result, sample(h, steps=1)) < 1e-6


def check_core_vae_nodes(h: Host) -> None:
    vae = parts(h)[2]
    latent = {"samples": torch.randn((2, 4, 4, 8, 12), generator=torch.Generator().manual_seed(2))}
    nodes = h.core.NODE_CLASS_MAPPINGS
    ours = h.run("AllegroVideoVAEDecode", samples=latent, vae=vae, **TILES)
    theirs = call(nodes["VAEDecode"], samples=latent, vae=vae)
    assert theirs.shape == (32, 64, 96, 3)
    assert torch.equal(theirs, ours)
    assert 0 <= float(theirs.min()) <= float(theirs.max()) <= 1
    tiled = call(nodes["VAEDecodeTiled"], samples=latent, vae=vae, tile_size=64, overlap=32, temporal_size=8, temporal_overlap=4)
    assert tiled.shape == theirs.shape
    assert not torch.equal(tiled, theirs)
    clip = theirs[:14]
    encoded = call(nodes["VAEEncode"], pixels=clip, vae=vae)["samples"]
    assert encoded.shape == (1, 4, 4, 8, 12)
    assert torch.equal(encoded, h.run("AllegroVideoVAEEncode", pixels=clip, vae=vae, **TILES)["samples"])
    again = call(nodes["VAEEncodeTiled"], pixels=clip, vae=vae, tile_size=64, overlap=32, temporal_size=16, temporal_overlap=8)
    assert again["samples"].shape == encoded.shape
    single = call(nodes["VAEEncode"], pixels=clip[:1, :60, :90], vae=vae)["samples"]
    assert single.shape == (1, 4, 1, 7, 11)


def check_core_tiles_reach_the_axes_they_are_meant_for(h: Host) -> None:
    """Unequal sizes along every axis, through ComfyUI's methods as they are declared and through its nodes."""
    vae, nodes, seen = parts(h)[2], h.core.NODE_CLASS_MAPPINGS, []
    latents, images = torch.zeros((1, 4, 6, 20, 30)), torch.zeros((24, 160, 240, 3))
    original = type(vae)

    class Watched(original):
        def decode_with(self, samples: Tensor, tiling: Any) -> Tensor:
            seen.append(tiling)
            return images

        def encode_with(self, pixels: Tensor, tiling: Any) -> Tensor:
            seen.append(tiling)
            return latents

    names = list(inspect.signature(comfy.sd.VAE.decode_tiled).parameters)[2:]
    assert names == list(inspect.signature(comfy.sd.VAE.encode_tiled).parameters)[2:]
    cells = {"tile_x": 10, "tile_y": 6, "overlap": 2, "tile_t": 4, "overlap_t": 1}
    pixels = {"tile_x": 80, "tile_y": 48, "overlap": 16, "tile_t": 16, "overlap_t": 4}
    vae.__class__ = Watched
    try:
        vae.decode_tiled(latents, **cells)
        vae.encode_tiled(images, **pixels)
        vae.decode_tiled(latents, *(cells[name] for name in names))
        vae.encode_tiled(images, *(pixels[name] for name in names))
        sizes = {"tile_size": 128, "overlap": 32, "temporal_size": 12, "temporal_overlap": 4}
        call(nodes["VAEDecodeTiled"], samples={"samples": latents}, vae=vae, **sizes)
        call(nodes["VAEEncodeTiled"], pixels=images, vae=vae, **sizes)
    finally:
        vae.__class__ = original
    axes = [(t.tile_frames, t.tile_height, t.tile_width, t.overlap_frames, t.overlap_height, t.overlap_width) for t in seen]
    assert axes == [(16, 48, 80, 4, 16, 16)] * 4 + [(12, 128, 128, 4, 32, 32)] * 2, axes


def check_tile_settings_change_only_the_tiles(h: Host) -> None:
    vae = parts(h)[2]
    latent = {"samples": torch.randn((1, 4, 4, 16, 16), generator=torch.Generator().manual_seed(3))}
    whole = h.run("AllegroVideoVAEDecode", samples=latent, vae=vae, tile_size=128, overlap=32, temporal_size=16, temporal_overlap=8)
    small = h.run("AllegroVideoVAEDecode", samples=latent, vae=vae, tile_size=64, overlap=32, temporal_size=8, temporal_overlap=4)
    assert small.shape == whole.shape == (16, 128, 128, 3)
    assert torch.isfinite(small).all()
    assert relative(small, whole) > 1e-4, "the settings were not used"
    tiling = vae.tiling(24, 0, 0, 0)
    assert (tiling.tile_height, tiling.overlap_height, tiling.tile_frames) == (24, 8, 16)


def check_video_nodes(h: Host) -> None:
    images = h.run("AllegroVideoVAEDecode", samples={"samples": sample(h)}, vae=parts(h)[2], **TILES)
    video = call(h.extra("nodes_video", "CreateVideo"), images=images, fps=15.0)
    assert video.get_dimensions() == (96, 64)


# Precision and memory


def check_fp8_file_and_fp8_cast(h: Host) -> None:
    reference = sample(h)
    for name, dtype in (("dit_scaled.safetensors", "default"), ("dit_fp8.safetensors", "default"), ("dit_fp8.safetensors", "fp8_e4m3fn"),
                        ("tiny-random/transformer", "fp8_e4m3fn"), ("tiny-random/transformer", "fp8_e4m3fn_fast"),
                        ("tiny-random/transformer", "fp8_e5m2")):
        dit = model(h, name, dtype)
        network = dit.model.diffusion_model
        if dtype != "default":
            expected = torch.float8_e5m2 if dtype == "fp8_e5m2" else torch.float8_e4m3fn
            assert network.transformer_blocks[0].attn1.to_q.weight.dtype == expected
            assert network.pos_embed.proj.weight.dtype == torch.bfloat16
            assert network.transformer_blocks[0].scale_shift_table.dtype == torch.bfloat16
        error = relative(sample(h, dit), reference)
        assert 1e-5 < error < (0.2 if dtype == "fp8_e5m2" else 0.1), (name, dtype, error)


def check_bf16(h: Host) -> None:
    dit = model(h, dtype="bf16")
    assert dit.model.get_dtype() == torch.bfloat16
    assert 1e-6 < relative(sample(h, dit), sample(h)) < 0.05


def check_partial_loading_gives_the_same(h: Host) -> None:
    """ComfyUI's streaming of weights, driven directly because its CPU mode never needs it."""
    x = torch.randn((1, 4, 6, 8, 12), generator=torch.Generator().manual_seed(1))
    context = torch.randn((1, 20, 64), generator=torch.Generator().manual_seed(2))
    for dtype in ("default", "fp8_e4m3fn"):
        results = []
        for budget in (0, 1, 1_000_000):
            dit = model(h, dtype=dtype)
            dit.load(torch.device("cpu"), lowvram_model_memory=budget, full_load=budget == 0)
            if budget == 1:
                network = dit.model.diffusion_model
                streamed = [m for m in network.modules() if getattr(m, "comfy_patched_weights", False)]
                assert len(streamed) < 12, "almost nothing may be resident"
            results.append(dit.model.diffusion_model(x, torch.tensor([500.0]), context))
            dit.unpatch_model()
        assert all(torch.equal(r, results[0]) for r in results), dtype


def check_loading_again_without_dynamic_memory(h: Host) -> None:
    """What newer versions do for compilers and hooks: call the remembered loader."""
    dit, clip, vae = parts(h)
    for patcher in (dit, clip.patcher, vae.patcher):
        loader, args = patcher.cached_patcher_init
        again = loader(*args, disable_dynamic=True)
        assert type(again).__name__ == "ModelPatcher"
        assert again.model.state_dict().keys() == patcher.model.state_dict().keys()
        assert all(isinstance(a, str) for a in args), "the arguments must not keep weights alive"


def check_out_of_memory_is_answered(h: Host) -> None:
    """The first failure makes room and tries again, the second is explained; the next run works."""
    vae, latent = parts(h)[2], {"samples": torch.zeros((1, 4, 6, 8, 12))}
    module, failures, tilings = vae.first_stage_model, [], []

    def failing(times: int) -> Callable[..., Any]:
        def decode_stream(*args: Any, **kwargs: Any) -> Any:
            failures.append(1)
            tilings.append(kwargs["tiling"])
            if len(failures) <= times:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return type(module).decode_stream(module, *args, **kwargs)
        return decode_stream

    for times in (1, 2):
        failures.clear()
        module.decode_stream = failing(times)
        try:
            run = lambda: h.run("AllegroVideoVAEDecode", samples=latent, vae=vae, **TILES)  # noqa: E731
            if times == 1:
                assert run().shape == (24, 64, 96, 3)
                assert [tiling.tiles_per_batch for tiling in tilings] == [None, 1]
            else:
                raises("DeviceMemoryFull", "Try, in this order: close other programs", run)
        finally:
            del module.decode_stream
    assert h.run("AllegroVideoVAEDecode", samples=latent, vae=vae, **TILES).shape == (24, 64, 96, 3)


def check_full_memory_is_known_to_the_package_and_to_comfyui(h: Host) -> None:
    """ComfyUI unloads all models after its own kind of error only."""
    error = h.module("nodes.bridge.compat").DeviceMemoryFull("full")
    assert isinstance(error, comfy.model_management.OOM_EXCEPTION)
    assert isinstance(error, h.module("allegro_model.errors").NotEnoughMemory)
    assert str(error) == "full"


def check_the_estimate_of_a_tile_knows_the_blend_window(h: Host) -> None:
    """The window is as wide as the clip, however small the tile."""
    vae = parts(h)[2]
    small, large = (vae._decode_bytes(vae.default_tiling, (22, *size), torch.float32) for size in ((8, 8), (90, 160)))
    assert large - small == 3 * 4 * 16 * (720 * 1280 - 64 * 64)


def check_nan_and_inf_of_the_vae_are_reported(h: Host) -> None:
    """Also Inf, which clamping would turn into white."""
    vae, latent = parts(h)[2], {"samples": torch.zeros((1, 4, 6, 8, 12))}
    module = vae.first_stage_model
    for value in (float("nan"), float("inf"), float("-inf")):
        def decode_stream(*args: Any, value: float = value, **kwargs: Any) -> Any:
            for part in type(module).decode_stream(module, *args, **kwargs):
                part[0, 0, 0, 0, 0] = value
                yield part

        module.decode_stream = decode_stream
        try:
            raises("NonFiniteError", "Decoding gave NaN or Inf", lambda: h.run(
                "AllegroVideoVAEDecode", samples=latent, vae=vae, **TILES))
        finally:
            del module.decode_stream


def check_clips_of_a_batch_keep_their_frames(h: Host) -> None:
    """[B, T, H, W, C]: only height and width are cropped to multiples of 8."""
    vae = parts(h)[2]
    clips = torch.rand((2, 12, 50, 60, 3), generator=torch.Generator().manual_seed(4))
    both = vae.encode(clips)
    assert both.shape == (2, 4, 3, 6, 7)
    assert torch.equal(both[1:], vae.encode(clips[1]))


def check_weights_of_a_plain_patcher_have_the_dtype_of_the_arithmetic(h: Host) -> None:
    """Newer versions with dynamic memory load matrices in the dtype of the file; a plain patcher never casts them."""
    memory = sys.modules.get("comfy.memory_management")
    if not hasattr(memory, "aimdo_enabled"):
        return  # this version has no dynamic memory, and load_state_dict casts
    root, source = h.base / "models" / "allegro" / "all-half", h.base / "models" / "allegro" / "tiny-random"
    shutil.copytree(source, root)
    text, read = h.module("nodes.bridge.text"), comfy.utils.load_safetensors
    try:
        for name in ("transformer", "vae"):
            file = root / name / "diffusion_pytorch_model.safetensors"
            save_file({k: v.half() for k, v in load_file(file).items()}, str(file))
        memory.aimdo_enabled = True
        comfy.utils.load_safetensors = lambda path: (load_file(path), None)  # the mapping needs an accelerator's driver
        dit = h.module("nodes.bridge.model").load_dit(str(root / "transformer"), disable_dynamic=True)
        vae = h.module("nodes.bridge.vae").load_vae(str(root / "vae"), disable_dynamic=True)
        text.SMALL_MODEL_PARAMETERS = 1  # so that this float32 encoder counts as large
        clip = text.load_t5(str(root / "text_encoder"), device="cpu", disable_dynamic=True)
        encoder = clip.cond_stage_model.t5xxl.transformer  # read when it is asked for
    finally:
        memory.aimdo_enabled, comfy.utils.load_safetensors = False, read
        text.SMALL_MODEL_PARAMETERS = h.module("allegro_model.pipeline").SMALL_MODEL_PARAMETERS
        shutil.rmtree(root)
    for module, dtype in ((dit.model.diffusion_model, torch.float32), (vae.first_stage_model, torch.float32),
                          (encoder, torch.bfloat16)):
        assert {p.dtype for p in module.parameters()} == {dtype}
    context = torch.randn((1, 20, 64), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        assert torch.isfinite(dit.model.diffusion_model(torch.zeros((1, 4, 2, 4, 4)), torch.tensor([500.0]), context)).all()
    assert vae.decode(torch.zeros((1, 4, 2, 4, 4))).shape == (1, 8, 32, 32, 3)
    assert h.run("AllegroT5Encode", clip=clip, text="a red circle", role="positive", clean_caption=True,
                 prompt_weighting=False)[0][0].shape == (1, 96, 64)


def check_cancel_inside_a_tile_and_a_text(h: Host) -> None:
    """Pressed when the network already runs: its next part must not."""
    _, clip, vae = parts(h)
    latent = {"samples": torch.zeros((1, 4, 2, 8, 8))}
    network, t5 = vae.first_stage_model, clip.cond_stage_model.t5xxl.transformer.encoder
    jobs = [
        (network.decoder.mid_block.resnets[0], network.decoder.up_blocks[0].resnets[0],
         lambda: h.run("AllegroVideoVAEDecode", samples=latent, vae=vae, **TILES)),
        (network.encoder.down_blocks[0].resnets[0], network.encoder.down_blocks[1].resnets[0],
         lambda: h.run("AllegroVideoVAEEncode", pixels=torch.zeros((8, 64, 64, 3)), vae=vae, **TILES)),
        (t5, t5.final_layer_norm,
         lambda: h.run("AllegroT5Encode", clip=clip, text="cancelled", role="raw", clean_caption=True, prompt_weighting=False)),
    ]
    for first, later, job in jobs:
        seen: list[str] = []

        def press(*args: Any, seen: list[str] = seen) -> None:
            seen.append("pressed")
            comfy.model_management.interrupt_current_processing(True)

        hooks = [first.register_forward_pre_hook(press),
                 later.register_forward_pre_hook(lambda *args, seen=seen: seen.append("went on"))]
        caught: BaseException | None = None
        try:
            job()
        except comfy.model_management.InterruptProcessingException as error:
            caught = error
        finally:
            comfy.model_management.interrupt_current_processing(False)
            for hook in hooks:
                hook.remove()
        assert caught is not None, "not cancelled"
        assert seen == ["pressed"], seen


def check_cancel_inside_every_loop(h: Host) -> None:
    """Pressed before the loop starts, so that the first look at it must already stop."""
    dit, _, vae = parts(h)
    latent = {"samples": torch.zeros((1, 4, 6, 8, 12))}
    jobs: list[Callable[[], Any]] = [
        lambda: sample(h, dit),
        lambda: h.run("AllegroVideoVAEDecode", samples=latent, vae=vae, **TILES),
        lambda: h.run("AllegroVideoVAEEncode", pixels=torch.zeros((24, 64, 96, 3)), vae=vae, **TILES),
        lambda: call(h.core.NODE_CLASS_MAPPINGS["VAEDecode"], samples=latent, vae=vae),
    ]
    for job in jobs:
        comfy.model_management.interrupt_current_processing(True)
        try:
            job()
        except comfy.model_management.InterruptProcessingException:
            continue
        finally:
            comfy.model_management.interrupt_current_processing(False)
        raise AssertionError("not cancelled")


def check_memory_is_stable_over_twenty_runs(h: Host) -> None:
    process, sizes = psutil.Process(), []
    with only_new_objects():
        for run in range(20):
            empty_one = h.run("EmptyAllegroLatentVideo", width=48, height=48, length=8, batch_size=1)
            latent = {"samples": sample(h, latent=empty_one, seed=run, steps=2)}
            h.run("AllegroVideoVAEDecode", samples=latent, vae=parts(h)[2], **TILES)
            gc.collect()
            sizes.append(process.memory_info().rss)
    assert max(sizes[10:]) < sizes[3] * 1.01, [s >> 20 for s in sizes]


def check_models_are_let_go(h: Host) -> None:
    dit = model(h)
    sample(h, dit, steps=1)
    watched = weakref.ref(dit.model)
    del dit
    comfy.model_management.unload_all_models()
    comfy.model_management.cleanup_models()
    gc.collect()
    assert watched() is None, "something keeps the model alive"


def check_previews_have_the_colours_of_the_clip(h: Host) -> None:
    """The bundled VAE brings fitted colours; without such a VAE beside it a transformer has those of the SDXL family."""
    bundled = "allegro-tiny (bundled)"
    vae = h.run("LoadAllegroVAE", vae_name=bundled, dtype="default")
    for colour in ((0.9, 0.1, 0.1), (0.1, 0.8, 0.2), (0.1, 0.2, 0.9), (0.95, 0.95, 0.95), (0.05, 0.05, 0.05)):
        clip = torch.tensor(colour).expand(8, 64, 96, 3)
        latents = h.run("AllegroVideoVAEEncode", pixels=clip, vae=vae, **TILES)["samples"]
        image = preview(model(h, bundled), latents)
        assert image.size == (12, 8)
        shown = torch.tensor(list(image.getdata())).float().mean(0) / 255
        assert (shown - torch.tensor(colour)).abs().max() < 0.15, (colour, shown)
    family = __import__("comfy.latent_formats").latent_formats.SDXL().latent_rgb_factors
    assert parts(h)[0].model.latent_format.latent_rgb_factors == family != model(h, bundled).model.latent_format.latent_rgb_factors


def preview(dit: Any, latents: Tensor) -> Any:
    """ComfyUI's preview of raw latents."""
    form = dit.model.latent_format
    previewer = sys.modules["latent_preview"].Latent2RGBPreviewer(form.latent_rgb_factors, form.latent_rgb_factors_bias)
    return previewer.decode_latent_to_preview(dit.model.process_latent_in(latents))


def check_wrong_width_of_the_vae_node(h: Host) -> None:
    raises("UnsupportedCheckpoint", "expected the VideoVAE of Load Allegro VAE", lambda: h.run(
        "AllegroVideoVAEDecode", samples={"samples": torch.zeros((1, 4, 6, 8, 12))}, vae=object(), **TILES))


def check_paths_stay_inside(h: Host) -> None:
    paths = h.module("nodes.bridge.paths")
    for name in ("..", "../secret", "/etc/passwd", "Sharded", "Sharded/transformer/config.json", "C:\\x", "a\0b"):
        raises("CheckpointError", "is not among the models", lambda name=name: paths.resolve("transformer", name))
    assert Path(paths.resolve("transformer", "Sharded/transformer")).name == "diffusion_pytorch_model-00001-of-00002.safetensors"


def check_choices_under_windows(h: Host) -> None:
    """Names with its separator: shown with slashes, and each resolves to its own file."""
    paths = h.module("nodes.bridge.paths")
    shards = [f"big\\transformer\\model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    others = [f"big\\transformer\\other-0000{i}-of-00002.safetensors" for i in (1, 2)]
    names = ["a.safetensors", "sub\\b.safetensors", "sub\\c.safetensors", *shards, *others, "sub\\notes.txt"]
    kept = paths.os, paths.folder_paths
    paths.os = SimpleNamespace(sep="\\", path=paths.os.path)
    paths.folder_paths = SimpleNamespace(
        get_filename_list=lambda key: names, get_folder_paths=lambda key: [],
        get_full_path=lambda key, name: str(PureWindowsPath("C:\\models") / name))
    try:
        listing = paths._listing("transformer")
    finally:
        paths.os, paths.folder_paths = kept
    assert {name: path for name, path in listing.items() if not name.endswith("(bundled)")} == {
        "a.safetensors": "C:\\models\\a.safetensors",
        "sub/b.safetensors": "C:\\models\\sub\\b.safetensors",
        "sub/c.safetensors": "C:\\models\\sub\\c.safetensors",
        "big/transformer": f"C:\\models\\{shards[0]}",
        "big/transformer/other (2 files)": f"C:\\models\\{others[0]}",
    }, listing
