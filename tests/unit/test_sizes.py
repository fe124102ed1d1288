"""The trained sizes and estimates that the browser gets, and the script that computes with them, against Python's own."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from allegro_model.config import DIT_88X720P, PRESETS, DiTConfig
from allegro_model.costs import dit_flops
from allegro_model.geometry import estimate_sampling_bytes, frames_bytes, latent_shape, token_count
from allegro_model.loading import bundled_model, load_sampling_defaults
from allegro_model.loading.files import read_json
from allegro_model.loading.sizes import trained_sizes

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "web" / "js" / "estimate.js"
SIZES = [(1280, 720, 88), (640, 368, 40), (96, 64, 24), (720, 1280, 4), (16, 16, 8), (1920, 1088, 128)]


def run(expression: str, **values: Any) -> Any:
    """An expression of the script's functions, computed by node."""
    code = SCRIPT.read_text(encoding="utf-8").replace("export function", "function")
    names = "".join(f"const {name} = {json.dumps(value)}\n" for name, value in values.items())
    return json.loads(by_node(f"{code}\n{names}\nconsole.log(JSON.stringify({expression}))"))


def by_node(code: str) -> str:
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed")
    done = subprocess.run([node, "-"], input=code, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def models() -> list[tuple[str, DiTConfig, int]]:
    """Name, transformer, bytes per number."""
    tiny = DiTConfig.from_dict(read_json(bundled_model("tiny") / "transformer" / "config.json"))
    return [("released", DIT_88X720P, 2), ("bundled", tiny, 4)]


def test_the_sizes_are_those_of_the_models() -> None:
    found = [(s["width"], s["height"], s["length"], s["model"]) for s in trained_sizes()["sizes"]]
    released = [(p.sampling.width, p.sampling.height, p.sampling.num_frames, "released") for p in PRESETS.values()]
    own = load_sampling_defaults(bundled_model("tiny"))
    assert found == [*released, (own.width, own.height, own.num_frames, "bundled")]
    of_images = [(s["width"], s["height"], s["length"]) for s in trained_sizes(image_to_video=True)["sizes"]]
    assert of_images == [(1280, 720, 88), (96, 64, 24)]


def test_the_script_computes_what_python_computes() -> None:
    facts = trained_sizes()
    for model, config, dtype_bytes in models():
        found = run("""sizes.map(([width, height, length]) => { const n = tokensOf(facts, {width, height, length})
            return [n, at(facts.models[model].bytes, n), at(facts.models[model].flops, n), framesBytes({width, height, length})] })""",
                    sizes=SIZES, facts=facts, model=model)
        for size, (tokens, memory, flops, frames) in zip(SIZES, found, strict=True):
            shape = latent_shape(*size)
            assert tokens == token_count(shape)
            assert memory == estimate_sampling_bytes(config, shape, batch=1, dtype_bytes=dtype_bytes)
            assert flops == pytest.approx(dit_flops(config, shape, load_text_length(model)).total, rel=1e-12)
            assert frames == frames_bytes(*size)


def load_text_length(model: str) -> int:
    return PRESETS["88x720P"].sampling.text_length if model == "released" else load_sampling_defaults(
        bundled_model("tiny")).text_length


def test_the_time_of_a_step_follows_its_arithmetic() -> None:
    facts, size = trained_sizes(), {"width": 1280, "height": 720, "length": 88, "batch": 2}
    run_of = {"tokens": token_count(latent_shape(640, 368, 40)), "batch": 1, "steps": 100, "secondsPerStep": 3}
    expected = 3 * 2 * (dit_flops(DIT_88X720P, latent_shape(1280, 720, 88), 512).total
                        / dit_flops(DIT_88X720P, latent_shape(640, 368, 40), 512).total)
    step = 'secondsPerStep(facts, "released", size, lastRun) ?? null'
    assert run(step, facts=facts, size=size, lastRun=run_of) == pytest.approx(expected)
    assert run(step, facts=facts, size=size, lastRun={**run_of, "tokens": 144}) is None, "too far from what was measured"


PROMPT = {
    "1": {"class_type": "LoadAllegroDiT", "inputs": {"model_name": "a.safetensors"}},
    "2": {"class_type": "Size", "inputs": {"width": 96, "height": 64, "length": 24, "batch_size": 1}},
    "3": {"class_type": "AllegroSampler", "inputs": {"model": ["1", 0], "latent_image": ["2", 0], "steps": 3}},
    "4": {"class_type": "Size", "inputs": {"width": 32, "height": 32, "length": 8, "batch_size": 2, "images": ["3", 0]}},
    "5": {"class_type": "KSampler", "inputs": {"model": ["1", 0], "latent_image": ["4", 2]}},
    "6": {"class_type": "AllegroVideoVAEDecode", "inputs": {"samples": ["5", 0]}},
    "7": {"class_type": "KSampler", "inputs": {"model": ["1", 0], "latent_image": ["8", 0]}},
    "8": {"class_type": "Size", "inputs": {"width": ["9", 0], "height": 32, "length": 8, "batch_size": 2}},
}


@pytest.mark.parametrize(("node", "width"), [("3", 96), ("5", 32), ("6", None), ("7", None)])
def test_what_a_sampler_worked_on_is_read_from_its_prompt(node: str, width: int | None) -> None:
    """The nearest size counts; decoding is no sampling; a size that another node computes is not known."""
    found = run('sampled(prompt, id, node => node.class_type === "Size") ?? null', prompt=PROMPT, id=node)
    assert found is None if width is None else (found["width"], found["name"]) == (width, "a.safetensors")


def test_steps_are_timed_from_the_first_to_the_last() -> None:
    """Before the first comes loading; a second run of the same node begins anew."""
    times = [[1, 10.0], [2, 12.0], [3, 14.0], [1, 50.0], [2, 51.0]]
    found = run("(watch => times.map(([step, now]) => watch(step, now) ?? null))(stopwatch())", times=times)
    assert found == [None, 2.0, 2.0, None, 1.0]


def test_every_text_is_there_in_both_languages() -> None:
    texts = [json.loads((ROOT / "locales" / language / "main.json").read_text(encoding="utf-8"))["allegroSizes"]
             for language in ("en", "zh")]
    used = re.findall(r'\btext\("(\w+)"', (ROOT / "web" / "js" / "sizes.js").read_text(encoding="utf-8"))
    # Those named after a model.
    used += [model + suffix for model in trained_sizes()["models"] for suffix in ("", "Untrained")]
    for found in texts:
        assert set(found) == set(used)
        for name in used:
            assert sorted(re.findall(r"\{\w+\}", found[name])) == sorted(re.findall(r"\{\w+\}", texts[0][name])), name


@pytest.mark.parametrize("answer", ["Promise.reject(new Error('away'))", "Promise.resolve({ json: () => ({}) })"])
def test_a_server_that_does_not_answer_costs_the_time_only(answer: str) -> None:
    """Node ends with an error when a rejection is handled by nobody."""
    code = re.sub(r"^import .*$", "", (ROOT / "web" / "js" / "sizes.js").read_text(encoding="utf-8"), flags=re.MULTILINE)
    before = (f"const heard = {{}}, app = {{ registerExtension() {{}} }}, stopwatch = () => () => 1\n"
              f"const api = {{ addEventListener: (name, listener) => {{ heard[name] = listener }}, fetchApi: () => {answer} }}\n")
    run_it = """watchRuns(() => true, () => ({}))
        heard.execution_start({ detail: { prompt_id: "a" } })
        setTimeout(() => { heard.progress({ detail: { node: "1", value: 2, max: 2 } }); console.log("went on") }, 10)"""
    assert by_node(before + code + run_it) == "went on\n"
