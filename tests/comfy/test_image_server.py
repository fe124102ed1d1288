"""The image-to-video graphs in a real ComfyUI server."""

import io
from typing import Any

import numpy as np
import pytest
from comfy.client import PACK, PromptRefused, Server
from comfy.test_server import ASSETS, IMAGE_WORKFLOWS, api, clip_of, dropdown, with_model
from PIL import Image

from allegro_model.loading import load_sampling_defaults
from allegro_model.training.analyse import compare

pytestmark = pytest.mark.comfy

TI2V_ASSETS = PACK / "allegro_model" / "assets" / "tiny-ti2v"
needs_the_model = pytest.mark.skipif(not TI2V_ASSETS.is_dir(), reason="this copy has no bundled image-to-video model")
KEPT = 8  # frames of a clip that its continuation begins with


@pytest.mark.parametrize("name", IMAGE_WORKFLOWS)
def test_image_workflow_runs_twice_with_the_same_result(server: Server, name: str) -> None:
    graph = with_model(api(name), "tiny-random", width=64, height=48, length=16, steps=2)
    first, video, _ = clip_of(server, graph)
    assert first.shape == video.shape == (32 if name == "continue_video" else 16, 48, 64, 3)
    assert first.std() > 2, "the clip is one grey"
    server.forget()
    runs = server.log.count("Allegro VAE encode: ")
    second, _, _ = clip_of(server, graph)
    assert server.log.count("Allegro VAE encode: ") > runs, "the second run took the first one's result"
    assert np.array_equal(first, second)


def bundled(server: Server, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Frames of the graph as shipped, and of the clip that its pictures come from."""
    graph = api(name)
    source = next(key for key, node in graph.items() if node["class_type"] == "AllegroVideoVAEDecode")
    graph["source"] = {"class_type": "SaveImage", "inputs": {"images": [source, 0], "filename_prefix": "source"}}
    (images,) = [node["inputs"]["images"] for node in graph.values() if node["class_type"] == "CreateVideo"]
    graph["exact"] = {"class_type": "SaveImage", "inputs": {"images": images, "filename_prefix": "exact"}}
    outputs = server.run(graph)
    frames, pictures = (np.stack([np.asarray(Image.open(io.BytesIO(server.view(e)))) for e in outputs[key]["images"]])
                        for key in ("exact", "source"))
    return frames, pictures


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(-10 * np.log10(((a.astype(float) - b) ** 2).mean() / 255**2))


@needs_the_model
@pytest.mark.parametrize(("name", "given", "direction"), [
    ("image_to_video", {0: 12}, "down"),
    ("first_last_frame", {0: 20, -1: 4}, "left"),
    ("keyframes", {0: 2, 12: 12, -1: 22}, "right"),
])
def test_given_pictures_appear_and_the_prompt_moves_them(server: Server, name: str, given: dict[int, int], direction: str) -> None:
    frames, pictures = bundled(server, name)
    assert frames.shape == (24, 64, 96, 3)
    for position, picture in given.items():
        assert psnr(frames[position], pictures[picture]) > 20, position  # 13 for the frame of another moment
    found = compare(frames, {"kind": "shape", "background": "blue", "object": "red", "direction": direction})
    assert all(found.values()), found


@needs_the_model
def test_a_clip_is_continued_twice_without_a_seam(server: Server) -> None:
    frames, first = bundled(server, "continue_video")
    assert len(first) == 24
    assert frames.shape == (2 * (24 - KEPT) + 24, 64, 96, 3)
    assert np.abs(frames[: 24 - KEPT].astype(int) - first[: 24 - KEPT]).max() <= 1, "the first clip keeps its frames"
    means = frames.astype(float).mean((1, 2))  # [T, 3]
    changes = np.abs(np.diff(means, axis=0)).max(axis=1)
    moves = np.abs(np.diff(frames.astype(float), axis=0)).mean((1, 2, 3))
    for join in (24 - KEPT, 2 * (24 - KEPT)):
        overlap = slice(join - 1, join + KEPT)  # from the last frame before to the first one after
        assert changes[overlap].max() < 2, (join, changes[overlap])  # of 255; 0.5 is usual inside a clip
        assert moves[overlap].min() > 0.05 * np.median(moves), "a frame is repeated"
    assert all(compare(frames, {"kind": "clouds", "sky": "blue", "direction": "left"}).values())


@needs_the_model
def test_the_bundled_model_is_listed_second(server: Server) -> None:
    assert dropdown(server, "LoadAllegroDiT", "model_name")[1] == "allegro-tiny-ti2v (bundled)"
    assert load_sampling_defaults(TI2V_ASSETS).num_frames == load_sampling_defaults(ASSETS).num_frames


@pytest.mark.parametrize(("name", "changes", "words"), [
    ("image_to_video", {"length": 4}, "length=4: image to video needs at least 8 frames"),
    ("image_to_video", {"width": 100}, "width=100: must be a multiple of 16"),
    ("image_to_video", {"fit": "zoom"}, "fit='zoom': must be one of crop, pad, stretch"),
    ("keyframes", {"positions": "0, x, -1"}, "'x' is not a whole number"),
    ("keyframes", {"positions": "0, 23, -1"}, "frame 23 is given twice"),
    ("keyframes", {"positions": "0, 24, 5"}, "position 24: the clip has 24 frames"),
    ("continue_video", {"keep_frames": 24}, "keep_frames=24: must be at least 1 and less than length, 24"),
    ("continue_video", {"direction": "up"}, "direction='up': must be one of append, prepend"),
    ("continue_video", {"match_colors": "on"}, "match_colors='on': must be one of"),
])
def test_bad_value_is_refused_before_weights_load(server: Server, name: str, changes: dict[str, Any], words: str) -> None:
    server.forget()
    before = len(server.log)
    graph = {key: node for key, node in with_model(api(name), "tiny-random", **changes).items()
             if node["class_type"] != "PreviewImage"}  # its branch is sound, and ComfyUI would run that alone
    with pytest.raises(PromptRefused) as refused:
        server.submit(graph)
    assert words in refused.value.details
    assert "Loaded" not in server.log[before:]
