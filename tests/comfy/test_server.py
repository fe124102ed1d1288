"""The extension in a real ComfyUI server, used as a browser or a script would."""

import io
import json
import re
import struct
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from comfy.client import PACK, PromptRefused, Server, error_of
from PIL import Image

from allegro_model.client.websocket import WebSocket
from allegro_model.loading import load_sampling_defaults
from allegro_model.media import read_frames
from allegro_model.training.analyse import compare

pytestmark = pytest.mark.comfy

IMAGE_WORKFLOWS = ("image_to_video", "first_last_frame", "keyframes", "continue_video")  # in test_image_server.py
# Those that interpolate frames: test_interpolation.py; all of them, storyboards too, and those of earlier versions: test_workflows.py.
API_WORKFLOWS = [path for path in sorted((PACK / "workflows" / "api").glob("*.json")) if path.stem[3:] not in IMAGE_WORKFLOWS
                 and not re.search("AllegroFrameInterpolate|AllegroVideoVAEEncode|AllegroStoryboard", path.read_text(encoding="utf-8"))]
BUNDLED = "allegro-tiny (bundled)"
ASSETS = PACK / "allegro_model" / "assets" / "tiny"
TINY_PROMPT = "a red circle moves right over a blue background"

CLIP_SIZE = ["width", "height", "length", "batch_size"]
GIVEN = ["CONDITIONING", "CONDITIONING", "LATENT"]
# id -> required inputs in the order of the widgets, outputs. Frozen: saved workflows store values by position.
NODES = {
    "LoadAllegroDiT": (["model_name", "weight_dtype"], ["MODEL"]),
    "LoadAllegroT5": (["clip_name", "device"], ["CLIP"]),
    "LoadAllegroVAE": (["vae_name", "dtype"], ["VAE"]),
    "AllegroLoraLoader": (["model", "lora_name", "strength_model"], ["MODEL"]),
    "AllegroT5Encode": (["clip", "text", "role", "clean_caption", "prompt_weighting"], ["CONDITIONING"]),
    "AllegroStoryboard": (["storyboard", "clip"], ["STRING", "STRING", "INT"]),
    "EmptyAllegroLatentVideo": (CLIP_SIZE, ["LATENT"]),
    "AllegroImageToVideo": (["positive", "negative", "vae", *CLIP_SIZE, "fit"], GIVEN),
    "AllegroKeyframes": (["positive", "negative", "vae", "images", "positions", *CLIP_SIZE, "fit"], GIVEN),
    "AllegroContinueVideo": (["positive", "negative", "vae", "images", "keep_frames", "direction", *CLIP_SIZE, "fit"], GIVEN),
    "AllegroJoinVideos": (["first", "second", "overlap", "match_colors"], ["IMAGE"]),
    "AllegroScheduler": (["steps", "denoise"], ["SIGMAS"]),
    "AllegroSampler": (["model", "positive", "negative", "latent_image", "seed", "steps", "cfg", "denoise",
                        "noise_source"], ["LATENT"]),
    "AllegroCache": (["model", "level"], ["MODEL"]),
    "AllegroAttention": (["model", "attention"], ["MODEL"]),
    "AllegroCompile": (["model"], ["MODEL"]),
    "AllegroVideoVAEEncode": (["pixels", "vae", "tile_size", "overlap", "temporal_size", "temporal_overlap"], ["LATENT"]),
    "AllegroVideoVAEDecode": (["samples", "vae", "tile_size", "overlap", "temporal_size", "temporal_overlap"], ["IMAGE"]),
    "LoadAllegroFrameInterpolator": (["model_name", "dtype"], ["INTERP_MODEL"]),
    "AllegroFrameInterpolate": (["interp_model", "images", "multiplier", "source_fps", "target_fps", "hold_last",
                                 "scene_threshold", "flow_scale", "tta"], ["IMAGE", "FLOAT"]),
    "AllegroReport": (["after"], ["*", "STRING", "IMAGE"]),
    "AllegroDownload": (["model", "text_encoder", "download"], ["STRING"]),
}
OPTIONAL = {
    "AllegroT5Encode": ["disk_cache"],
    "AllegroImageToVideo": ["start_image", "end_image"],
    "AllegroKeyframes": ["images_2", "images_3", "images_4"],
    "AllegroContinueVideo": ["samples"],
}
CATEGORIES = {
    "LoadAllegroDiT": "loaders", "LoadAllegroT5": "loaders", "LoadAllegroVAE": "loaders", "AllegroLoraLoader": "loaders",
    "AllegroT5Encode": "conditioning", "AllegroStoryboard": "conditioning", "AllegroReport": "utils", "EmptyAllegroLatentVideo": "latent", "AllegroScheduler": "sampling",
    "AllegroImageToVideo": "conditioning", "AllegroKeyframes": "conditioning", "AllegroContinueVideo": "conditioning",
    "AllegroJoinVideos": "video",
    "AllegroSampler": "sampling", "AllegroCache": "sampling", "AllegroAttention": "optimization",
    "AllegroCompile": "optimization", "AllegroVideoVAEEncode": "vae", "AllegroVideoVAEDecode": "vae",
    "LoadAllegroFrameInterpolator": "loaders", "AllegroFrameInterpolate": "video",
    "AllegroDownload": "loaders",
}


