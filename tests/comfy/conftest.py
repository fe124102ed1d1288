"""ComfyUI checkouts, a model folder, and one server per checkout for all tests of this folder."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# `comfy` is this folder: ComfyUI itself runs in child processes only.
from comfy import client, files, random_model

from allegro_model.media.ffmpeg import ffmpeg_exe

HERE = Path(__file__).parent
PACK = HERE.parents[1]
WHY_SKIPPED = ("no ComfyUI found: set COMFYUI_PATH to a checkout of 0.3.64 or newer (several separated as in PATH) and "
               "COMFYUI_PYTHON to an interpreter with its requirements, or put checkouts into ~/comfy/ComfyUI*")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "comfyui" in metafunc.fixturenames:
        found = client.find_comfyui()
        marked = [pytest.param(c, id=c.version) for c in found]
        skipped = [pytest.param(None, id="none", marks=pytest.mark.skip(reason=WHY_SKIPPED))]
        metafunc.parametrize("comfyui", marked or skipped, scope="session")


def checks() -> dict[str, str]:
    """What runs inside ComfyUI: {name of the check: its file in inside/}."""
    return {line.split("(")[0].removeprefix("def "): file.stem
            for file in sorted((HERE / "inside").glob("*checks.py"))
            for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("def check_")}


@pytest.fixture(scope="session")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with random weights."""
    return random_model.write_model(tmp_path_factory.mktemp("model") / "tiny-random")


@pytest.fixture(scope="session")
def base(comfyui: Any, snapshot: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ComfyUI's base directory with this extension, sound models and wrong files in it."""
    root = tmp_path_factory.mktemp(f"base-{comfyui.version}")
    for name in ("input", "output", "user", "temp", "custom_nodes", "models/diffusion_models", "models/text_encoders",
                 "models/vae", "models/loras", "models/allegro", "models/frame_interpolation"):
        (root / name).mkdir(parents=True)
    os.symlink(PACK, root / "custom_nodes" / "allegro-video")
    os.symlink(snapshot, root / "models" / "allegro" / "tiny-random")
    files.write_variants(root / "models", snapshot)
    files.write_interpolators(root / "models" / "frame_interpolation")
    return root


@pytest.fixture(scope="session")
def server(comfyui: Any, base: Path) -> Iterator[Any]:
    """A server that all tests of a checkout share."""
    running = client.Server(comfyui, base)
    try:
        running.start()
        yield running
    finally:
        running.stop()


@pytest.fixture(scope="session")
def second(comfyui: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A server that is not started yet; test_download.py does so with a hub of its own."""
    base = tmp_path_factory.mktemp(f"bare-{comfyui.version}")
    (base / "custom_nodes").mkdir()
    os.symlink(PACK, base / "custom_nodes" / "allegro-video")
    server = client.Server(comfyui, base)
    yield server
    server.stop()


@pytest.fixture
def bare(second: Any) -> Any:
    """A running server whose base directory holds this extension and nothing else. A test may kill it."""
    if second.process is None or second.process.poll() is not None:
        second.start()
    return second


@pytest.fixture(scope="session")
def inside(request: pytest.FixtureRequest, comfyui: Any, base: Path) -> dict[str, str | None]:
    """Results of the selected checks, run in one process inside ComfyUI: {name: None or traceback}."""
    selected = {item.callspec.params.get("name") for item in request.session.items if hasattr(item, "callspec")}
    result = base / "inside.json"
    command = [comfyui.python, str(HERE / "inside" / "bootstrap.py"), str(comfyui.path), str(base), str(result),
               *(f"{file}.{name}" for name, file in checks().items() if name in selected)]
    # Some checks compare with packages of the tests' own environment, which ComfyUI's need not have.
    env = {**client.child_environment(), "REFERENCE_PYTHON": sys.executable}
    done = subprocess.run(command, env=env, cwd=base, capture_output=True, text=True,
                          timeout=3600, check=False)
    assert result.exists(), f"the process ended with {done.returncode}:\n{done.stderr[-4000:]}"
    return json.loads(result.read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def video(base: Path) -> str:
    """The name of an uploaded video: 12 frames at 12.5 per second, with a tone."""
    pytest.importorskip("imageio_ffmpeg", reason="imageio-ffmpeg is not installed (extra: standalone)")
    path = base / "input" / "moving.mp4"
    command = [ffmpeg_exe(), "-v", "error", "-y", "-f", "lavfi", "-i", "testsrc=s=96x64:r=25/2:d=0.96", "-f", "lavfi", "-i",
               "sine=frequency=440:duration=0.96", "-c:v", "libx264", "-pix_fmt", "yuv420p", "-c:a", "aac", str(path)]
    subprocess.run(command, check=True)
    return path.name
