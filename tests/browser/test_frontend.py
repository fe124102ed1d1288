"""What a user of the browser sees: nodes, workflows, widgets, a finished clip."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from comfy.client import PACK, Server  # noqa: TID251 (the folder beside this one)

pytestmark = [pytest.mark.comfy, pytest.mark.browser, pytest.mark.slow]

WORKFLOWS = sorted((PACK / "workflows").glob("*.json"))
NODES = json.loads((PACK / "locales" / "en" / "nodeDefs.json").read_text(encoding="utf-8"))
ASSETS = PACK / "allegro_model" / "assets" / "tiny"
APP = "(window.comfyAPI?.app?.app ?? window.app)"
PATIENCE = 180_000  # ms; machines that run tests can be busy


class Tab:
    """A page with ComfyUI open, and what it complained about."""

    def __init__(self, page: Any, url: str) -> None:
        self.page = page
        self.problems: list[str] = []
        page.set_default_timeout(PATIENCE)
        page.on("console", lambda message: message.type in ("error", "warning") and self.problems.append(
            f"{message.text} {message.location.get('url', '')}"))
        page.on("pageerror", lambda error: self.problems.append(str(error)))
        page.goto(url)
        # The editor opens its own first graph late; what is loaded before that would be replaced by it.
        page.wait_for_function(f"() => {APP}?.canvas?.canvas && {APP}.graph._nodes.length > 0 "
                               "&& Object.keys(LiteGraph.registered_node_types).includes('AllegroSampler')")
        page.wait_for_timeout(3000)
        self.problems.clear()

    @property
    def dialogs(self) -> list[str]:
        """Texts of the dialogs on the screen."""
        return self.page.locator("[role=dialog]:visible").all_inner_texts()

    def ours(self) -> list[str]:
        """Complaints about this extension; a template without a picture is allowed."""
        return [p for p in self.problems if "llegro" in p and ".jpg" not in p]

    def open(self, graph: dict[str, Any]) -> None:
        self.page.evaluate(f"async graph => {{ await {APP}.loadGraphData(graph) }}", graph)
        first = next(node["type"] for node in graph["nodes"] if node["type"] in NODES)
        self.page.wait_for_function(f"type => {APP}.graph._nodes.some(node => node.type === type)", arg=first)
        self.page.wait_for_timeout(3000)

    def prompt(self) -> dict[str, Any]:
        return self.page.evaluate(f"async () => (await {APP}.graphToPrompt()).output")

    def serialised(self) -> dict[str, Any]:
        return self.page.evaluate(f"() => {APP}.graph.serialize()")


@pytest.fixture
def tab(server: Server, browser: Any) -> Iterator[Tab]:
    page = browser.new_page(viewport={"width": 1920, "height": 1080})
    yield Tab(page, server.url)
    page.close()


def load(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def test_every_node_can_be_added(tab: Tab) -> None:
    for node_id, texts in NODES.items():
        title, inputs, widgets = tab.page.evaluate(f"""id => {{
            const node = LiteGraph.createNode(id); {APP}.graph.add(node);
            return [node.title, node.inputs.map(i => i.name), (node.widgets ?? []).map(w => w.name)] }}""", node_id)
        assert title == texts["display_name"]
        assert set(texts["inputs"]) <= set(inputs) | set(widgets)
    assert not tab.ours()


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.stem)
def test_workflow_opens_and_converts_to_its_api_form(tab: Tab, path: Path, shots: Path, comfyui: Any) -> None:
    graph = load(path)
    tab.open(graph)
    tab.page.screenshot(path=shots / f"{comfyui.version}-{path.stem}.png")
    missing = tab.page.evaluate(f"() => {APP}.graph._nodes.filter(n => !LiteGraph.registered_node_types[n.type]).map(n => n.type)")
    assert missing == []
    assert tab.dialogs == []
    found = {key: {"class_type": node["class_type"], "inputs": dict(node["inputs"])} for key, node in tab.prompt().items()}
    expected = load(path.parent / "api" / path.name)
    for key, node in found.items():
        if node["class_type"] in ("CreateVideo", "SaveVideo"):  # ComfyUI's own: newer versions have more widgets
            known = expected[key]["inputs"]
            node["inputs"] = {name: value for name, value in node["inputs"].items() if name in known}
            expected[key]["inputs"] = {name: value for name, value in known.items() if name in node["inputs"]}
    assert found == expected
    kept = {node["id"]: node.get("widgets_values") for node in tab.serialised()["nodes"]}
    for node in graph["nodes"]:
        if node["type"] in NODES:
            assert list(kept[node["id"]]) == node["widgets_values"], node["type"]
    assert not tab.ours()


@pytest.mark.skipif(not ASSETS.is_dir(), reason="this copy has no bundled model")
def test_the_first_clip_of_a_newcomer(tab: Tab, server: Server, shots: Path, comfyui: Any) -> None:
    """Open the small workflow, run it, see a video."""
    tab.open(load(PACK / "workflows" / "01_text_to_video_tiny.json"))
    tab.page.evaluate(f"async () => {{ await {APP}.queuePrompt(0, 1) }}")
    entry: dict[str, Any] | None = None
    for _ in range(PATIENCE // 500):
        entry = next(iter(server.get("/history").values()), None)
        if entry is not None:
            break
        tab.page.wait_for_timeout(500)
    assert entry is not None, server.log[-2000:]
    assert entry["status"]["status_str"] == "success", server.log[-2000:]
    tab.page.wait_for_selector("video", state="attached")
    tab.page.wait_for_timeout(2000)
    tab.page.screenshot(path=shots / f"{comfyui.version}-finished.png")
    assert not tab.ours()


def test_help_page_is_shown(tab: Tab) -> None:
    """The page is where the help panel asks for it."""
    text = tab.page.evaluate("async () => (await fetch('/extensions/allegro-video/docs/AllegroSampler.md')).text()")
    assert "## Common mistakes" in text
