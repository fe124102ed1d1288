"""Measuring, and what follows from it: sizes, budgets, shares of a run, and what the commands say."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from commands import run_command

from allegro_model.attention import sdpa
from allegro_model.bench import estimate as estimating
from allegro_model.bench import quick, speed
from allegro_model.bench import rows as measuring
from allegro_model.bench.estimate import Machine, estimate_run, sampling_seconds
from allegro_model.bench.fit import fit_seconds
from allegro_model.bench.measure import Measured, at_largest, in_turn, peak_of, randomise
from allegro_model.bench.networks import META, T5_XXL, open_networks
from allegro_model.bench.speed import EvaluationSeconds, decode_seconds, evaluation_seconds
from allegro_model.cli import generate as generating
from allegro_model.cli.console import roughly
from allegro_model.config import DIT_88X720P, PRESETS
from allegro_model.costs import dit_flops, text_flops
from allegro_model.dit import AllegroDiT
from allegro_model.errors import CheckpointError
from allegro_model.geometry import latent_shape
from allegro_model.loading import bundled_model
from allegro_model.pipeline import AllegroPipeline, SampleSettings
from allegro_model.sampling import CACHE_LEVELS, count_work, reference_timesteps
from allegro_model.sampling import cache as caching
from allegro_model.streaming import layers_of_dit, streamed_bytes, whole_bytes
from allegro_model.vae import VideoVAE

CPU = torch.device("cpu")
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def allegro(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return lambda *words: run_command(capsys, [str(word) for word in words])


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """A clock that only calls move."""
    now = [0.0]
    monkeypatch.setattr("allegro_model.bench.measure.time.perf_counter", lambda: now[0])
    return lambda seconds: now.__setitem__(0, now[0] + seconds)


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Estimates that time the smallest part of a tile."""
    monkeypatch.setattr(estimating, "decode_seconds", partial(decode_seconds, budget=0.0))


# Measuring


def test_median_and_spread() -> None:
    measured = Measured([4.0, 2.0, 3.0])
    assert measured.median == 3.0
    assert measured.spread == pytest.approx(1 / 3)


def test_calls_are_measured_in_turn(clock: Callable[[float], None]) -> None:
    order: list[str] = []

    def call(name: str, seconds: float) -> Callable[[], None]:
        def run() -> None:
            order.append(name)
            clock(seconds)
        return run

    found = in_turn({"a": call("a", 1.0), "b": call("b", 2.0)}, CPU, 2)
    assert order == ["a", "b", "a", "b", "a", "b"]
    assert (found["a"].seconds, found["b"].seconds) == ([1.0, 1.0], [2.0, 2.0])


@pytest.mark.parametrize(("budget", "size"), [(0.001, 1), (13.0, 4), (1000.0, 8)])
def test_the_largest_size_that_fits_is_timed(clock: Callable[[float], None], budget: float, size: int) -> None:
    calls: list[int] = []

    def make(n: int) -> Callable[[], None]:
        return lambda: (calls.append(n), clock(n))[0]  # type: ignore[func-returns-value]

    assert at_largest(make, [1, 2, 4, 8], budget, CPU) == (size, float(size))
    assert max(calls) == size
    assert calls.count(size) > 3, "one that warms up, and three, of which one may be disturbed"


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells")
def test_peak_memory_of_a_call() -> None:
    peak = peak_of(lambda: torch.ones(2**24), CPU)
    assert peak == pytest.approx(2**26, rel=0.1)


def test_arbitrary_weights_are_noise_in_every_tensor() -> None:
    dit = randomise(AllegroDiT(tiny.DIT, device=META), CPU, torch.bfloat16)
    for name, tensor in dit.state_dict().items():
        assert tensor.dtype is torch.bfloat16
        assert bool(torch.isfinite(tensor).all()), name
        assert float(tensor.float().std()) == pytest.approx(0.02, rel=0.5), name


# Sizes


def test_sizes_of_a_released_model_need_no_files() -> None:
    networks = open_networks("88x720P")
    assert networks.dit == DIT_88X720P
    assert networks.dit_parameters == pytest.approx(2.8e9, rel=0.03)
    assert networks.vae_parameters == pytest.approx(175e6, rel=0.05)
    assert networks.text_parameters == pytest.approx(4.76e9, rel=0.01)
    assert networks.file_bytes is None
    assert networks.text is T5_XXL


