"""Recognition by tensors: published layouts, what users put in front of the names, other people's models."""

import json
from pathlib import Path

import pytest
import torch

from allegro_model.config import PRESETS, DiTConfig
from allegro_model.errors import CheckpointMismatch, UnsupportedCheckpoint
from allegro_model.loading import keymaps
from allegro_model.loading.detect import identify
from allegro_model.loading.dimensions import (
    block_count,
    dit_config_from_shapes,
    preset_name,
    t5_config_from_shapes,
    t5_shapes,
    vae_config_from_shapes,
)
from allegro_model.loading.header import TensorInfo

MANIFESTS = Path(__file__).parents[1] / "data" / "manifests"
RELEASED = PRESETS["88x720P"]


def manifest(name):
    content = json.loads((MANIFESTS / f"{name}.json").read_text())
    return {key: tuple(shape) for key, shape in content["shapes"].items()}, content


def shapes_of(name):
    return manifest(name)[0]


# identify


@pytest.mark.parametrize(
    ("name", "family", "variant", "words"),
    [
        ("dit_t2v", "allegro-dit", "t2v", "text-to-video transformer, 32 layers"),
        ("dit_ti2v", "allegro-dit", "ti2v", "image-to-video transformer (TI2V), 32 layers"),
        ("vae", "allegro-vae", "full", "Allegro VideoVAE"),
        ("t5_v1_1_xxl_encoder", "t5-encoder", "xxl", "T5 v1.1 XXL text encoder, 24 layers of width 4096"),
        ("ema_vfi_ours", "ema-vfi", "ours", "EMA-VFI"),
        ("ema_vfi_ours_small", "ema-vfi", "ours_small", "EMA-VFI"),
    ],
)
@pytest.mark.parametrize("prefix", ["", "module."])
def test_published_layouts(name, family, variant, words, prefix):
    shapes, content = manifest(name)
    info = identify({prefix + key: shape for key, shape in shapes.items()})
    assert (info.family, info.variant, info.prefix) == (family, variant, prefix)
    assert words in info.title
    # The manifest of T5 counts its embedding under both of its names.
    tied = 32128 * 4096 if family == "t5-encoder" else 0
    assert info.num_parameters == content["total_params"] - tied


def test_sizes_and_types():
    shapes = shapes_of("dit_t2v")
    info = identify(
        shapes, tensors={name: TensorInfo(shape, torch.float32 if name.endswith("bias") else torch.bfloat16)
                         for name, shape in shapes.items()}
    )
    assert info.dtypes == ("bfloat16", "float32")
    biases = sum(shape[0] for name, shape in shapes.items() if name.endswith("bias"))
    assert info.num_bytes == 2 * info.num_parameters + 2 * biases


@pytest.mark.parametrize("half", ["encoder", "decoder"])
def test_half_a_vae(half):
    keep = {"encoder": ("encoder.", "quant_conv."), "decoder": ("decoder.", "post_quant_conv.")}[half]
    info = identify({name: shape for name, shape in shapes_of("vae").items() if name.startswith(keep)})
    assert (info.family, info.variant) == ("allegro-vae", half)
    assert half in info.title


def test_t5_of_another_size():
    shapes = {
        "encoder.block.0.layer.0.SelfAttention.q.weight": (64, 48),
        "encoder.block.0.layer.1.DenseReluDense.wi_0.weight": (128, 48),
    }
    info = identify(shapes)
    assert (info.family, info.variant) == ("t5-encoder", None)
    assert info.title == "T5 v1.1 text encoder, 1 layers of width 48"


def test_t5_with_decoder_umt5_and_first_version():
    shapes = shapes_of("t5_v1_1_xxl_encoder")
    full = shapes | {"decoder.block.0.layer.0.SelfAttention.q.weight": (4096, 4096)}
    assert identify(full).family == "t5-encoder"
    assert "decoder" in identify(full).title
    bias = "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"
    umt5 = identify(shapes | {bias: (32, 64)})
    assert (umt5.family, "UMT5" in umt5.title) == ("unknown", True)
    first = identify(
        {name.replace("wi_0", "wi"): shape for name, shape in shapes.items() if "wi_1" not in name}
    )
    assert (first.family, "first T5 version" in first.title) == ("unknown", True)


