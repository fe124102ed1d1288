"""Every workflow in API form, of this version and of earlier ones, in a real ComfyUI server."""

import json
from pathlib import Path

import pytest
from comfy.client import PACK, Server
from comfy.test_server import BUNDLED, api, clip_of, with_model

from allegro_model.training.analyse import compare

pytestmark = pytest.mark.comfy

CURRENT = sorted((PACK / "workflows" / "api").glob("*.json"))
EARLIER = sorted((PACK / "tests" / "data" / "workflows").glob("*/api/*.json"))


def name_of(path: Path) -> str:
    return path.stem if path in CURRENT else f"{path.parts[-3]}-{path.stem}"


@pytest.mark.parametrize("path", CURRENT + EARLIER, ids=name_of)
def test_workflow_is_accepted_and_gives_a_video(server: Server, video: str, path: Path) -> None:
    """With the bundled models, few steps and the VAE in fp32 (as in test_server.py); the files it asks for are not there."""
    graph = with_model(json.loads(path.read_text(encoding="utf-8")), BUNDLED, width=64, height=48, length=16, steps=2,
                       dtype="default", file=video)
    outputs = server.run(graph)
    (saved,) = [key for key, node in graph.items() if node["class_type"] == "SaveVideo"]
    (entry,) = outputs[saved]["images"]
    assert server.view(entry)[4:8] == b"ftyp"


def test_video_to_video_keeps_the_motion_and_changes_the_look(server: Server) -> None:
    """As shipped: a red circle on blue that moves right becomes a green square on black that moves right."""
    frames, _, _ = clip_of(server, api("video_to_video"))
    assert frames.shape == (24, 64, 96, 3)
    wanted = {"kind": "shape", "background": "black", "object": "green", "shape": "square", "direction": "right"}
    found = compare(frames, wanted)
    assert all(found.values()), found