def with_model(graph: dict[str, Any], model: str, **changes: Any) -> dict[str, Any]:
    """A copy of a graph whose loaders take a small model, with other values for widgets of these names."""
    names = {"model_name": "transformer", "clip_name": "text_encoder", "vae_name": "vae"}
    graph = json.loads(json.dumps(graph))
    for node in graph.values():
        if node["class_type"] in ("ImageFromBatch", "LoadAllegroFrameInterpolator"):
            continue  # its length is no clip's, its model no transformer
        for name in node["inputs"]:
            if "ti2v" in str(node["inputs"][name]):
                node["inputs"][name] = node["inputs"][name] if model == BUNDLED else f"{model}-ti2v/transformer"
            elif name in names:
                node["inputs"][name] = model if model == BUNDLED else f"{model}/{names[name]}"
            elif name == "lora_name" and model != BUNDLED:
                node["inputs"][name] = "style.safetensors"  # the bundled one does not fit
            elif name in changes and not isinstance(node["inputs"][name], list):
                node["inputs"][name] = changes[name]
    return graph


def api(name: str) -> dict[str, Any]:
    """The API form of a workflow, named without its number."""
    (path,) = (PACK / "workflows" / "api").glob(f"[0-9][0-9]_{name}.json")
    return json.loads(path.read_text(encoding="utf-8"))


def small(**changes: Any) -> dict[str, Any]:
    """The tiny workflow with random weights, 4 steps."""
    return with_model(api("text_to_video_tiny"), "tiny-random", **{"steps": 4, **changes})


def clip_of(server: Server, graph: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, bytes]:
    """Runs a graph and gives its frames [T, H, W, 3]: exact, as PNG, then out of the video, and the video file.

    ComfyUI's encoder is not deterministic (about one file in ten differs for the same frames), so only the
    first may be compared exactly.
    """
    (images,) = [node["inputs"]["images"] for node in graph.values() if node["class_type"] == "CreateVideo"]
    extra = {"class_type": "SaveImage", "inputs": {"images": images, "filename_prefix": "exact"}}
    outputs = server.run({**graph, "exact": extra})
    exact = np.stack([np.asarray(Image.open(io.BytesIO(server.view(e)))) for e in outputs["exact"]["images"]])
    (entry,) = [e for node in outputs.values() for e in node.get("images", []) if e["filename"].endswith(".mp4")]
    content = server.view(entry)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "clip.mp4"
        file.write_bytes(content)
        frames, _ = read_frames(file)  # [3, T, H, W] in [-1, 1]
    return exact, ((frames.permute(1, 2, 3, 0) + 1) * 127.5).round().clamp(0, 255).byte().numpy(), content


# What the server knows about the nodes


def test_object_info_is_complete(server: Server) -> None:
    for node_id, (inputs, outputs) in NODES.items():
        info = server.get(f"/object_info/{node_id}")[node_id]
        assert info["input_order"]["required"] == inputs, node_id
        assert info["input_order"].get("optional", []) == OPTIONAL.get(node_id, []), node_id
        assert info["output"] == outputs
        assert info["category"] == f"Allegro/{CATEGORIES[node_id]}"
        assert len(info["description"]) > 40
        assert all(info["output_tooltips"])
        for name, (_, options) in (info["input"]["required"] | info["input"].get("optional", {})).items():
            assert len(options.get("tooltip", "")) > 10, f"{node_id}.{name}"


def test_numbers_have_a_range_and_a_granularity(server: Server) -> None:
    for node_id in NODES:
        info = server.get(f"/object_info/{node_id}")[node_id]
        for name, (kind, options) in info["input"]["required"].items():
            if kind in ("INT", "FLOAT") and name != "seed":
                assert options["min"] <= options["default"] <= options["max"], f"{node_id}.{name}"
                assert options["step"] > 0