@pytest.mark.parametrize(
    "suffixes", [("lora_A.weight", "lora_B.weight"), ("lora_down.weight", "lora_up.weight")]
)
def test_lora(suffixes):
    down, up = suffixes
    base = "transformer.transformer_blocks.0.attn1.to_q."
    info = identify({base + down: (16, 2304), base + up: (2304, 16)})
    assert (info.family, info.title) == ("lora", "a LoRA (1 layers, rank 16)")


def test_bundle_names_its_parts():
    shapes = {"model.diffusion_model." + name: shape for name, shape in shapes_of("dit_t2v").items()}
    shapes |= {"first_stage_model." + name: shape for name, shape in shapes_of("vae").items()}
    shapes |= {"text_encoders.t5xxl.transformer." + n: s for n, s in shapes_of("t5_v1_1_xxl_encoder").items()}
    shapes |= {"text_encoders.t5xxl.logit_scale": ()}
    info = identify(shapes)
    assert info.family == "bundle"
    assert [part.family for part in info.parts] == ["allegro-dit", "allegro-vae", "t5-encoder"]
    assert "VideoVAE" in info.title


def test_scaled_float8_is_still_recognised_and_not_counted():
    shapes = shapes_of("dit_t2v")
    extra = {
        name.removesuffix("weight") + "scale_weight": () for name in shapes if name.endswith("to_q.weight")
    }
    info = identify(shapes | extra | {"scaled_fp8": (2,)})
    assert info.family == "allegro-dit"
    assert info.num_parameters == identify(shapes).num_parameters


@pytest.mark.parametrize("lost", ["proj_out.weight", "pos_embed.proj.weight", "scale_shift_table"])
def test_an_incomplete_transformer_is_still_one(lost):
    shapes = shapes_of("dit_t2v")
    del shapes[lost]
    assert identify(shapes).family == "allegro-dit"


def test_unknown_files_repeat_what_they_call_themselves():
    info = identify({"a": (1,)}, config={"_class_name": "SomethingElse"})
    assert info.family == "unknown"
    assert info.title.endswith('it calls itself "SomethingElse"')
    assert identify({"a": (1,)}, config={"_class_name": 5, "model_type": []}).family == "unknown"
    assert identify({}).title == "a file without tensors"


# Classes of diffusers, small where the defaults are large; names and shapes only, on the meta device.
OTHERS = [
    ("WanTransformer3DModel", {"num_layers": 1}, "Wan"),
    ("HunyuanVideoTransformer3DModel", {"num_layers": 1, "num_single_layers": 1}, "HunyuanVideo"),
    ("MochiTransformer3DModel", {"num_layers": 2}, "Mochi"),
    ("CogVideoXTransformer3DModel", {"num_layers": 1}, "CogVideoX"),
    ("LTXVideoTransformer3DModel", {"num_layers": 1}, "LTX-Video"),
    ("FluxTransformer2DModel", {"num_layers": 1, "num_single_layers": 1}, "Flux"),
    ("SD3Transformer2DModel", {"num_layers": 1}, "Stable Diffusion 3"),
    ("SanaTransformer2DModel", {"num_layers": 1}, "Sana"),
    ("QwenImageTransformer2DModel", {"num_layers": 2}, "Qwen-Image"),
    ("PixArtTransformer2DModel", {"num_layers": 1, "caption_channels": 4096}, "PixArt"),
    (
        "PixArtTransformer2DModel",
        {"num_layers": 1, "caption_channels": 4096, "use_additional_conditions": False},
        "PixArt",
    ),
    (
        "LatteTransformer3DModel",
        {
            "num_layers": 1,
            "in_channels": 4,
            "sample_size": 64,
            "patch_size": 2,
            "caption_channels": 4096,
            "norm_type": "ada_norm_single",
            "norm_elementwise_affine": False,
        },
        "Latte",
    ),
    ("UNet2DConditionModel", {}, "Stable Diffusion UNet"),
    ("AutoencoderKL", {}, "image VAE"),
    ("AutoencoderKLWan", {}, "VAE of Wan"),
    ("AutoencoderKLHunyuanVideo", {}, "VAE of another video model"),
    ("AutoencoderKLCogVideoX", {}, "VAE of another video model"),
]


