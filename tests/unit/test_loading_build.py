"""Models from files: strict, without copies; a wrong file is refused with what it is and what was expected."""

import json
import os
from dataclasses import replace

import psutil
import pytest
import torch
from safetensors.torch import save_file

from allegro_model.config import PRESETS, DiTConfig, SamplingConfig, VAEConfig
from allegro_model.dit import AllegroDiT, AllegroTI2V
from allegro_model.errors import CheckpointError, CheckpointMismatch, UnsupportedCheckpoint
from allegro_model.loading import (
    bundled_model,
    defaults,
    describe,
    load_dit,
    load_sampling_defaults,
    load_vae,
    open_source,
    source,
)
from allegro_model.vae import VideoVAE

DIT = DiTConfig.from_dict(
    {
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 24,
        "caption_channels": 32,
        "interpolation_scale_t": 1.0,
        "sample_frames": 6,
        "sample_size": [8, 12],
    }
)
VAE = VAEConfig.from_dict(
    {
        "block_out_channels": [16, 16, 32, 32],
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "temporal_norm_num_groups": 8,
        "scale_factor": 0.5,
    }
)


def filled(model):
    """The state of a model with a repeatable pattern instead of random weights."""
    return {
        name: (torch.arange(t.numel(), dtype=torch.float32) % 13 - 6).reshape(t.shape) * 0.02
        + 0.001 * (i % 7)
        for i, (name, t) in enumerate(model.state_dict().items())
    }


@pytest.fixture(scope="module")
def dit_state():
    return filled(AllegroDiT(DIT))


@pytest.fixture(scope="module")
def vae_state():
    return filled(VideoVAE(VAE))


def save(folder, state, config=None, name="diffusion_pytorch_model.safetensors", **kwargs):
    folder.mkdir(parents=True, exist_ok=True)
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, folder / name, **kwargs)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config.to_dict()))
    return folder


def run(dit):
    generator = torch.Generator().manual_seed(1)
    dtype = dit.pos_embed.proj.weight.dtype
    latents, text = (
        torch.randn(shape, generator=generator).to(dtype) for shape in ((1, 4, 2, 4, 6), (1, 5, 32))
    )
    return dit(latents, torch.tensor([500.0]), text)


# Sound checkpoints


def test_dit_round_trip(tmp_path, dit_state):
    reference = AllegroDiT(DIT)
    reference.load_state_dict(dit_state)
    dit = load_dit(save(tmp_path, dit_state, DIT))
    assert dit.config == DIT
    assert not dit.training
    assert not any(p.requires_grad or p.is_meta for p in dit.parameters())
    assert all(torch.equal(tensor, dit_state[name]) for name, tensor in dit.state_dict().items())
    out = run(dit)
    assert torch.isfinite(out).all()
    # Matrix kernels round differently when the weights lie elsewhere in memory.
    assert torch.allclose(out, run(reference.eval()), atol=1e-5)


def test_vae_round_trip_in_float32(tmp_path, vae_state):
    reference = VideoVAE(VAE)
    reference.load_state_dict(vae_state)
    vae = load_vae(save(tmp_path, vae_state, VAE))
    frames = torch.linspace(-1, 1, 3 * 4 * 16 * 16).reshape(1, 3, 4, 16, 16)
    mean, _ = vae.encode(frames)
    assert torch.allclose(mean, reference.encode(frames)[0], atol=1e-5)
    assert torch.isfinite(vae.decode(mean)).all()
    half = {name: tensor.half() for name, tensor in vae_state.items()}
    path = save(tmp_path / "half", half, VAE)
    assert load_vae(path).dtype == torch.float32
    assert load_vae(path, dtype=None).dtype == torch.float16


@pytest.mark.parametrize("part", ["encoder", "decoder"])
@pytest.mark.parametrize("stored", ["full", "half"])
def test_half_a_vae(tmp_path, vae_state, part, stored):
    keep = {"encoder": ("encoder.", "quant_conv."), "decoder": ("decoder.", "post_quant_conv.")}[part]
    state = {n: t for n, t in vae_state.items() if stored == "full" or n.startswith(keep)}
    vae = load_vae(save(tmp_path, state, VAE), part=part)
    assert {name.split(".")[0] for name in vae.state_dict()} == {prefix[:-1] for prefix in keep}
    assert torch.equal(vae.state_dict()[keep[1] + "weight"], vae_state[keep[1] + "weight"])


