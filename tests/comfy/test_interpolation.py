"""Frame interpolation in a real ComfyUI server: the workflows, an uploaded video with its sound, cancelling."""

import io
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from comfy.client import PromptRefused, Server, error_of
from comfy.test_server import api, dropdown, with_model
from PIL import Image

from allegro_model.loading import bundled_interpolator
from allegro_model.media.readers import ClipContents, probe_clip, probe_contents

pytestmark = pytest.mark.comfy
pytest.importorskip("imageio_ffmpeg", reason="imageio-ffmpeg is not installed (extra: standalone)")

BUNDLED = "allegro-tiny-vfi (bundled)"


def graph_of(name: str, *, interpolator: str = "random_t.safetensors", **changes: Any) -> dict[str, Any]:
    """A workflow with small random models."""
    graph = with_model(api(name), "tiny-random", **changes)
    (loader,) = [node for node in graph.values() if node["class_type"] == "LoadAllegroFrameInterpolator"]
    loader["inputs"] = {"model_name": interpolator, "dtype": "fp32"}
    return graph


def node_of(graph: dict[str, Any], kind: str) -> str:
    (key,) = [key for key, node in graph.items() if node["class_type"] == kind]
    return key


def results(server: Server, graph: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, ClipContents, float]:
    """The frames before and after interpolation, exact [T, H, W, 3], and contents and seconds of the saved video."""
    key = node_of(graph, "AllegroFrameInterpolate")
    watched = {"before": graph[key]["inputs"]["images"], "after": [key, 0]}
    extra = {name: {"class_type": "SaveImage", "inputs": {"images": link, "filename_prefix": name}}
             for name, link in watched.items()}
    outputs = server.run({**graph, **extra})
    before, after = (np.stack([np.asarray(Image.open(io.BytesIO(server.view(e)))) for e in outputs[name]["images"]])
                     for name in watched)
    (entry,) = [e for node in outputs.values() for e in node.get("images", []) if e["filename"].endswith(".mp4")]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "clip.mp4"
        file.write_bytes(server.view(entry))
        return before, after, probe_contents(file), probe_clip(file).fps


def test_text_to_video_with_twice_the_frames(server: Server) -> None:
    graph = graph_of("text_to_video_30fps", width=64, height=48, length=16, steps=3)
    before, after, _, fps = results(server, graph)
    assert len(before) == 16
    assert after.shape == (32, 48, 64, 3)
    assert np.array_equal(after[::2], before)
    assert fps == 16.0
    server.forget()
    runs = server.log.count("Allegro frame interpolation: ")
    _, again, _, _ = results(server, graph)
    assert server.log.count("Allegro frame interpolation: ") == runs + 1, "the second run took the first one's result"
    assert np.array_equal(after, again)


def test_uploaded_video_keeps_its_sound_and_its_duration(server: Server, video: str) -> None:
    graph = graph_of("interpolate_video", file=video, scene_threshold=0.0)
    before, after, contents, fps = results(server, graph)
    assert len(before) == 12
    assert len(after) == 24
    assert np.array_equal(after[::2], before)
    assert fps == 25.0
    assert contents.audio == "aac"
    graph[node_of(graph, "AllegroFrameInterpolate")]["inputs"] |= {"target_fps": 30.0, "hold_last": False}
    _, after, contents, fps = results(server, graph)
    assert len(after) == 27  # floor(11 x 30 / 12.5) + 1
    assert fps == 30.0
    assert contents.audio == "aac"


def test_the_bundled_interpolator_runs_as_shipped(server: Server, video: str) -> None:
    try:
        bundled_interpolator()
    except Exception as error:  # noqa: BLE001 (whatever the reason, this copy has none)
        pytest.skip(str(error))
    assert dropdown(server, "LoadAllegroFrameInterpolator", "model_name")[0] == BUNDLED
    graph = api("interpolate_video")
    graph[node_of(graph, "LoadVideo")]["inputs"]["file"] = video
    before, after, _, _ = results(server, graph)
    assert len(after) == 2 * len(before)
    before, after, _, fps = results(server, api("text_to_video_30fps"))
    assert after.shape == (48, 64, 96, 3)
    assert np.array_equal(after[::2], before)
    assert fps == 16.0


def test_cancelling_an_interpolation(server: Server, video: str) -> None:
    graph = graph_of("interpolate_video", file=video, multiplier=64, tta=True, scene_threshold=0.0)
    done = server.log.count("Allegro frame interpolation: ")
    prompt_id = server.submit(graph)
    loaded = server.log.count("Requested to load ComfyEMAVFI")
    end = time.monotonic() + 60
    while server.log.count("Requested to load ComfyEMAVFI") == loaded and time.monotonic() < end:
        time.sleep(0.1)
    start = time.monotonic()
    server.fetch("/interrupt", {})
    entry = server.wait(prompt_id, timeout=30)
    assert time.monotonic() - start < 5
    assert error_of(entry) == "interrupted"
    assert server.log.count("Allegro frame interpolation: ") == done, "it was finished before it was cancelled"


@pytest.mark.parametrize(("changes", "words"), [
    ({"multiplier": 1}, "multiplier"),
    ({"multiplier": 65}, "multiplier"),
    ({"target_fps": -1.0}, "target_fps"),
    ({"target_fps": 1000.0, "source_fps": 0.5}, "target_fps=1000: at most 64 times the source's 0.5"),
    ({"source_fps": float("nan")}, "source_fps=nan: must be from"),
    ({"scene_threshold": 1.5}, "scene_threshold"),
    ({"flow_scale": "2"}, "flow_scale"),
    ({"dtype": "fp8"}, "dtype"),
], ids=lambda value: "-".join(value) if isinstance(value, dict) else "")
def test_bad_values_are_refused_before_weights_load(server: Server, changes: dict[str, Any], words: str) -> None:
    graph = graph_of("text_to_video_30fps")
    for node in graph.values():
        node["inputs"] |= {name: value for name, value in changes.items() if name in node["inputs"]}
    if "dtype" in changes:
        graph[node_of(graph, "LoadAllegroVAE")]["inputs"]["dtype"] = "default"
    before = len(server.log)
    with pytest.raises(PromptRefused) as refused:
        server.submit(graph)
    assert words in refused.value.details
    assert "Loaded" not in server.log[before:]


@pytest.mark.parametrize(("name", "words"), [
    ("ours.pkl", "python -m allegro_model convert-vfi"),
    ("is_something_else.safetensors", "expected an EMA-VFI frame interpolator"),
    ("incomplete_t.safetensors", "unet.up3"),
    ("truncated_t.safetensors", "is truncated"),
])
def test_wrong_interpolator_is_refused_with_a_sentence(server: Server, video: str, name: str, words: str) -> None:
    entry = server.wait(server.submit(graph_of("interpolate_video", interpolator=name, file=video)))
    assert words in error_of(entry)