@pytest.mark.parametrize("name", ["tiny", "tiny-ti2v"])
def test_sizes_of_a_folder(name: str) -> None:
    networks, pipeline = open_networks(name), AllegroPipeline.from_pretrained(name)
    assert networks.dit == pipeline.dit_config
    assert networks.vae == pipeline.vae_config
    assert networks.defaults == pipeline.defaults
    assert networks.image_to_video is pipeline.image_to_video
    assert networks.dit_parameters == sum(p.numel() for p in pipeline.dit.parameters())


def test_an_unknown_model_is_refused_with_a_list() -> None:
    with pytest.raises(CheckpointError, match=r"88x720P.*40x360P"):
        open_networks("nowhere")


# What a run computes


@pytest.mark.parametrize("level", CACHE_LEVELS)
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_evaluations_are_known_beforehand(level: str, guidance: float, monkeypatch: pytest.MonkeyPatch) -> None:
    if level == "off":
        assert count_work(level, [900.0, 500.0, 10.0], guided=guidance != 1) == ((6, 6) if guidance != 1 else (3, 3))
        return
    counts: list[int] = []
    denoise = AllegroDiT.denoise
    monkeypatch.setattr(AllegroDiT, "denoise",
                        lambda self, latents, *a, **k: (counts.append(len(latents)), denoise(self, latents, *a, **k))[1])
    pipeline = AllegroPipeline.from_pretrained("tiny")
    settings = pipeline.settings(num_steps=12, guidance_scale=guidance, cache=level, num_frames=4, width=32, height=32)
    prompts = pipeline.encode_prompt("a red circle", guidance_scale=guidance)
    pipeline.sample(prompts, pipeline.start(settings))
    work = count_work(level, reference_timesteps(12).tolist(), guided=guidance != 1)
    assert work.predictions == sum(counts)
    assert (work.attended < work.predictions) == (level == "broadcast")


def test_a_cache_takes_its_share_of_the_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = SampleSettings(1280, 720, 88, 100, 7.5)
    once = EvaluationSeconds(linear=1.0, attention=4.0)
    assert sampling_seconds(once, settings) == (200, 1000.0)
    monkeypatch.setattr(estimating, "count_work", lambda *args, **named: caching.Work(100, 60))
    evaluations, seconds = sampling_seconds(once, settings)
    assert evaluations == 100
    assert seconds == pytest.approx(60 * 5.0 + 40 * (20 / 28))


def test_a_fit_finds_the_coefficients() -> None:
    tokens = [1000, 3600, 14_400, 30_000]
    exact = [3e-4 * n + 2e-8 * n * n for n in tokens]
    assert fit_seconds(tokens, exact) == pytest.approx((3e-4, 2e-8))
    noisy = [s * f for s, f in zip(exact, (1.05, 0.95, 1.05, 0.95), strict=True)]
    assert fit_seconds(tokens, noisy) == pytest.approx((3e-4, 2e-8), rel=0.15)


# Estimates, with networks whose time is known


def test_parts_are_scaled_to_the_whole(clock: Callable[[float], None]) -> None:
    """Attention that takes 1 s per 2**28 pairs of queries and keys of a head, and nothing else that takes time."""
    networks, shape = replace(open_networks("88x720P"), dit=tiny.DIT), latent_shape(1280, 720, 4)

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, mask: torch.Tensor | None = None) -> torch.Tensor:
        clock(q.shape[1] * k.shape[1] * heads / 2**28 if k.shape[1] == 3600 else 0)
        return q

    found = evaluation_seconds(networks, shape, device=CPU, dtype=torch.float32, attention=attention, budget=0.01)
    assert found.attention == pytest.approx(2 * 2 * 3600**2 / 2**28)
    assert found.linear == 0


def test_tiles_are_timed_with_all_their_frames(monkeypatch: pytest.MonkeyPatch, clock: Callable[[float], None]) -> None:
    seen: list[tuple[int, ...]] = []
    monkeypatch.setattr(VideoVAE, "decode_tile", lambda self, latents: (seen.append(tuple(latents.shape[2:])), clock(0.01)))
    assert decode_seconds(open_networks("tiny"), (6, 8, 12), device=CPU) == pytest.approx(0.01)
    assert seen[0] == (1, 8, 8)
    assert seen[-1] == (6, 8, 12)
    assert all(t == 6 for t, h, w in seen[2:])


def test_a_small_text_encoder_is_timed_as_a_whole(monkeypatch: pytest.MonkeyPatch, clock: Callable[[float], None]) -> None:
    monkeypatch.setattr(speed, "text_run", lambda *args: lambda: clock(0.125))
    assert speed.text_seconds(open_networks("tiny").text, device=CPU, dtype=torch.float32) == 0.125


