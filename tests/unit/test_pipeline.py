"""The pipeline from prompt to frames with the bundled model, in few steps."""

import math
from dataclasses import replace

import pytest
import torch

from allegro_model import AllegroPipeline, Tiling, memory, pipeline
from allegro_model.errors import (
    CheckpointError,
    GeometryError,
    NonFiniteError,
    NotEnoughMemory,
    ScheduleError,
    UnsupportedCheckpoint,
)
from allegro_model.latents import pack_latents, pack_state, read_latents, read_state
from allegro_model.sampling import SAMPLERS

pytest.importorskip("transformers", reason="the text encoder needs transformers (extra: standalone)")

PROMPT = "a red circle moves to the right on a blue background"
SMALL = {"width": 64, "height": 48, "num_frames": 8, "num_steps": 4, "seed": 7}


@pytest.fixture(scope="module")
def tiny():
    return AllegroPipeline.from_pretrained("tiny", device="cpu")


@pytest.fixture(scope="module")
def prompts(tiny):
    return tiny.encode_prompt(PROMPT, guidance_scale=3.0)


def run(tiny, prompts, **overrides):
    settings = tiny.settings(**{**SMALL, **overrides})
    return tiny.raw_latents(tiny.sample(prompts, tiny.start(settings)))


def test_a_call_returns_frames_of_the_size_asked_for(tiny):
    frames = tiny(PROMPT, **SMALL)
    assert frames.shape == (1, 3, 8, 48, 64)
    assert frames.min() >= -1
    assert frames.max() <= 1


def test_the_same_seed_gives_the_same_and_another_seed_another(tiny, prompts):
    first = run(tiny, prompts)
    assert torch.equal(first, run(tiny, prompts))
    assert not torch.allclose(first, run(tiny, prompts, seed=8), atol=0.1)


def test_a_stored_prompt_never_needs_the_text_encoder_again(prompts, tmp_path, monkeypatch):
    """Of two prompts only the new one is encoded; what comes from the store is the same to the bit."""
    stored = AllegroPipeline.from_pretrained("tiny", device="cpu", prompt_cache=tmp_path / "prompts")
    first = stored.encode_prompt(PROMPT, guidance_scale=3.0)
    encoded = []
    real = AllegroPipeline._encode
    monkeypatch.setattr(AllegroPipeline, "_encode", lambda self, texts: (encoded.extend(texts), real(self, texts))[1])
    second = stored.encode_prompt(PROMPT, guidance_scale=3.0)
    assert encoded == []
    for found in (first, second):
        for one, other in zip((*found.positive, *found.negative), (*prompts.positive, *prompts.negative), strict=True):
            assert torch.equal(one, other)
            assert one.dtype == other.dtype
    stored.encode_prompt("a blue square", guidance_scale=3.0)
    assert encoded == ["a blue square"]
    stored.encode_prompt(PROMPT, "blurred", guidance_scale=3.0)
    assert encoded == ["a blue square", "blurred"]
    AllegroPipeline.from_pretrained("tiny", device="cpu", dtype="bf16", prompt_cache=tmp_path / "prompts").encode_prompt(
        PROMPT, guidance_scale=1.0)
    assert encoded == ["a blue square", "blurred"], "the transformer's type is not the text encoder's"


@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
def test_a_run_saved_half_way_and_resumed_equals_one_run(tiny, prompts, sampler, tmp_path):
    whole = run(tiny, prompts, sampler=sampler)
    settings = tiny.settings(**SMALL, sampler=sampler)
    half = tiny.sample(prompts, tiny.start(settings), stop=2)
    assert not half.finished
    file = tmp_path / "half.safetensors"
    file.write_bytes(pack_state(half, {"prompt": PROMPT}))
    state, metadata = read_state(file)
    assert metadata["prompt"] == PROMPT
    assert torch.equal(tiny.raw_latents(tiny.sample(prompts, state)), whole)


def test_a_resumed_run_keeps_its_attention(tiny, prompts, tmp_path):
    """Which is measured, so that another might be chosen, and exact ones differ by rounding."""
    half = tiny.sample(prompts, tiny.start(tiny.settings(**SMALL)), stop=1)
    assert half.attention == "sdpa"
    for name, expected in (("sdpa-math", "sdpa-math"), ("of another version", "sdpa")):
        (tmp_path / "half.safetensors").write_bytes(pack_state(replace(half, attention=name), {}))
        state, _ = read_state(tmp_path / "half.safetensors")
        assert tiny.sample(prompts, state, stop=2).attention == expected


