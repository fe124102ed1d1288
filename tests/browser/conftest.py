"""A headless browser in front of real ComfyUI servers, with the front ends that people have.

All of it ends with its module: an editor that is merely open keeps a fifth of a processor busy.
"""

import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from browser.tab import Tab
from comfy.client import PACK, ComfyUI, Server, find_comfyui  # noqa: TID251 (the folder beside this one)

WHY_SKIPPED = "no ComfyUI found: see tests/comfy/conftest.py"


@dataclass(frozen=True)
class FrontEnd:
    """A ComfyUI with a front end.

    Attributes:
        comfyui: the checkout.
        version: of the front end.
        root: its folder; None for the one that is installed with the checkout.
        vue: with "Nodes 2.0", where nodes are elements of the page.
    """

    comfyui: ComfyUI
    version: str
    root: Path | None
    vue: bool

    @property
    def name(self) -> str:
        return f"{self.comfyui.version}-{self.version}{'-nodes2' if self.vue else ''}"


def pinned(comfyui: ComfyUI) -> FrontEnd:
    """The one that the checkout asks for, if it lies unpacked beside it as frontend-VERSION; else the installed one."""
    requirements = (comfyui.path / "requirements.txt").read_text(encoding="utf-8")
    found = re.search(r"comfyui-frontend-package==(\S+)", requirements)
    version = found[1] if found else "installed"
    folder = comfyui.path.parent / f"frontend-{version}" / "comfyui_frontend_package" / "static"
    return FrontEnd(comfyui, version, folder if folder.is_dir() else None, vue=False)


def front_ends() -> list[FrontEnd]:
    """What every checkout asks for, and with the newest checkout the release that came with the test extra."""
    checkouts = find_comfyui()
    found = [pinned(comfyui) for comfyui in checkouts]
    package = importlib.util.find_spec("comfyui_frontend_package")
    if checkouts and package is not None and package.origin is not None:
        newest = max(checkouts, key=lambda comfyui: [int(part) for part in comfyui.version.split(".")])
        version = importlib.metadata.version("comfyui-frontend-package")
        found.append(FrontEnd(newest, version, Path(package.origin).parent / "static", vue=True))
    return found


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "front_end" in metafunc.fixturenames:
        marked = [pytest.param(f, id=f.name) for f in front_ends()]
        skipped = [pytest.param(None, id="none", marks=pytest.mark.skip(reason=WHY_SKIPPED))]
        metafunc.parametrize("front_end", marked or skipped, scope="module")


@pytest.fixture(scope="module")
def server(front_end: FrontEnd, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    base = tmp_path_factory.mktemp(f"browser-{front_end.name}")
    for name in ("custom_nodes", "input", "output", "user/default", "temp", "models"):
        (base / name).mkdir(parents=True)
    os.symlink(PACK, base / "custom_nodes" / "allegro-video")
    settings = {  # no welcome dialogs, no tutorial; English
        "Comfy.TutorialCompleted": True, "Comfy.InstalledVersion": "9.9.9", "Comfy.Locale": "en",
        "Comfy.VueNodes.Enabled": front_end.vue,
    }
    (base / "user" / "default" / "comfy.settings.json").write_text(json.dumps(settings), encoding="utf-8")
    running = Server(front_end.comfyui, base, ["--front-end-root", str(front_end.root)] if front_end.root else [])
    try:
        running.start()
        yield running
    finally:
        running.stop()


@pytest.fixture(scope="module")
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


@pytest.fixture(scope="module")
def shared_tab(server: Server, browser: Any, front_end: FrontEnd) -> Iterator[Tab]:
    page = browser.new_page(viewport={"width": 1600, "height": 900})
    yield Tab(page, server.url, vue=front_end.vue)
    page.close()


@pytest.fixture
def tab(shared_tab: Tab) -> Iterator[Tab]:
    """The one page of a front end: opening it takes longer than all else. No test may leave a complaint behind."""
    yield shared_tab
    for _ in shared_tab.dialogs:  # a test that failed leaves them: they would lie over everything in the following ones
        shared_tab.page.keyboard.press("Escape")
    assert shared_tab.complaints() == []


@pytest.fixture(scope="session")
def shots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where screenshots go: SCREENSHOTS, else a temporary folder."""
    folder = os.environ.get("SCREENSHOTS")
    return Path(folder) if folder else tmp_path_factory.mktemp("screenshots")