def test_a_large_text_encoder_is_as_fast_as_its_products(monkeypatch: pytest.MonkeyPatch, clock: Callable[[float], None]) -> None:
    """Where those that make a layer wider take a second each and all others none, a layer takes two seconds and a bit."""
    config = {**T5_XXL, "d_model": 64, "d_ff": 128, "num_heads": 1, "num_layers": 10000}
    monkeypatch.setattr(speed, "F", SimpleNamespace(linear=lambda x, weight: clock(len(weight) == 128)))
    layers = text_flops(config, speed.TEXT_TOKENS) / (2 * speed.TEXT_TOKENS * (4 * 64 * 64 + 3 * 64 * 128))
    assert speed.text_seconds(config, device=CPU, dtype=torch.float32) == pytest.approx(2 * layers)
    assert layers > 10000, "attention is counted, too"


def test_an_estimate_of_the_bundled_model(hasty: None) -> None:
    networks = open_networks("tiny")
    d = networks.defaults
    settings = SampleSettings(d.width, d.height, d.num_frames, d.num_steps, d.guidance_scale)
    found = estimate_run(networks, settings, Machine(CPU, None, sdpa))
    assert [stage.name for stage in found.stages] == ["reading the prompt", "sampling", "decoding"]
    assert found.tokens == 144
    assert found.evaluations == 2 * d.num_steps
    assert all(stage.seconds > 0 and stage.working_bytes > 0 for stage in found.stages)
    assert found.stages[1].seconds == pytest.approx(found.step_seconds * d.num_steps)


def known_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is measured."""
    monkeypatch.setattr(estimating, "text_seconds", lambda *args, **named: 1.0)
    monkeypatch.setattr(estimating, "evaluation_seconds", lambda *args, **named: EvaluationSeconds(1.0, 1.0))
    monkeypatch.setattr(estimating, "decode_seconds", lambda *args, **named: 1.0)


def test_networks_that_do_not_fit_are_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As by the pipeline; the device is of no kind that could be measured here."""
    networks, device = open_networks("tiny"), torch.device("cuda")
    settings = SampleSettings(96, 64, 24, 20, 7.5)
    known_seconds(monkeypatch)
    monkeypatch.setattr(estimating, "both_prompts_fit", lambda *args: True)
    monkeypatch.setattr("allegro_model.vae.batching.total_bytes", lambda device: 2**34)
    found = []
    for free, offload in ((2**40, "auto"), (0, "auto"), (2**40, "stream"), (0, "none")):
        monkeypatch.setattr("allegro_model.pipeline.free_bytes", lambda device, free=free: free)
        found.append(estimate_run(networks, settings, Machine(device, torch.float32, offload=offload)).stages[:2])
    assert [[stage.streamed for stage in stages] for stages in found] == [[False] * 2, [True] * 2, [True] * 2, [False] * 2]
    assert found[1] == found[2]
    assert found[0] == found[3]
    pipeline = AllegroPipeline.from_pretrained("tiny")
    encoder, dit = pipeline.load_text_encoder(), pipeline.dit
    assert [stage.weights_bytes for stage in found[1]] == [
        streamed_bytes(encoder.model, encoder.layers, torch.float32), streamed_bytes(dit, layers_of_dit(dit), torch.float32)]
    assert found[0][1].weights_bytes == whole_bytes(dit, torch.device("meta"), torch.float32)