def test_weights_stay_mapped_until_used(tmp_path):
    config = DiTConfig.from_dict({"num_layers": 2, "num_attention_heads": 12})  # 1152 wide, 230 MB
    meta = AllegroDiT(config, device="meta")
    save(tmp_path, {name: torch.zeros(t.shape) for name, t in meta.state_dict().items()}, config)
    before = psutil.Process(os.getpid()).memory_info().rss
    dit = load_dit(tmp_path)
    assert psutil.Process(os.getpid()).memory_info().rss - before < 30e6
    assert sum(p.numel() for p in dit.parameters()) * 4 > 150e6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cast(tmp_path, dit_state, dtype):
    dit = load_dit(save(tmp_path, dit_state, DIT), dtype=dtype)
    for name, tensor in dit.state_dict().items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, dit_state[name].to(dtype))


def test_mixed_types_become_the_common_one(tmp_path, dit_state):
    mixed = {
        name: tensor if name.endswith("bias") else tensor.bfloat16() for name, tensor in dit_state.items()
    }
    dit = load_dit(save(tmp_path, mixed, DIT))
    assert {p.dtype for p in dit.parameters()} == {torch.bfloat16}
    assert torch.isfinite(run(dit)).all()


def test_sharded_snapshot(tmp_path, dit_state):
    names = list(dit_state)
    folder = tmp_path / "transformer"
    parts = [names[:20], names[20:]]
    weight_map = {}
    for number, part in enumerate(parts, 1):
        file = f"diffusion_pytorch_model-{number:05d}-of-00002.safetensors"
        save(folder, {name: dit_state[name] for name in part}, DIT, name=file)
        weight_map |= dict.fromkeys(part, file)
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / "vae").mkdir()
    for path in (tmp_path, folder, index, folder / "diffusion_pytorch_model-00002-of-00002.safetensors"):
        assert torch.equal(load_dit(path).state_dict()["proj_out.weight"], dit_state["proj_out.weight"])


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "diffusion_model.", "transformer."])
def test_foreign_prefixes(tmp_path, dit_state, prefix):
    save(tmp_path, {prefix + name: tensor for name, tensor in dit_state.items()}, DIT)
    assert torch.equal(load_dit(tmp_path).proj_out.weight, dit_state["proj_out.weight"])


def test_all_in_one_file(tmp_path, dit_state, vae_state):
    state = {"model.diffusion_model." + n: t for n, t in dit_state.items()} | {
        "vae." + n: t for n, t in vae_state.items()
    }
    # Whose this config is cannot be told, so it is not taken.
    save(tmp_path, state, name="all.safetensors", metadata={"config": '{"num_layers": 99}'})
    assert torch.equal(load_dit(tmp_path, config=DIT).proj_out.weight, dit_state["proj_out.weight"])
    assert torch.equal(load_vae(tmp_path, config=VAE).quant_conv.weight, vae_state["quant_conv.weight"])


def test_config_in_the_metadata(tmp_path, dit_state):
    save(tmp_path, dit_state, name="dit.safetensors", metadata={"config": json.dumps(DIT.to_dict())})
    assert load_dit(tmp_path / "dit.safetensors").config == DIT


@pytest.mark.parametrize("conv", [False, True], ids=["linear", "1x1 convolution"])
def test_old_vae_attention(tmp_path, vae_state, conv):
    old = {}
    for name, tensor in vae_state.items():
        if ".attentions." in name:
            for new, previous in (
                ("to_q", "query"),
                ("to_k", "key"),
                ("to_v", "value"),
                ("to_out.0", "proj_attn"),
            ):
                name = name.replace(f".{new}.", f".{previous}.")
            if conv and tensor.ndim == 2:
                tensor = tensor[:, :, None, None]
        old[name] = tensor
    assert old.keys() != vae_state.keys()
    vae = load_vae(save(tmp_path, old, VAE))
    assert all(torch.equal(tensor, vae_state[name]) for name, tensor in vae.state_dict().items())


# Float8


