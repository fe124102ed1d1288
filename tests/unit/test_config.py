"""Both dialects of config.json, the presets, and the rules about sizes."""

import json
from dataclasses import replace

import pytest

from allegro_model.config import PRESETS, DiTConfig, SamplingConfig, VAEConfig
from allegro_model.errors import GeometryError, NotEnoughMemory, UnsupportedCheckpoint
from allegro_model.geometry import check_memory, check_size, latent_shape, token_count

OFFICIAL_DIT = {
    "_class_name": "AllegroTransformer3DModel", "num_layers": 32, "num_attention_heads": 24,
    "attention_head_dim": 96, "in_channels": 4, "out_channels": 4, "patch_size": 2, "patch_size_t": 1,
    "sample_size": [90, 160], "sample_size_t": 22, "interpolation_scale_t": 2.2, "interpolation_scale_h": 2.0,
    "interpolation_scale_w": 2.0, "caption_channels": 4096, "norm_eps": 1e-6, "sa_attention_mode": "flash",
    "model_max_length": 300, "some_future_key": {"a": 1},
}
DIFFUSERS_DIT = {
    "_class_name": "AllegroTransformer3DModel", "num_layers": 32, "num_attention_heads": 24,
    "attention_head_dim": 96, "sample_height": 90, "sample_width": 160, "sample_frames": 22,
    "interpolation_scale_t": 2.2, "interpolation_scale_h": 2.0, "interpolation_scale_w": 2.0,
}


@pytest.mark.parametrize("config", [OFFICIAL_DIT, DIFFUSERS_DIT, {}])
def test_dit_dialects_mean_the_released_model(config):
    assert DiTConfig.from_dict(config) == PRESETS["88x720P"].dit
    assert DiTConfig.from_dict(config).width == 2304


@pytest.mark.parametrize(("frames", "scale"), [(22, 22 / 16), (21, 2.0), (16, 1.0), (17, 2.0)])
def test_null_scales_are_derived(frames, scale):
    config = DiTConfig.from_dict({"sample_size": [90, 160], "sample_size_t": frames, "interpolation_scale_t": None,
                                  "interpolation_scale_h": None, "interpolation_scale_w": None})
    assert (config.interpolation_scale_t, config.interpolation_scale_h, config.interpolation_scale_w) == (
        scale, 3.0, 4.0)


@pytest.mark.parametrize("config", [
    {"block_out_channels": [128, 256, 512, 512], "blocks_tempdown_li": [True, True, False, False],
     "blocks_tempup_li": [False, True, True, False], "scale_factor": 0.13235, "sample_size": 320,
     "tile_overlap": [120, 80], "chunk_len": 24, "t_over": 8, "norm_num_groups": 32},
    {"temporal_downsample_blocks": [True, True, False, False], "scaling_factor": 0.13,
     "temporal_upsample_blocks": [False, True, True, False], "sample_size": 320},
    {},
])
def test_vae_dialects_mean_the_released_model(config):
    vae = VAEConfig.from_dict(config)
    assert vae == PRESETS["88x720P"].vae
    assert (vae.temporal_factor, vae.spatial_factor) == (4, 8)


@pytest.mark.parametrize("preset", PRESETS.values())
def test_configs_survive_a_round_trip(preset):
    assert DiTConfig.from_dict(preset.dit.to_dict()) == preset.dit
    assert VAEConfig.from_dict(preset.vae.to_dict()) == preset.vae
    assert SamplingConfig.from_dict(preset.sampling.to_dict()) == preset.sampling
    coloured = replace(preset.vae, latent_rgb_factors=((0.1, 0.2, 0.3),) * 4, latent_rgb_factors_bias=(1.0, 0.0, -1.0))
    assert VAEConfig.from_dict(json.loads(json.dumps(coloured.to_dict()))) == coloured
    tiny = replace(preset.dit, absolute_position=True)
    assert DiTConfig.from_dict(tiny.to_dict()) == tiny


