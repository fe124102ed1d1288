"""The archive that the registry distributes, unpacked into a ComfyUI that has nothing else."""

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from archive import write_archive
from comfy.client import ComfyUI, Server

pytestmark = pytest.mark.comfy


@pytest.fixture(scope="module")
def fresh(comfyui: ComfyUI, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose base directory holds the unpacked archive and no model."""
    base = tmp_path_factory.mktemp(f"fresh-{comfyui.version}")
    folder = base / "custom_nodes" / "allegro-video"
    folder.mkdir(parents=True)
    with zipfile.ZipFile(write_archive(base / "node.zip")) as archive:
        archive.extractall(folder)
    running = Server(comfyui, base)
    try:
        running.start()
        yield running
    finally:
        running.stop()


def test_packed_archive_loads_whole(fresh: Server) -> None:
    """Every node, example graph, help page, script and translation is served."""
    folder = fresh.base / "custom_nodes" / "allegro-video"
    assert "IMPORT FAILED" not in fresh.log
    assert "are missing" not in fresh.log
    nodes = fresh.get("/object_info")
    translated = json.loads((folder / "locales" / "zh" / "nodeDefs.json").read_text(encoding="utf-8"))
    assert set(translated) <= set(nodes)
    assert set(translated) <= set(fresh.get("/i18n")["zh"]["nodeDefs"])
    assert sorted(fresh.get("/workflow_templates")["allegro-video"]) == sorted(
        path.stem for path in (folder / "workflows").glob("*.json"))
    scripts = [name for name in fresh.get("/extensions") if name.startswith("/extensions/allegro-video/")]
    assert len(scripts) == len(list((folder / "web").rglob("*.js"))) > 0
    for address in [*scripts, "/extensions/allegro-video/docs/AllegroSampler.md"]:
        assert fresh.fetch(address)


def test_packed_archive_makes_a_video(fresh: Server) -> None:
    """The first template, as it is shipped."""
    path: Path = fresh.base / "custom_nodes" / "allegro-video" / "workflows" / "api" / "01_text_to_video_tiny.json"
    graph = json.loads(path.read_text(encoding="utf-8"))
    (saved,) = [key for key, node in graph.items() if node["class_type"] == "SaveVideo"]
    (entry,) = fresh.run(graph)[saved]["images"]
    assert fresh.view(entry)[4:8] == b"ftyp"