def quantised(state, style):
    result = {}
    for name, tensor in state.items():
        if tensor.ndim == 2 and "transformer_blocks" in name and name.endswith(".weight"):
            base = name.removesuffix("weight")
            # Powers of two, so that scaling is exact; per row in the last style.
            scale = {
                "bare": None,
                "scaled": torch.tensor(0.25),
                "quant": torch.tensor(0.5),
                "rows": torch.full((tensor.shape[0],), 0.5),
            }[style]
            rows = scale if scale is None or scale.ndim == 0 else scale[:, None]
            result[name] = (tensor if scale is None else tensor / rows).to(torch.float8_e4m3fn)
            if style == "quant":
                result[base + "weight_scale"] = scale
                result[base + "comfy_quant"] = torch.tensor(
                    list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8
                )
            elif scale is not None:
                result[base + "scale_weight"] = scale
                result[base + "scale_input"] = torch.tensor(1.0)
        else:
            result[name] = tensor.bfloat16()
    if style in ("scaled", "rows"):
        result["scaled_fp8"] = torch.empty(2, dtype=torch.float8_e4m3fn)
    return result


@pytest.mark.parametrize("style", ["bare", "scaled", "rows", "quant"])
@pytest.mark.parametrize("dtype", [None, torch.float32])
@pytest.mark.parametrize("batch_bytes", [1, 2**20], ids=["tensor by tensor", "at once"])
def test_float8_is_read_back(tmp_path, monkeypatch, dit_state, style, dtype, batch_bytes):
    monkeypatch.setattr(source, "_BATCH_BYTES", batch_bytes)
    stored = quantised(dit_state, style)
    dit = load_dit(save(tmp_path, stored, DIT), dtype=dtype, dequantise=True)
    assert {p.dtype for p in dit.parameters()} == {dtype or torch.bfloat16}
    weight = dit.transformer_blocks[1].ff.net[0].proj.weight
    expected = dit_state["transformer_blocks.1.ff.net.0.proj.weight"]
    assert (weight.float() - expected).abs().max() <= 0.07 * expected.abs().max()  # 3 bits of mantissa
    assert torch.isfinite(run(dit)).all()
    kept = load_dit(tmp_path, dtype=torch.float32)
    assert torch.allclose(run(kept), run(dit).float(), atol=1e-6 if dtype else 0.1)


def test_unknown_scaled_format(tmp_path, dit_state):
    stored = quantised(dit_state, "quant")
    name = next(n for n in stored if n.endswith("comfy_quant"))
    stored[name] = torch.tensor(list(b'{"format": "nvfp4"}'), dtype=torch.uint8)
    with pytest.raises(
        UnsupportedCheckpoint, match=r"stored in the format 'nvfp4', expected one of float8_e4m3fn"
    ):
        load_dit(save(tmp_path, stored, DIT))


# Wrong checkpoints


def test_integers_are_refused(tmp_path, dit_state):
    wrong = dit_state | {"proj_out.weight": dit_state["proj_out.weight"].to(torch.int8)}
    with pytest.raises(
        UnsupportedCheckpoint,
        match=r"1 weights are stored as integers.*proj_out\.weight \(int8\); expected bfloat16",
    ):
        load_dit(save(tmp_path, wrong, DIT))


def test_wrong_family_says_what_it_is_and_what_was_expected(tmp_path, dit_state, vae_state):
    save(tmp_path / "dit", dit_state, DIT)
    save(tmp_path / "vae", vae_state, VAE)
    with pytest.raises(UnsupportedCheckpoint) as error:
        load_dit(tmp_path / "vae")
    message = str(error.value)
    assert "is an Allegro VideoVAE; expected an Allegro text-to-video transformer or its" in message
    assert f"It holds {len(vae_state)} tensors: decoder.conv_in.bias, " in message
    assert f"({len(vae_state) - 8} more)" in message
    assert "Expected tensors such as: pos_embed.proj.weight, " in message
    with pytest.raises(
        UnsupportedCheckpoint,
        match=r"is an Allegro text-to-video transformer, 2 layers; expected the Allegro VideoVAE",
    ):
        load_vae(tmp_path / "dit")


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["double_blocks.0.img_attn.qkv.weight"], "is a Flux transformer; expected"),
        (["text_model.encoder.layers.0.self_attn.q_proj.weight"], "is a CLIP text encoder; expected"),
        (["x.lora_A.weight", "x.lora_B.weight"], "is a LoRA (1 layers, rank 4); expected"),
        (["something"], "is a file of tensors that is not known here; expected"),
    ],
)
def test_other_models_are_refused_by_name(tmp_path, names, words):
    save(tmp_path, {name: torch.zeros(4, 4) for name in names})
    with pytest.raises(UnsupportedCheckpoint) as error:
        load_dit(tmp_path)
    assert words in str(error.value)