@pytest.mark.parametrize("config", [{"attention_head_dim": 64}, {"num_layers": -1}, {"patch_size_t": 2},
                                    {"interpolation_scale_t": 0}, {"interpolation_scale_w": float("nan")}])
def test_impossible_configs_are_refused(config):
    with pytest.raises(UnsupportedCheckpoint, match="expected"):
        DiTConfig.from_dict(config)


@pytest.mark.parametrize(("kind", "key", "value", "expected"), [
    (DiTConfig, "sample_size", [90], "two whole numbers"),
    (DiTConfig, "sample_size", [], "two whole numbers"),
    (DiTConfig, "sample_size", "large", "two whole numbers"),
    (DiTConfig, "sample_size", [90, 0], "positive integers"),
    (DiTConfig, "sample_height", {"a": 1}, "a whole number"),
    (DiTConfig, "sample_frames", 22.5, "a whole number"),
    (DiTConfig, "num_layers", "many", "a whole number"),
    (DiTConfig, "num_layers", float("inf"), "a whole number"),
    (DiTConfig, "norm_eps", [1], "a number"),
    (DiTConfig, "interpolation_scale_t", "wide", "a number"),
    (VAEConfig, "block_out_channels", 128, "a list of whole numbers"),
    (VAEConfig, "block_out_channels", [], "positive integers"),
    (VAEConfig, "blocks_tempdown_li", ["yes"], "a list of true and false"),
    (VAEConfig, "temporal_up", [True], "4 entries"),
    (VAEConfig, "tile_overlap", [120], "two whole numbers"),
    (VAEConfig, "sample_size", [], "a whole number"),
    (VAEConfig, "chunk_len", 0, "a positive integer"),
    (VAEConfig, "scaling_factor", "small", "a number"),
    (VAEConfig, "latent_rgb_factors", [[0.1, 0.2, 0.3]], "4 rows of 3 numbers"),
    (VAEConfig, "latent_rgb_factors", [1, 2], "rows of numbers"),
    (VAEConfig, "latent_rgb_factors_bias", [1], "3 numbers"),
])
def test_malformed_values_are_named(kind, key, value, expected):
    name = "tile_frames" if key == "chunk_len" else key  # its kind was right
    with pytest.raises(UnsupportedCheckpoint, match=f"{name}=.*expected {expected}"):
        kind.from_dict({key: value})


@pytest.mark.parametrize("preset", PRESETS.values())
def test_presets_are_legal_and_consistent(preset):
    shape = latent_shape(preset.sampling.width, preset.sampling.height, preset.sampling.num_frames)
    assert shape == (preset.dit.sample_size_t, *preset.dit.sample_size)


def test_released_token_count():
    assert token_count(latent_shape(1280, 720, 88)) == 79_200


@pytest.mark.parametrize(("size", "message"), [
    ((1280, 721, 88), r"height=721.*nearest: 720 or 736"),
    ((0, 720, 88), r"width=0.*nearest: 16"),
    ((-16, 720, 88), r"width=-16.*nearest: 16"),
    ((1280, 720, 90), r"num_frames=90.*nearest: 88 or 92"),
    ((10**9, 720, 88), r"width=1000000000.*nearest: 8192"),
    ((1280.0, 720, 88), r"width=1280.0.*whole number"),
    ((1280, 720, 3), r"num_frames=3.*nearest: 4"),
])
def test_illegal_sizes_name_the_nearest_legal_ones(size, message):
    with pytest.raises(GeometryError, match=message):
        check_size(*size)


def test_memory_message_has_stage_need_free_and_remedy():
    with pytest.raises(NotEnoughMemory, match=r"Sampling needs about 2.0 GiB, 1.0 GiB are free.*fewer frames"):
        check_memory("Sampling", 2 << 30, 1 << 30, "fewer frames")
    check_memory("Sampling", 1 << 30, 2 << 30, "fewer frames")