def test_extension_is_among_the_loaded(server: Server) -> None:
    line = re.search(r"^.*seconds.*allegro-video.*$", server.log, re.MULTILINE)
    assert line is not None, server.log[-2000:]
    assert "FAILED" not in line[0]


def test_starting_says_nothing_about_us_but_how_long_it_took(server: Server) -> None:
    """What nodes log while they work: inside/checks.py, where ComfyUI's log still has levels."""
    start, found, _ = server.log.partition("To see the GUI go to")
    assert found
    lines = [re.sub(r"\x1b\[\d+m|\[INFO\]", "", line).strip() for line in start.splitlines() if "allegro" in line.lower()]
    assert len(lines) == 1
    assert re.fullmatch(r"[\d.]+ seconds: \S+/custom_nodes/allegro-video", lines[0])


def test_every_node_has_a_help_page(server: Server) -> None:
    for node_id in NODES:
        page = server.fetch(f"/extensions/allegro-video/docs/{node_id}.md").decode()
        assert page.startswith("# ")


@pytest.mark.parametrize("language", ["en", "zh"])
def test_locales_are_served(server: Server, language: str) -> None:
    served = server.get("/i18n")[language]["nodeDefs"]
    assert NODES.keys() <= served.keys()


def test_templates_are_listed(server: Server) -> None:
    shipped = {path.stem for path in (PACK / "workflows").glob("*.json")}
    assert {"text_to_video", "text_to_video_tiny", "lora", *IMAGE_WORKFLOWS} <= {name[3:] for name in shipped}
    assert set(server.get("/workflow_templates")["allegro-video"]) == shipped


def test_dropdowns_list_folders_once_and_the_bundled_model_first(server: Server) -> None:
    options = dropdown(server, "LoadAllegroDiT", "model_name")
    assert "Sharded/transformer" in options
    assert "tiny-random/transformer" in options
    assert not [name for name in options if "-of-" in name]
    for node_id, name in (("LoadAllegroDiT", "model_name"), ("LoadAllegroT5", "clip_name"), ("LoadAllegroVAE", "vae_name")):
        assert dropdown(server, node_id, name)[0] == BUNDLED


def dropdown(server: Server, node_id: str, name: str) -> list[str]:
    kind, options = server.get(f"/object_info/{node_id}")[node_id]["input"]["required"][name]
    return kind if isinstance(kind, list) else options["options"]


# Runs


@pytest.mark.parametrize("path", API_WORKFLOWS, ids=lambda p: p.stem)
def test_workflow_runs_twice_with_the_same_result(server: Server, path: Path) -> None:
    graph = with_model(json.loads(path.read_text(encoding="utf-8")), "tiny-random", width=64, height=48, length=16, steps=3,
                       dtype="default")
    first, video, _ = clip_of(server, graph)
    assert first.shape == video.shape == (16, 48, 64, 3)
    assert first.std() > 2, "the clip is one grey"
    assert np.abs(first.astype(float) - video).mean() < 10
    server.forget()
    runs = server.log.count("Allegro VAE decode: ")
    second, _, _ = clip_of(server, graph)
    assert server.log.count("Allegro VAE decode: ") == runs + 1, "the second run took the first one's result"
    assert np.array_equal(first, second)


def test_bundled_model_follows_its_prompt(server: Server) -> None:
    """The graph that every newcomer runs first, as shipped."""
    assert_follows_its_prompt(server, api("text_to_video_tiny"))


@pytest.mark.parametrize("path", API_WORKFLOWS, ids=lambda p: p.stem)
def test_every_workflow_draws_what_the_bundled_model_is_asked_for(server: Server, path: Path) -> None:
    """At the size, steps and guidance of that model, the VAE in fp32 (bf16 takes a minute on many processors); else as shipped."""
    defaults = load_sampling_defaults(ASSETS)
    graph = with_model(json.loads(path.read_text(encoding="utf-8")), BUNDLED, width=defaults.width, height=defaults.height,
                       length=defaults.num_frames, steps=defaults.num_steps, cfg=defaults.guidance_scale, dtype="default")
    (positive,) = [node for node in graph.values() if node["inputs"].get("role") == "positive"]
    positive["inputs"]["text"] = TINY_PROMPT
    assert_follows_its_prompt(server, graph)