def test_missing_and_unexpected_tensors_are_listed(tmp_path, dit_state):
    state = {n: t for n, t in dit_state.items() if not n.startswith("transformer_blocks.0.attn1.")}
    state |= {"adapter.weight": torch.zeros(2)}
    with pytest.raises(CheckpointMismatch) as error:
        load_dit(save(tmp_path, state, DIT))
    message = str(error.value)
    assert "Missing (8): transformer_blocks.0.attn1.to_k.bias, " in message
    assert "Unexpected (1): adapter.weight." in message
    assert f"{len(state)} tensors found, {len(dit_state)} expected" in message


def test_long_lists_are_shortened(tmp_path, dit_state):
    state = {n: t for n, t in dit_state.items() if ".attn1.to_k" not in n and ".ff." not in n}
    with pytest.raises(CheckpointMismatch, match=r"Missing \(12\): ([^,]+, ){8}\.\.\. \(4 more\)\."):
        load_dit(save(tmp_path, state, DIT))


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        (
            "transformer_blocks.1.ff.net.0.proj.weight",
            (190, 48),
            "ff.net.0.proj.weight is [190, 48], expected [192, 48]",
        ),
        (
            "pos_embed.proj.weight",
            (50, 4, 2, 2),
            "pos_embed.proj.weight is [50, 4, 2, 2], expected [48, 4, 2, 2]",
        ),
        (
            "transformer_blocks.0.scale_shift_table",
            (6, 48, 1),
            "scale_shift_table is [6, 48, 1], expected [6, 48]",
        ),
    ],
)
def test_edited_shapes_are_listed(tmp_path, dit_state, name, shape, words):
    with pytest.raises(CheckpointMismatch) as error:
        load_dit(save(tmp_path, dit_state | {name: torch.zeros(shape)}, DIT))
    assert "Other shapes (1): " in str(error.value)
    assert words in str(error.value)


def test_layers_that_the_config_promises(tmp_path, dit_state):
    state = {n: t for n, t in dit_state.items() if not n.startswith("transformer_blocks.1.")}
    with pytest.raises(CheckpointMismatch) as error:
        load_dit(save(tmp_path, state, DIT))
    assert str(error.value).startswith(
        f"{tmp_path}: weights and config contradict each other: num_layers is 1"
    )


def test_half_a_vae_where_a_whole_one_is_needed(tmp_path, vae_state):
    save(
        tmp_path, {n: t for n, t in vae_state.items() if n.startswith(("decoder.", "post_quant_conv."))}, VAE
    )
    with pytest.raises(
        CheckpointMismatch, match=r"decoder half only; expected encoder and decoder.*part='decoder'"
    ):
        load_vae(tmp_path)
    with pytest.raises(CheckpointMismatch, match="decoder half only; expected the encoder"):
        load_vae(tmp_path, part="encoder")


def test_nothing_is_allocated_for_a_refused_file(tmp_path, monkeypatch, dit_state):
    monkeypatch.setattr(source, "map_tensors", lambda *a, **k: pytest.fail("tensors were mapped"))
    state = {n: t for n, t in dit_state.items() if n != "proj_out.bias"}
    with pytest.raises(CheckpointMismatch):
        load_dit(save(tmp_path, state, DIT))


# Whole models


@pytest.fixture
def snapshot(tmp_path, dit_state, vae_state):
    save(tmp_path / "transformer", dit_state, DIT)
    save(tmp_path / "vae", vae_state, VAE)
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "spiece.model").write_bytes(b"12345")
    return tmp_path


def test_parts_of_a_snapshot(snapshot, dit_state):
    assert torch.equal(load_dit(snapshot).proj_out.weight, dit_state["proj_out.weight"])
    assert load_vae(snapshot).config == VAE
    (snapshot / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"transformer holds no \.safetensors or \.gguf file"):
        load_dit(snapshot)


def test_sampling_defaults_of_a_snapshot(snapshot):
    (snapshot / "model_index.json").write_text(
        json.dumps({"allegro_sampling": {"width": 96, "fps": 8, "num_steps": 20}})
    )
    found = load_sampling_defaults(snapshot)
    assert (found.width, found.fps, found.num_steps) == (96, 8.0, 20)
    assert isinstance(found.fps, float)
    assert found.guidance_scale == PRESETS["88x720P"].sampling.guidance_scale


