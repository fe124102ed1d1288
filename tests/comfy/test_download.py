"""The download node in a real server, with a hub on this machine that fails now and then."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hub_server
import pytest
from comfy.client import PACK, PromptRefused, Server, error_of
from comfy.test_server import api, dropdown
from hub_server import Hub

pytestmark = pytest.mark.comfy

TINY = PACK / "allegro_model" / "assets" / "tiny"
ALLEGRO = "rhymes-ai/Allegro"
DIT, VAE = (f"{part}/diffusion_pytorch_model.safetensors" for part in ("transformer", "vae"))


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    """The small model in place of the released one."""
    files = {(ALLEGRO, name): (TINY / name).read_bytes() for name in (DIT, VAE, "transformer/config.json", "vae/config.json")}
    with hub_server.running(Hub(files)) as running:
        yield running


@pytest.fixture(scope="module")
def folders(second: Server) -> Iterator[Path]:
    """A base directory without models, and in it a disk elsewhere that has the VAE; both without files afterwards."""
    base, disk = second.base, second.base / "elsewhere" / "vae"
    disk.mkdir(parents=True)
    (disk / "allegro_vae.safetensors").write_bytes((TINY / VAE).read_bytes())
    (base / "extra.yaml").write_text(f"elsewhere:\n    base_path: {disk.parent}\n    vae: vae\n")
    yield base
    for path in (*disk.iterdir(), *(base / "models").rglob("*")):
        if path.is_file():
            path.unlink()


@pytest.fixture(scope="module")
def server(second: Server, folders: Path, hub: Hub) -> Server:
    second.stop()
    second.extra += ["--extra-model-paths-config", str(folders / "extra.yaml")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_ENDPOINT", hub.url)
        second.start()
    return second


def node(*, model: str = "t2v", text_encoder: str = "none", download: bool = True) -> dict[str, Any]:
    inputs = {"model": model, "text_encoder": text_encoder, "download": download}
    return {"1": {"class_type": "AllegroDownload", "inputs": inputs}}


def report(server: Server, **inputs: Any) -> str:
    return server.run(node(**inputs))["1"]["text"][0]


def test_the_weights_are_listed_fetched_and_found(server: Server, hub: Hub, folders: Path) -> None:
    hub.requests.clear()
    dit = folders / "models" / "diffusion_models" / "allegro_dit.safetensors"
    with pytest.raises(PromptRefused) as refused:
        server.submit(api("text_to_video"))
    assert f"{DIT} of {ALLEGRO} (5.5 GB), to be saved as models/diffusion_models/{dit.name}" in refused.value.details
    assert "download t2v --comfyui DIR" in refused.value.details

    listed = report(server, download=False)
    assert f"fetch  {dit}" in listed
    assert f"have   {folders / 'elsewhere' / 'vae' / 'allegro_vae.safetensors'}" in listed
    assert "3 of 4 files" in listed
    assert f"{hub.url}/{ALLEGRO}/resolve/" in listed
    assert hub.contents() == []
    assert not dit.exists()

    hub.faults[DIT] = ["cut 1000000", "reset 1000000"]
    fetched = report(server)
    assert f"fetched {dit} (SHA-256 stated by the hub)" in fetched
    assert dit.read_bytes() == (TINY / DIT).read_bytes()
    config = folders / "elsewhere" / "vae" / "allegro_vae.config.json"
    assert json.loads(config.read_text()) == json.loads((TINY / "vae" / "config.json").read_text())
    assert [path.name for path in dit.parent.iterdir() if path.name.startswith(".")] == []
    assert dit.name in dropdown(server, "LoadAllegroDiT", "model_name")
    asked = len(hub.requests)
    assert "nothing to fetch" in report(server), "the node ran again, though its inputs are the same"
    assert len(hub.requests) == asked


def test_cancelling(server: Server, hub: Hub) -> None:
    hub.files["rhymes-ai/Allegro-T2V-40x720P", DIT] = hub.files[ALLEGRO, DIT]
    for name in ("transformer/config.json", VAE, "vae/config.json"):
        hub.files["rhymes-ai/Allegro-T2V-40x720P", name] = hub.files[ALLEGRO, name]
    hub.faults[DIT] = ["429 Retry-After: 50"]
    prompt = server.submit(node(model="t2v-40x720p"))
    end = time.monotonic() + 60
    while hub.faults[DIT] and time.monotonic() < end:
        time.sleep(0.1)
    start = time.monotonic()
    server.fetch("/interrupt", {})
    assert error_of(server.wait(prompt, timeout=30)) == "interrupted"
    assert time.monotonic() - start < 5


def test_what_cannot_be_fetched_is_explained(server: Server, hub: Hub) -> None:
    message = error_of(server.wait(server.submit(node(model="ti2v"))))
    assert "rhymes-ai/Allegro-TI2V has no file transformer/diffusion_pytorch_model.safetensors" in message
    assert "To fetch by hand:" in message
    assert "Google Drive" in report(server, model="vfi")
    with pytest.raises(PromptRefused) as refused:
        server.submit(node(model="t4v"))
    assert "model" in refused.value.details