def assert_follows_its_prompt(server: Server, graph: dict[str, Any]) -> None:
    _, frames, _ = clip_of(server, graph)
    assert frames.shape == (24, 64, 96, 3)
    wanted = {"kind": "shape", "background": "blue", "object": "red", "shape": "circle", "direction": "right"}
    found = compare(frames, wanted)
    assert all(found.values()), found


def test_previews_and_progress_reach_the_browser(server: Server) -> None:
    """As the browser listens: one picture per step, and progress to the last one."""
    socket = WebSocket("127.0.0.1", server.port, "/ws?clientId=listener")
    previews: list[tuple[dict[str, Any], Image.Image]] = []
    progress: dict[str, list[tuple[int, int]]] = {}  # node -> steps done, of how many
    texts: list[str] = []
    try:
        socket.send(json.dumps({"type": "feature_flags", "data": {"supports_preview_metadata": True}}))
        prompt_id = server.submit(small(seed=8), client_id="listener")
        while (received := socket.receive(120)) is not None:
            message = received if isinstance(received, bytes) else json.loads(received)
            if isinstance(message, bytes) and message[:4] == TEXT_KIND:
                texts.append(message[9:].decode())  # behind the length of the node's number, and that of one digit
            elif isinstance(message, bytes):
                previews.append(preview_of(message))
            elif message["type"] == "progress":
                about = message["data"]
                progress.setdefault(about["node"], []).append((about["value"], about["max"]))
            elif message["type"] in ("execution_success", "execution_error", "execution_interrupted"):
                assert message["type"] == "execution_success", message
                break
    finally:
        socket.close()
    sampler, decode = (key for key, node in small().items() if node["class_type"] in ("AllegroSampler", "AllegroVideoVAEDecode"))
    assert progress[sampler] == [(step, 4) for step in (1, 2, 3, 4)]
    assert progress[decode][-1][0] == progress[decode][-1][1] > 1
    assert [about["node_id"] for about, _ in previews] == [sampler] * 4
    assert all(about["prompt_id"] == prompt_id for about, _ in previews)
    assert len(texts) == 2
    assert all(re.fullmatch(r"(1 token|\d+ tokens)", text) for text in texts), texts
    for _, picture in previews:
        assert np.asarray(picture.convert("RGB")).std() > 1, "the preview is one colour"
        assert abs(picture.width / picture.height - 96 / 64) < 0.01


TEXT_KIND = struct.pack(">I", 3)  # a line that is shown on a node


def preview_of(message: bytes) -> tuple[dict[str, Any], Image.Image]:
    """What ComfyUI says about a preview, and the preview. The message: 4 bytes kind, 4 bytes length, JSON, JPEG or PNG."""
    kind, length = struct.unpack(">II", message[:8])
    assert kind == 4, kind
    return json.loads(message[8 : 8 + length]), Image.open(io.BytesIO(message[8 + length :]))


def test_the_line_about_the_run_is_there(server: Server) -> None:
    server.run(small(seed=7))
    assert re.search(r"Allegro: 2 layers of width 192, weights float32, 1 x 24 frames of 96x64 \(144 tokens\), 4 steps, "
                     r"cfg 3, seed 7, attention \w+, no cache, about [\d.]+ [GM]iB of activations on cpu", server.log)


def test_sharded_folder_and_single_file_load_alike(server: Server) -> None:
    reference, _, _ = clip_of(server, small(seed=11))
    for name in ("Sharded/transformer", "dit.safetensors"):
        graph = small(seed=11)
        graph["1"]["inputs"]["model_name"] = name
        frames, _, _ = clip_of(server, graph)
        assert np.array_equal(frames, reference), name


def test_cancel_takes_less_than_five_seconds_and_the_next_run_works(server: Server) -> None:
    prompt_id = server.submit(small(seed=21, steps=10_000))
    end = time.monotonic() + 60
    while "10000 steps" not in server.log and time.monotonic() < end:
        time.sleep(0.1)
    time.sleep(1)
    start = time.monotonic()
    server.fetch("/interrupt", {})
    entry = server.wait(prompt_id, timeout=30)
    assert time.monotonic() - start < 5
    assert error_of(entry) == "interrupted"
    server.run(small(seed=22))


# Refusals, before anything is loaded