def test_large_weights_of_another_type_are_converted_layer_by_layer_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As by the pipeline: then the transformer as a whole is not in memory while decoding, either."""
    monkeypatch.setattr("allegro_model.pipeline.SMALL_MODEL_PARAMETERS", 1)
    known_seconds(monkeypatch)
    networks, settings = open_networks("tiny"), SampleSettings(96, 64, 4, 1, 1.0)
    mapped, converted = (estimate_run(networks, settings, Machine(CPU, dtype)).stages for dtype in (networks.dit_stored, torch.float32))
    assert (mapped[1].streamed, converted[1].streamed) == (False, True)
    assert mapped[2].weights_bytes == networks.vae_parameters * 4 + mapped[1].weights_bytes
    assert converted[2].weights_bytes == networks.vae_parameters * 4


# A guess before the first step


def seconds_each(monkeypatch: pytest.MonkeyPatch, seconds: float) -> list[int]:
    """A machine of this many seconds per operation -> the list that its measurements are counted in."""
    calls: list[int] = []
    monkeypatch.setattr(quick, "_seconds_each", lambda *args: (calls.append(1), seconds)[1])
    monkeypatch.setattr(quick, "attention_seconds", lambda config, shape, **named: seconds * dit_flops(config, shape, 1).self_attention)
    return calls


def test_nothing_is_measured_for_a_short_run(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = seconds_each(monkeypatch, 1.0)
    assert quick.foretell(open_networks("tiny"), SampleSettings(96, 64, 24, 20, 7.5), Machine(CPU, torch.float32), 20) is None
    assert calls == []
    seconds_each(monkeypatch, 1e-18)
    assert quick.foretell(open_networks("88x720P"), SampleSettings(1280, 720, 88, 100, 7.5), Machine(CPU, torch.float32), 100) is None


def test_a_guess_at_a_long_run(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds_each(monkeypatch, 1e-12)
    networks, settings = open_networks("88x720P"), SampleSettings(1280, 720, 88, 100, 7.5)
    found = [quick.foretell(networks, settings, Machine(CPU, torch.float32), steps) for steps in (100, 25)]
    assert found[0] is not None
    assert found[1] == pytest.approx((found[0][0] / 4, found[0][1]))
    operations = 200 * dit_flops(networks.dit, latent_shape(1280, 720, 88), 128).total
    assert 1 < found[0][0] / (operations * 1e-12) < 1.3
    assert found[0][1] > 100
    patient = replace(networks, calibration=replace(caching.BUNDLED, levels={"fast": caching.CacheLevel(99.0)}))
    cached = quick.foretell(patient, replace(settings, cache="fast"), Machine(CPU, torch.float32), 100)
    assert cached is not None
    assert cached[0] == pytest.approx(found[0][0] / 100)


def test_generate_says_it_before_the_first_step(allegro: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("generate", "a red circle", "--output", "a.mp4", "--force", "--frames", 4, "--width", 32, "--height", 32, "--steps", 2)
    assert "of decoding" not in allegro(*words)[2]
    monkeypatch.setattr(generating, "foretell", lambda networks, settings, machine, steps: (360.0 * steps, 61.0))
    _, _, err = allegro(*words)
    assert "About 12 min for 2 steps, then about 61 s of decoding.\nSampling ..." in err


@pytest.mark.parametrize(("device", "streamed", "said"), [("cuda", True, "2 steps (longer if it has to wait for the weights, "),
                                                          ("cuda", False, "2 steps, then"), ("cpu", True, "2 steps, then")])
def test_generate_says_that_streamed_weights_may_take_longer(monkeypatch: pytest.MonkeyPatch, device: str, streamed: bool, said: str) -> None:
    monkeypatch.setattr(generating, "foretell", lambda networks, settings, machine, steps: (360.0 * steps, 61.0))
    pipeline = SimpleNamespace(root=Path("x"), dit_config=None, vae_config=None, defaults=None, device=torch.device(device), dit_dtype=None,
                               tiling=None, kernel=lambda *_: SimpleNamespace(run=None), streams=lambda _: streamed)
    plan = SimpleNamespace(pipeline=pipeline, settings=SimpleNamespace(num_steps=2, cache="off"), stop=None)
    lines: list[str] = []
    job = SimpleNamespace(console=SimpleNamespace(quiet=False, say=lines.append))
    generating._foretell(job, plan, SimpleNamespace(step=0, attention=""))  # type: ignore[arg-type]
    assert said in lines[0]


@pytest.mark.parametrize(("seconds", "text"), [
    (0.2, "1 s"), (99, "99 s"), (140, "2 min"), (720, "12 min"), (5990, "100 min"), (9000, "2.5 h"), (111_600, "31 h"),
])
def test_a_guess_is_said_roughly(seconds: float, text: str) -> None:
    assert roughly(seconds) == text


# The commands


def test_estimate_command(allegro: Run, hasty: None) -> None:
    code, out, _ = allegro("estimate", "--model", "tiny", "--steps", 7, "--cfg", 1, "--interpolate", 2, "--offload", "stream",
                           "--json", "a.json")
    assert code == 0
    assert "of weights, streamed)" in out
    assert "tiny: 24 frames of 96x64, 7 steps, cfg 1, step cache off\n" in out
    assert "144 tokens" in out
    assert "; 7 evaluations" in out
    for stage in ("reading the prompt", "sampling", "decoding", "interpolating", "in all"):
        assert f"\n{stage}" in out
    report = json.loads(Path("a.json").read_text())
    assert report["estimate"]["evaluations"] == 7
    assert report["estimate"]["seconds"] == pytest.approx(sum(s["seconds"] for s in report["estimate"]["stages"]))
    assert report["hardware"]["cores"] == os.cpu_count()
    short = ("estimate", "--model", "tiny", "--steps", 1, "--frames", 4, "--json", "a.json")
    code, _, err = allegro(*short)
    assert (code, "--force" in err) == (5, True)
    assert allegro(*short, "--force")[0] == 0


def test_estimates_know_the_calibration_of_a_model(allegro: Run, hasty: None, tmp_path: Path) -> None:
    """What `calibrate` has left beside the weights is what a run will use."""
    shutil.copytree(bundled_model("tiny"), tmp_path / "own")
    patient = replace(caching.BUNDLED, levels={"fast": caching.CacheLevel(99.0)})
    (tmp_path / "own" / "transformer" / "cache.json").write_text(json.dumps(patient.to_dict()), encoding="utf-8")
    words = ("--steps", 20, "--cache", "fast", "--frames", 4)
    evaluations = [re.search(r"; (\d+) evaluations", allegro("estimate", "--model", model, *words)[1])[1]  # type: ignore[index]
                   for model in ("tiny", tmp_path / "own")]
    assert evaluations[1] == "2" != evaluations[0]


@pytest.mark.parametrize(("words", "code", "message"), [
    (("--frames", 7), 3, "num_frames=7"), (("--model", "nowhere"), 4, "88x720P"), (("--device", "nothing"), 3, "Use auto"),
    (("--model", "tiny", "--interpolate", 65), 3, "from 2 to 64"), (("--model", "tiny", "--interpolate", 1), 3, "from 2 to 64"),
])
def test_estimate_refuses(allegro: Run, words: tuple[object, ...], code: int, message: str) -> None:
    found, out, err = allegro("estimate", *words)
    assert (found, out) == (code, "")
    assert message in err


def test_every_released_size_is_offered(allegro: Run) -> None:
    _, out, _ = allegro("estimate", "--help")
    assert all(name in out for name in PRESETS)


def test_bench_command(allegro: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "tiles_at_once", lambda *args, **named: 2)  # as on a GPU
    code, out, _ = allegro("bench", "--model", "tiny", "--size", "4x32x32", "--rounds", 1, "--dtype", "fp32", "--profile",
                           "--only", "dit", "--only", "offload", "--only", "quantised", "--only", "decode", "--only", "load", "--only", "text", "--json", "a.json")
    assert code == 0
    report = json.loads(Path("a.json").read_text())
    rows = report["rows"]
    assert {row["section"] for row in rows} == {"dit", "offload", "quantised", "decode", "load", "text"}
    for row in rows:
        assert row["median"] > 0
        assert len(row["seconds"]) == 1
        assert f"| {row['section']} | {row['name']} |" in out
    dit = [row for row in rows if row["section"] == "dit"]
    assert [row["name"] for row in dit] == ["float32, sdpa", "float32, sdpa-math", "float32, sdpa, both prompts at once"]
    for row in dit:
        assert row["ratio"] == pytest.approx(row["median"] / dit[0]["median"])
    works = [row["flops_per_second"] * row["median"] for row in dit]
    assert works == pytest.approx([works[0], works[0], 2 * works[0]])
    names = {kind: [row["name"] for row in rows if row["section"] == kind] for kind in ("offload", "quantised")}
    assert names["offload"] == ["float32, none", "float32, stream"]
    plain, *packed = names["quantised"]
    assert packed == [f"{plain}, weights in {kind}" for kind in ("fp8", "int8", "gguf-q8_0")]
    one, two = (row for row in rows if row["section"] == "decode")
    assert two["name"] == f"2 tiles{one['name'].removeprefix('tile')}"
    assert two["flops_per_second"] * two["median"] == pytest.approx(2 * one["flops_per_second"] * one["median"])
    assert sum(report["profile"].values()) == pytest.approx(1)
    assert report["profile"]["matmul"] > 0.05


def test_peak_and_interpolation_rows(allegro: Run) -> None:
    code, out, _ = allegro("bench", "--model", "tiny", "--size", "4x32x32", "--rounds", 1, "--only", "peak", "--only", "interpolate")
    assert code == 0
    assert "| peak | matrix product, float32 |" in out
    assert "| interpolate | pair of 32x32, ours_small_t, float32 |" in out


def test_bench_refuses_layers_that_the_model_lacks(allegro: Run) -> None:
    code, out, err = allegro("bench", "--model", "tiny", "--layers", 6)
    assert (code, out) == (2, "")
    assert "expected 1 to 5 layers" in err
