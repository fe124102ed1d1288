"""The archive that the registry distributes, unpacked into a ComfyUI that has nothing else."""

import json
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from archive import write_archive
from comfy.client import ComfyUI, Server

pytestmark = pytest.mark.comfy


@pytest.fixture(scope="module")
def fresh(comfyui: ComfyUI, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose base directory holds the unpacked archive and no model; one lies in a folder of extra_model_paths.yaml."""
    base = tmp_path_factory.mktemp(f"fresh-{comfyui.version}")
    folder = base / "custom_nodes" / "allegro-video"
    folder.mkdir(parents=True)
    with zipfile.ZipFile(write_archive(base / "node.zip")) as archive:
        archive.extractall(folder)
    bundled = folder / "allegro_model" / "assets" / "tiny" / "transformer"
    elsewhere = base / "elsewhere" / "transformers"
    elsewhere.mkdir(parents=True)
    shutil.copy(bundled / "diffusion_pytorch_model.safetensors", elsewhere / "mine.safetensors")
    shutil.copy(bundled / "config.json", elsewhere / "mine.config.json")
    paths = base / "extra.yaml"
    paths.write_text(f"other:\n  base_path: {json.dumps(str(elsewhere.parent))}\n  diffusion_models: transformers\n", encoding="utf-8")
    running = Server(comfyui, base, ["--extra-model-paths-config", str(paths)])
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


@pytest.mark.parametrize("model", ["allegro-tiny (bundled)", "mine.safetensors"])
def test_packed_archive_makes_a_video(fresh: Server, model: str) -> None:
    """The first template, as it is shipped, and with a transformer out of a folder of extra_model_paths.yaml."""
    path: Path = fresh.base / "custom_nodes" / "allegro-video" / "workflows" / "api" / "01_text_to_video_tiny.json"
    graph = json.loads(path.read_text(encoding="utf-8"))
    graph["1"]["inputs"]["model_name"] = model
    (saved,) = [key for key, node in graph.items() if node["class_type"] == "SaveVideo"]
    (entry,) = fresh.run(graph)[saved]["images"]
    assert fresh.view(entry)[4:8] == b"ftyp"