@pytest.mark.parametrize(("cls", "kwargs", "words"), OTHERS, ids=[f"{c}-{len(k)}" for c, k, _ in OTHERS])
def test_other_models_are_named(cls, kwargs, words):
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        model = getattr(diffusers, cls)(**kwargs)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    info = identify(shapes)
    assert info.family == "unknown"
    assert words in info.title


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["blocks.0.self_attn.q.weight", "patch_embedding.weight", "head.modulation"], "Wan"),
        (["model.diffusion_model.double_blocks.0.img_attn.qkv.weight"], "Flux"),
        (["double_blocks.0.img_attn_qkv.weight"], "HunyuanVideo"),
        (
            ["model.diffusion_model.input_blocks.0.0.weight", "model.diffusion_model.label_emb.0.0.weight"],
            "Stable Diffusion XL",
        ),
        (["text_model.encoder.layers.0.self_attn.q_proj.weight"], "CLIP"),
        (["decoder.up.0.block.0.norm1.weight"], "image VAE"),
        (
            [
                "patchify_proj.weight",
                "adaln_single.linear.weight",
                "caption_projection.linear_1.weight",
                "proj_out.weight",
                "transformer_blocks.0.attn1.to_q.weight",
                "transformer_blocks.0.attn2.to_q.weight",
                "scale_shift_table",
            ],
            "LTX",
        ),
    ],
)
def test_original_layouts_of_other_models_are_named(names, words):
    info = identify(dict.fromkeys(names, (8, 8)))
    assert info.family == "unknown"
    assert words in info.title


# Configurations from shapes


@pytest.mark.parametrize("dialect", ["official", "diffusers"])
def test_dit_config_of_the_release(dialect):
    shapes, content = manifest("dit_t2v")
    assert dit_config_from_shapes(shapes, content["configs"][dialect]) == RELEASED.dit


def test_dit_without_config_is_the_released_one_and_says_so(caplog):
    assert dit_config_from_shapes(shapes_of("dit_t2v")) == RELEASED.dit
    assert "No config.json with this transformer" in caplog.text


def test_dit_sizes_come_from_shapes_and_scales_from_config():
    shapes = dit_shapes(layers=3, width=192, caption=40)
    config = dit_config_from_shapes(
        shapes, {"interpolation_scale_t": 1.0, "sample_size": [46, 80], "sample_size_t": 10}
    )
    assert (config.num_layers, config.width, config.num_attention_heads, config.caption_channels) == (
        3,
        192,
        2,
        40,
    )
    assert (config.interpolation_scale_t, config.sample_size, config.sample_size_t) == (1.0, (46, 80), 10)
    narrow = dit_config_from_shapes(shapes, {"num_attention_heads": 4, "attention_head_dim": 48})
    assert (narrow.num_attention_heads, narrow.attention_head_dim) == (4, 48)
    assert dit_config_from_shapes(shapes, {"num_attention_heads": 8}).attention_head_dim == 24


def dit_shapes(layers, width, caption):
    config = DiTConfig.from_dict(
        {
            "num_layers": layers,
            "num_attention_heads": width // 48,
            "attention_head_dim": 48,
            "caption_channels": caption,
        }
    )
    from allegro_model.dit import AllegroDiT

    return {name: tuple(t.shape) for name, t in AllegroDiT(config, device="meta").state_dict().items()}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_layers": 32}, "num_layers is 3 in the tensors and 32 in the config"),
        ({"caption_channels": 4096}, "caption_channels is 40 in the tensors and 4096 in the config"),
        ({"in_channels": 16}, "in_channels is 4 in the tensors and 16"),
        (
            {"num_attention_heads": 24, "attention_head_dim": 96},
            "192 wide, the config says 24 heads of 96 = 2304",
        ),
    ],
)
def test_config_that_contradicts_the_transformer(config, message):
    with pytest.raises(CheckpointMismatch) as error:
        dit_config_from_shapes(dit_shapes(3, 192, 40), config)
    assert message in str(error.value)


def test_width_that_needs_a_config():
    with pytest.raises(UnsupportedCheckpoint, match=r"144 wide, which is no multiple of 96.*no config\.json"):
        dit_config_from_shapes(dit_shapes(1, 144, 40))


@pytest.mark.parametrize(
    "config",
    [
        {"sample_size": "large"},
        {"norm_eps": []},
        {"sample_size": [1]},
        {"num_attention_heads": 0, "attention_head_dim": 0},
        {"patch_size_t": 2},
    ],
)
def test_config_that_makes_no_sense(config):
    with pytest.raises((UnsupportedCheckpoint, CheckpointMismatch), match="config"):
        dit_config_from_shapes(dit_shapes(1, 192, 40), config)