def test_a_resumed_run_begins_with_an_empty_cache(tiny, prompts, monkeypatch):
    """It computes its first step whatever the steps before it computed, and nothing of them is used."""
    half = tiny.sample(prompts, tiny.start(tiny.settings(**{**SMALL, "num_steps": 20}, cache="draft")), stop=18)
    assert half.skipped.startswith("step cache draft: ")
    calls, original = [], tiny.dit.denoise
    monkeypatch.setattr(tiny.dit, "denoise", lambda x, t, p, **k: (calls.append(float(t[0])), original(x, t, p, **k))[1])
    tiny.sample(prompts, half)
    assert calls[0] == pytest.approx(999 / 19, abs=0.01)
    assert torch.equal(tiny.sample(prompts, half).latents, tiny.sample(prompts, half).latents)


def test_runs_saved_before_there_were_caches_are_read(tiny, tmp_path, monkeypatch):
    state = tiny.start(tiny.settings(**SMALL))
    old = {name: value for name, value in state.settings.to_dict().items() if name != "cache"}
    monkeypatch.setattr(type(state.settings), "to_dict", lambda self: old)
    file = tmp_path / "old.safetensors"
    file.write_bytes(pack_state(state, {}))
    assert read_state(file)[0].settings == state.settings


def test_unfinished_runs_are_not_decoded(tiny, prompts, tmp_path):
    half = tiny.sample(prompts, tiny.start(tiny.settings(**SMALL)), stop=1)
    with pytest.raises(ScheduleError, match="1 of 4 steps"):
        tiny.raw_latents(half)
    file = tmp_path / "half.safetensors"
    file.write_bytes(pack_state(half, {}))
    with pytest.raises(UnsupportedCheckpoint, match=r"stopped after step 1.*--resume"):
        read_latents(file)


def test_latent_files_hold_what_comfyui_reads(tmp_path):
    from safetensors.torch import load_file

    latents = torch.randn(1, 4, 2, 6, 8)
    file = tmp_path / "clip.safetensors"
    file.write_bytes(pack_latents(latents, {"seed": 1}))
    assert set(load_file(file)) == {"latent_tensor", "latent_format_version_0"}
    read, metadata = read_latents(file)
    assert torch.equal(read, latents)
    assert metadata == {"seed": 1}


@pytest.mark.parametrize("content", [b"", b"not safetensors", b"\x80\x04pickle" * 10])
def test_wrong_latent_files_are_named(tmp_path, content):
    file = tmp_path / "clip.safetensors"
    file.write_bytes(content)
    for read in (read_latents, read_state):
        with pytest.raises(UnsupportedCheckpoint, match=r"clip.safetensors.*[Ee]xpected"):
            read(file)


def test_low_denoise_stays_near_the_given_clip(tiny, prompts):
    frames = torch.linspace(-0.5, 0.5, 64).expand(1, 3, 8, 48, 64).contiguous()
    start = tiny.encode(frames)
    distances = []
    for denoise in (0.05, 0.8):
        state = tiny.start(tiny.settings(**SMALL, denoise=denoise), start)
        distances.append((tiny.raw_latents(tiny.sample(prompts, state)) - start).pow(2).mean().item())
    assert distances[0] < 0.5 * distances[1]


def test_denoise_below_one_needs_something_to_start_from(tiny):
    with pytest.raises(ScheduleError, match="needs frames or latents"):
        tiny.start(tiny.settings(**SMALL, denoise=0.5))


def test_init_latents_of_another_size_are_refused(tiny):
    with pytest.raises(GeometryError, match=r"\[1, 4, 2, 6, 10\]: expected \[1, 4, 2, 6, 8\]"):
        tiny.start(tiny.settings(**SMALL, denoise=0.5), torch.zeros(1, 4, 2, 6, 10))


def test_cancelling_in_a_step_leaves_the_pipeline_usable(tiny, prompts):
    class Stop(Exception):
        pass

    def callback(info):
        if info.step == 2:
            raise Stop

    before = run(tiny, prompts)
    with pytest.raises(Stop):
        tiny.sample(prompts, tiny.start(tiny.settings(**SMALL)), callback=callback)
    assert torch.equal(run(tiny, prompts), before)


@pytest.mark.parametrize(("settings", "error", "message"), [
    ({"num_steps": 0}, ScheduleError, "steps=0"),
    ({"guidance_scale": math.nan}, ScheduleError, "finite"),
    ({"sampler": "magic"}, ScheduleError, "must be one of euler_ancestral"),
    ({"seed": -1}, ScheduleError, "seed=-1"),
    ({"width": 100}, GeometryError, "96 or 112"),
    ({"num_frames": 0}, GeometryError, "nearest: 4"),
])
def test_bad_settings_are_refused_before_anything_is_loaded(settings, error, message, monkeypatch):
    for loader in ("load_dit", "load_vae", "load_text_encoder"):
        monkeypatch.setattr(pipeline, loader, lambda *a, **k: pytest.fail("weights were touched"))
    with pytest.raises(error, match=message):
        AllegroPipeline.from_pretrained("tiny", device="cpu")(PROMPT, **settings)


