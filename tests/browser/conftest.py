"""A headless browser in front of a real ComfyUI server."""

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from comfy.client import PACK, ComfyUI, Server, find_comfyui  # noqa: TID251 (the folder beside this one)

WHY_SKIPPED = "no ComfyUI found: see tests/comfy/conftest.py"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "comfyui" in metafunc.fixturenames:
        marked = [pytest.param(c, id=c.version) for c in find_comfyui()]
        skipped = [pytest.param(None, id="none", marks=pytest.mark.skip(reason=WHY_SKIPPED))]
        metafunc.parametrize("comfyui", marked or skipped, scope="session")


def front_end_of(comfyui: ComfyUI) -> list[str]:
    """The front end that the checkout asks for, if it lies unpacked beside it as frontend-VERSION; else the installed one."""
    requirements = (comfyui.path / "requirements.txt").read_text(encoding="utf-8")
    version = re.search(r"comfyui-frontend-package==(\S+)", requirements)
    folder = comfyui.path.parent / f"frontend-{version[1] if version else ''}" / "comfyui_frontend_package" / "static"
    return ["--front-end-root", str(folder)] if folder.is_dir() else []


@pytest.fixture(scope="session")
def server(comfyui: ComfyUI, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    base = tmp_path_factory.mktemp(f"browser-{comfyui.version}")
    for name in ("custom_nodes", "input", "output", "user/default", "temp", "models"):
        (base / name).mkdir(parents=True)
    os.symlink(PACK, base / "custom_nodes" / "allegro-video")
    # No welcome dialogs, no tutorial; English.
    (base / "user" / "default" / "comfy.settings.json").write_text(
        '{"Comfy.TutorialCompleted": true, "Comfy.InstalledVersion": "9.9.9", "Comfy.Locale": "en"}', encoding="utf-8")
    running = Server(comfyui, base, front_end_of(comfyui))
    try:
        running.start()
        yield running
    finally:
        running.stop()


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Chromium, from CHROMIUM or the PATH, else the one that playwright has installed."""
    playwright = pytest.importorskip("playwright.sync_api", reason='playwright is not installed: pip install ".[test]"')
    path = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    with playwright.sync_playwright() as driver:
        try:
            running = driver.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        except playwright.Error as error:
            pytest.skip(f"no browser: {str(error).splitlines()[0]}")
        yield running
        running.close()


@pytest.fixture(scope="session")
def shots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where screenshots go: SCREENSHOTS, else a temporary folder."""
    folder = os.environ.get("SCREENSHOTS")
    return Path(folder) if folder else tmp_path_factory.mktemp("screenshots")