def test_sampling_defaults_without_an_entry(snapshot):
    (snapshot / "model_index.json").write_text("{}")
    found = load_sampling_defaults(snapshot)
    assert (found.num_frames, found.height, found.width) == (24, 64, 96)
    assert isinstance(found, SamplingConfig)


@pytest.mark.parametrize(("network", "changes"), [(AllegroDiT, {}), (AllegroTI2V, {"guidance_scale": 8.0})])
@pytest.mark.parametrize("preset", list(PRESETS))
def test_sampling_defaults_of_released_models(tmp_path, monkeypatch, preset, network, changes):
    meta = network(PRESETS[preset].dit, device="meta")
    opened = type(
        "S",
        (),
        {
            "path": tmp_path,
            "shapes": {n: tuple(t.shape) for n, t in meta.state_dict().items()},
            "header": type("H", (), {"config": PRESETS[preset].dit.to_dict()}),
            "info": type("I", (), {"variant": "ti2v" if network is AllegroTI2V else "t2v"}),
        },
    )
    monkeypatch.setattr(defaults, "open_source", lambda *a, **k: opened)
    assert load_sampling_defaults(tmp_path) == replace(PRESETS[preset].sampling, **changes)


@pytest.mark.parametrize("entry", [{"width": "wide"}, {"prompt_template": 1}, {"num_steps": 2.5}, ["width"]])
def test_broken_sampling_defaults(snapshot, entry):
    (snapshot / "model_index.json").write_text(json.dumps({"allegro_sampling": entry}))
    with pytest.raises(UnsupportedCheckpoint, match=r"model_index\.json: \w+ is .*, expected a"):
        load_sampling_defaults(snapshot)


def test_bundled_model(tmp_path, monkeypatch):
    (tmp_path / "tiny").mkdir()
    monkeypatch.setattr(defaults, "ASSETS", tmp_path)
    assert bundled_model("tiny") == tmp_path / "tiny"
    for name in ("huge", "..", "", "tiny/..", "."):
        with pytest.raises(CheckpointError, match=r"there is no bundled model .*, expected one of: tiny"):
            bundled_model(name)


# describe


def test_describe_a_file(tmp_path, dit_state):
    path = save(tmp_path, dit_state, DIT) / "diffusion_pytorch_model.safetensors"
    report = describe(path)
    assert json.loads(json.dumps(report)) == report
    assert (report["family"], report["variant"], report["dtypes"]) == ("allegro-dit", "t2v", ["float32"])
    assert report["parameters"] == sum(t.numel() for t in dit_state.values())
    assert report["bytes"] == 4 * report["parameters"]
    assert report["files"] == ["diffusion_pytorch_model.safetensors"]
    assert report["config"]["num_layers"] == 2
    assert report["trained_size"] == {"num_frames": 24, "height": 64, "width": 96}
    assert report["preset"] is None


def test_describe_a_snapshot(snapshot):
    (snapshot / "text_encoder").mkdir()
    (snapshot / "text_encoder" / "model.safetensors").write_bytes(
        b"version https://git-lfs.github.com/spec/v1\n"
    )
    report = describe(snapshot)
    assert json.loads(json.dumps(report)) == report
    assert report["family"] == "snapshot"
    assert list(report["components"]) == ["transformer", "vae", "text_encoder", "tokenizer"]
    assert report["components"]["vae"]["title"] == "Allegro VideoVAE"
    assert "Git LFS pointer" in report["components"]["text_encoder"]["error"]
    assert report["components"]["tokenizer"]["files"] == ["spiece.model"]
    parts = ("transformer", "vae", "tokenizer")
    assert report["bytes"] == sum(report["components"][name]["bytes"] for name in parts)


def test_open_source_tells_shapes_before_reading(tmp_path, dit_state):
    opened = open_source(
        save(tmp_path, {"diffusion_model." + n: t for n, t in dit_state.items()}, DIT), "allegro-dit"
    )
    assert opened.shapes == {name: tuple(t.shape) for name, t in dit_state.items()}
    assert opened.names["proj_out.bias"] == "diffusion_model.proj_out.bias"