@pytest.mark.parametrize(("changes", "words"), [
    ({"width": 650}, "width=650: must be a multiple of 16 from 16 to 8192; nearest: 640 or 656"),
    ({"width": 0}, "width=0: must be a multiple of 16"),
    ({"height": -16}, "height=-16: must be a multiple of 16"),
    ({"height": 9000}, "from 16 to 8192"),
    ({"length": 90}, "length=90: must be a multiple of 4 from 4 to 4096; nearest: 88 or 92"),
    ({"length": 0}, "length=0: must be a multiple of 4"),
    ({"batch_size": 0}, "batch_size=0: must be a multiple of 1 from 1 to 64"),
    ({"width": 8192, "height": 8192, "length": 4096, "batch_size": 64}, "64 x 4096 frames of 8192x8192 needs about"),
    ({"steps": 0}, "steps=0: must be a whole number from 1"),
    ({"cfg": float("nan")}, "must be a finite number of at least 0"),
    ({"cfg": -1.0}, "must be a finite number of at least 0"),
    ({"denoise": 0.0}, "denoise=0.0: must be above 0"),
    ({"denoise": 1.5}, "denoise=1.5: must be above 0 and at most 1"),
    ({"tile_size": 100}, "tile_size=100: must be a multiple of 8"),
    ({"tile_size": 64, "overlap": 64}, "overlap=64: must be a multiple of 8 from 8 to 56"),
    ({"temporal_size": 6}, "temporal_size=6: must be a multiple of 4"),
    ({"noise_source": "gpu"}, "noise_source='gpu': must be one of reference, comfy"),
    ({"weight_dtype": "int3"}, "'int3' is not one of: default, bf16"),
    ({"role": "system"}, "role='system': must be one of"),
    ({"text": "word " * 25_000}, "characters"),
], ids=lambda value: "-".join(value) if isinstance(value, dict) else "")
def test_bad_value_is_refused_before_weights_load(server: Server, changes: dict[str, Any], words: str) -> None:
    server.forget()
    before = len(server.log)
    with pytest.raises(PromptRefused) as refused:
        server.submit(small(**changes))
    assert words in refused.value.details
    assert "Loaded" not in server.log[before:]


@pytest.mark.parametrize("name", ["../../secret.safetensors", "/etc/passwd", "none.safetensors", "Sharded/transformer/../x"])
def test_names_outside_the_list_are_refused(server: Server, name: str) -> None:
    graph = small()
    graph["1"]["inputs"]["model_name"] = name
    with pytest.raises(PromptRefused) as refused:
        server.submit(graph)
    assert "is not among the models that ComfyUI lists" in refused.value.details


def test_a_lora_that_is_not_listed_is_refused(server: Server) -> None:
    graph = with_model(api("lora"), "tiny-random", steps=1)
    (node,) = [node for node in graph.values() if node["class_type"] == "AllegroLoraLoader"]
    for name, strength, words in (("../style.safetensors", 1.0, "is not among the LoRAs that ComfyUI lists"),
                                  ("style.safetensors", float("nan"), "must be a finite number")):
        node["inputs"] |= {"lora_name": name, "strength_model": strength}
        with pytest.raises(PromptRefused) as refused:
            server.submit(graph)
        assert words in refused.value.details


@pytest.mark.parametrize(("node", "name", "words"), [
    ("1", "is_a_vae.safetensors", "Allegro VideoVAE; expected an Allegro text-to-video transformer"),
    ("1", "truncated.safetensors", "is truncated"),
    ("1", "pickle.safetensors", "is a pickled PyTorch checkpoint"),
    ("1", "edited.safetensors", "weights and config contradict each other"),
    ("1", "Incomplete/transformer", "are missing: diffusion_pytorch_model-00002-of-00002.safetensors"),
    ("2", "is_a_dit.safetensors", "expected a T5 v1.1 text encoder"),
    ("3", "is_a_dit.safetensors", "expected the Allegro VideoVAE"),
])
def test_wrong_file_is_refused_with_a_sentence(server: Server, node: str, name: str, words: str) -> None:
    graph = small()
    (widget,) = [w for w in graph[node]["inputs"] if w.endswith("_name")]
    graph[node]["inputs"][widget] = name
    entry = server.wait(server.submit(graph))
    assert words in error_of(entry)


def test_the_video_carries_its_graph(server: Server) -> None:
    graph = small(seed=31)
    _, _, content = clip_of(server, graph)
    assert json.dumps(graph)[1:-1].encode() in content


# Folders with nothing in them


def test_empty_folders_leave_the_bundled_model(bare: Server) -> None:
    assert all(name.endswith("(bundled)") for name in dropdown(bare, "LoadAllegroDiT", "model_name"))
    assert dropdown(bare, "LoadAllegroVAE", "vae_name") == [BUNDLED]
    with pytest.raises(PromptRefused, match="is not among the models"):
        bare.submit(small())