@pytest.mark.parametrize("dialect", ["official", "diffusers"])
def test_vae_config_of_the_release(dialect):
    shapes, content = manifest("vae")
    config = vae_config_from_shapes(shapes, content["configs"][dialect])
    assert config == RELEASED.vae
    assert config.scale_factor == 0.13235


@pytest.mark.parametrize("half", ["encoder.", "decoder."])
def test_vae_config_of_half_a_file(half):
    shapes = {name: shape for name, shape in shapes_of("vae").items() if name.startswith(half)}
    assert vae_config_from_shapes(shapes) == RELEASED.vae


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"block_out_channels": [64, 128, 256, 256]},
            "block_out_channels is [128, 256, 512, 512] in the tensors",
        ),
        (
            {"temporal_downsample_blocks": [True, False, False, False]},
            "temporal_down is [True, True, False, False]",
        ),
        ({"layers_per_block": 3}, "layers_per_block is 2 in the tensors and 3"),
    ],
)
def test_config_that_contradicts_the_vae(config, message):
    with pytest.raises(CheckpointMismatch) as error:
        vae_config_from_shapes(shapes_of("vae"), config)
    assert message in str(error.value)


def test_vae_groups_that_do_not_divide():
    with pytest.raises(UnsupportedCheckpoint, match="do not divide into 48 groups"):
        vae_config_from_shapes(shapes_of("vae"), {"norm_num_groups": 48})


def test_t5_config_and_its_tensors():
    shapes, content = manifest("t5_v1_1_xxl_encoder")
    expected = content["configs"]["transformers"]
    derived = t5_config_from_shapes(shapes)
    assert {key: derived[key] for key in expected if key != "_class_name"} == {
        key: value for key, value in expected.items() if key != "_class_name"
    }
    del shapes["encoder.embed_tokens.weight"]
    assert t5_shapes(derived) == shapes
    with pytest.raises(CheckpointMismatch, match=r"lacks shared\.weight"):
        t5_config_from_shapes({name: shape for name, shape in shapes.items() if name != "shared.weight"})


def test_presets_are_known_by_their_config():
    assert {preset_name(preset.dit) for preset in PRESETS.values()} == set(PRESETS)
    assert preset_name(DiTConfig.from_dict({"num_layers": 2})) is None


def test_one_invented_name_cannot_ask_for_a_giant_network():
    assert (
        block_count(
            ["transformer_blocks.999999.x", "transformer_blocks.99999999999999999999.x"], "transformer_blocks"
        )
        == 1
    )


# Names


@pytest.mark.parametrize("prefix", keymaps.PREFIXES)
def test_prefixes_come_off_and_back(prefix):
    names = [prefix + name for name in shapes_of("vae")]
    groups = keymaps.split_prefixes(names)
    assert list(groups) == [prefix]
    assert [prefix + stripped for stripped in groups[prefix]] == names
    assert list(groups[prefix].values()) == names


def test_old_vae_attention_is_renamed_and_nothing_else_is():
    shapes = shapes_of("vae")
    back = {f".{new}.": f".{old}." for old, new in keymaps.VAE_ATTENTION.items()}
    old = {}
    for name in shapes:
        changed = name
        for new_part, old_part in back.items():
            if ".attentions." in name:
                changed = changed.replace(new_part, old_part)
        old[changed] = name
    assert sum(a != b for a, b in old.items()) == 16  # 4 linears with bias, twice
    assert keymaps.native_names({name: name for name in old}, "allegro-vae") == {
        new: o for o, new in old.items()
    }
    assert keymaps.native_names({name: name for name in shapes}, "allegro-vae") == {
        name: name for name in shapes
    }


def test_old_and_new_attention_together_are_refused():
    names = ["decoder.mid_block.attentions.0.query.weight", "decoder.mid_block.attentions.0.to_q.weight"]
    with pytest.raises(CheckpointMismatch, match="both mean"):
        keymaps.native_names({name: name for name in names}, "allegro-vae")


@pytest.mark.parametrize(
    "present",
    [("shared.weight",), ("encoder.embed_tokens.weight",), ("shared.weight", "encoder.embed_tokens.weight")],
)
def test_t5_embedding_under_either_name(present):
    names = keymaps.native_names(
        {name: name for name in (*present, "decoder.final_layer_norm.weight", "lm_head.weight")}, "t5-encoder"
    )
    assert names == {"shared.weight": present[0]}