def test_a_clip_that_cannot_fit_is_refused_before_allocation(tiny, monkeypatch):
    huge = tiny.settings(width=8192, height=8192, num_frames=4096)
    with pytest.raises(NotEnoughMemory, match=r"needs about \d+\.\d GiB.*fewer frames"):
        tiny.check_memory(huge)
    monkeypatch.setattr(pipeline, "free_bytes", lambda device: 1 << 20)
    with pytest.raises(NotEnoughMemory):
        tiny.check_memory(tiny.settings(width=1280, height=720, num_frames=88))


def test_the_text_encoder_keeps_its_precision_and_counts_as_memory_where_it_is_not_streamed(tiny, monkeypatch):
    assert tiny.text_dtype is torch.float32  # small
    monkeypatch.setattr(AllegroPipeline, "_text_parameters", lambda self: 5 * 10**9)
    assert tiny.text_dtype is torch.bfloat16
    assert AllegroPipeline.from_pretrained("tiny", device="cpu", dtype="fp32").text_dtype is torch.float32
    monkeypatch.setattr(pipeline, "free_bytes", lambda device: 8 << 30)
    tiny.check_memory(tiny.settings(**SMALL))
    monkeypatch.setattr(tiny, "offload", "none")
    with pytest.raises(NotEnoughMemory, match=r"The text encoder needs about 9.3 GiB"):
        tiny.check_memory(tiny.settings(**SMALL))


def test_many_tiles_per_batch_cost_no_more_than_there_are_tiles(tiny):
    from allegro_model import Tiling

    many = AllegroPipeline.from_pretrained(
        "tiny", device="cpu", tiling=replace(Tiling.from_config(tiny.vae_config), tiles_per_batch=100_000))
    many.check_memory(many.settings(**SMALL))


@pytest.mark.parametrize("failing", [1, 5])
def test_decoding_out_of_memory_goes_on_tile_by_tile(tiny, monkeypatch, caplog, failing):
    """Frames that were handed out before, as after four batches of tiles, are neither repeated nor lost."""
    latents = torch.randn((1, 4, 8, 6, 8), generator=torch.Generator().manual_seed(0))
    sizes, small = [], Tiling(8, 24, 32, 4, 8, 8)
    expected = list(with_tiling(tiny, monkeypatch, small).decode_stream(latents))
    network = tiny.vae.decode_tile

    def limited(tiles):
        sizes.append(len(tiles))
        if len(tiles) > 1 and len(sizes) >= failing:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return network(tiles)

    monkeypatch.setattr(tiny.vae, "decode_tile", limited)
    found = list(with_tiling(tiny, monkeypatch, replace(small, tiles_per_batch=4)).decode_stream(latents))
    assert torch.allclose(torch.cat(found, 2), torch.cat(expected, 2), atol=1e-5)
    assert sizes[failing - 1] == 4
    assert set(sizes[failing:]) == {1}
    assert "one tile at a time" in caplog.text


def test_encoding_out_of_memory_goes_on_tile_by_tile(tiny, monkeypatch, caplog):
    clip = torch.rand((1, 3, 8, 32, 48), generator=torch.Generator().manual_seed(0)) * 2 - 1
    sizes, small = [], Tiling(8, 24, 32, 4, 8, 8)
    expected = with_tiling(tiny, monkeypatch, small).encode(clip)
    network = tiny.vae.encode_tile

    def limited(tiles):
        sizes.append(len(tiles))
        if len(tiles) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return network(tiles)

    monkeypatch.setattr(tiny.vae, "encode_tile", limited)
    assert torch.equal(with_tiling(tiny, monkeypatch, replace(small, tiles_per_batch=4)).encode(clip), expected)
    assert sizes == [4, 1, 1, 1, 1]
    assert "while encoding" in caplog.text


def test_decoding_out_of_memory_with_nothing_to_spare_is_told(tiny, monkeypatch):
    calls = []

    def full(tiles):
        calls.append(1)
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(tiny.vae, "decode_tile", full)
    with pytest.raises(torch.OutOfMemoryError):
        list(with_tiling(tiny, monkeypatch, None).decode_stream(torch.zeros((1, 4, 2, 4, 4))))
    assert calls == [1]


def with_tiling(tiny, monkeypatch, tiling):
    monkeypatch.setattr(tiny, "tiling", tiling)
    return tiny


def test_nan_is_reported_with_its_step(tiny, prompts, monkeypatch):
    monkeypatch.setattr(type(tiny.dit), "denoise", lambda self, x, t, p, **_: x * math.nan)
    with pytest.raises(NonFiniteError, match="step 1 of 4"):
        run(tiny, prompts)


def test_a_folder_that_is_no_model_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        AllegroPipeline.from_pretrained(tmp_path)


def test_memory_is_known_on_this_machine():
    cpu = torch.device("cpu")
    assert 0 < memory.free_bytes(cpu) <= memory.total_bytes(cpu)
