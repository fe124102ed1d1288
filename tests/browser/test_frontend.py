"""What a user of the browser sees: nodes, templates, a run, help, and the sizes below the clip nodes."""

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
from browser.tab import APP, PATIENCE, Tab
from comfy.client import PACK, Server  # noqa: TID251 (the folder beside this one)

pytestmark = [pytest.mark.comfy, pytest.mark.browser, pytest.mark.slow]

WORKFLOWS = sorted((PACK / "workflows").glob("*.json"))
ASSETS = PACK / "allegro_model" / "assets" / "tiny"
SIZE, SAMPLER = "EmptyAllegroLatentVideo", "AllegroSampler"
needs_model = pytest.mark.skipif(not ASSETS.is_dir(), reason="this copy has no bundled model")


def load(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def texts(language: str, file: str = "nodeDefs") -> dict[str, Any]:
    return load(PACK / "locales" / language / f"{file}.json")


NODES = texts("en")


def first_steps() -> Path:
    """The simplest template that runs without any download."""
    def runs(graph: dict[str, Any]) -> bool:
        loaders = [node for node in graph["nodes"] if node["type"].startswith("LoadAllegro")]
        return (all("(bundled)" in node["widgets_values"][0] for node in loaders)
                and not any(node["type"] in ("LoadImage", "LoadVideo") for node in graph["nodes"])
                and any(node["type"] == SIZE for node in graph["nodes"]))

    return min((path for path in WORKFLOWS if runs(load(path))), key=lambda path: len(load(path)["nodes"]))


def first_sentence(node_id: str, language: str) -> str:
    """Of a help page."""
    page = PACK / "web" / "docs" / (f"{node_id}.md" if language == "en" else f"{node_id}/{language}.md")
    if not page.exists():
        page = PACK / "web" / "docs" / f"{node_id}.md"
    paragraph = page.read_text(encoding="utf-8").split("\n\n")[1]
    return re.split(r"(?<=[.:\u3002\uff1a])", " ".join(paragraph.split()))[0].replace("`", "").replace("*", "")


def finished(server: Server, tab: Tab, count: int) -> dict[str, Any]:
    """The entry of the history once there are so many."""
    end = time.monotonic() + PATIENCE / 1000
    while time.monotonic() < end:
        history = list(server.get("/history").values())
        if len(history) >= count:
            return history[-1]
        tab.page.wait_for_timeout(200)
    raise AssertionError(server.log[-2000:])


def test_every_node_can_be_added(tab: Tab) -> None:
    for node_id, known in NODES.items():
        title, inputs, widgets = tab.page.evaluate(f"""id => {{
            const node = LiteGraph.createNode(id); {APP}.graph.add(node);
            return [node.title, node.inputs.map(i => i.name), (node.widgets ?? []).map(w => w.name)] }}""", node_id)
        assert title == known["display_name"]
        assert set(known["inputs"]) <= set(inputs) | set(widgets)


def common(prompt: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Class of each node and the inputs that it has in both prompts: what was saved before an input was added lacks it."""
    def inputs(key: str) -> dict[str, Any]:
        known = other.get(key, prompt[key])["inputs"]
        return {name: value for name, value in prompt[key]["inputs"].items() if name in known}

    return {key: {"class_type": prompt[key]["class_type"], "inputs": inputs(key)} for key in prompt}


def assert_prompt(tab: Tab, expected: dict[str, Any], name: str) -> None:
    """The graph becomes this prompt; some front ends connect the links of a graph a moment after they have opened it."""
    own = {key for key, node in expected.items() if node["class_type"] in NODES}
    end = time.monotonic() + 20
    while True:
        prompt = tab.prompt()
        found, wanted = common(prompt, expected), common(expected, prompt)
        wanted.update({key: {"class_type": expected[key]["class_type"], "inputs": expected[key]["inputs"]} for key in own})
        if found == wanted or time.monotonic() > end:
            break
        tab.page.wait_for_timeout(100)
    assert found == wanted, name


def test_workflows_open_and_convert_to_their_api_form(tab: Tab, shots: Path, front_end: Any) -> None:
    """Nothing is missing, nothing overlaps, and what the page adds below the nodes is not in what it saves or runs."""
    crowded = {}
    for path in WORKFLOWS:
        graph = load(path)
        tab.open(graph)
        assert_prompt(tab, load(path.parent / "api" / path.name), path.stem)
        tab.page.screenshot(path=shots / f"{front_end.name}-{path.stem}.png")
        assert tab.dialogs == [], path.stem
        kept = {node["id"]: node.get("widgets_values") for node in tab.serialised()["nodes"]}
        for node in graph["nodes"]:
            if node["type"] in NODES:
                saved = node["widgets_values"]  # inputs that were added later are behind them
                assert list(kept[node["id"]] or [])[:len(saved)] == saved, f"{path.stem}: {node['type']}"
        if overlaps := tab.overlaps():
            crowded[path.stem] = overlaps
    assert crowded == {}


@needs_model
def test_the_first_clip_of_a_newcomer(tab: Tab, server: Server, shots: Path, front_end: Any) -> None:
    """From the template browser to a video that plays; its file brings the graph back."""
    path = first_steps()
    tab.open_template(path.stem, load(path))
    assert tab.dialogs == []
    tab.set_widget(SAMPLER, "steps", 12)
    before = len(server.get("/history"))
    tab.press_run()
    tab.wait_for_progress(SAMPLER)
    tab.page.wait_for_function(f"""type => {{ const node = {APP}.graph._nodes.find(node => node.type === type)
        return node.imgs?.length || {APP}.nodePreviewImages?.[node.id]?.length
            || document.querySelector(`[data-node-id="${{node.id}}"] img`) }}""", arg=SAMPLER)
    entry = finished(server, tab, before + 1)
    assert entry["status"]["status_str"] == "success", server.log[-2000:]
    tab.page.wait_for_function("() => document.querySelector('video')?.duration > 0")
    tab.page.evaluate("() => { const video = document.querySelector('video'); video.muted = true; video.play() }")
    tab.page.wait_for_function("() => document.querySelector('video').currentTime > 0.1")
    tab.page.screenshot(path=shots / f"{front_end.name}-finished.png")

    lines = tab.page.locator(".allegro-sizes").first.inner_text()
    assert "for 12 steps" in lines, "the time of a step was not kept"
    ran = tab.prompt()
    output = next(files[0] for node in entry["outputs"].values() for files in node.values()
                  if isinstance(files, list) and isinstance(files[0], dict))
    tab.page.evaluate(f"() => {APP}.graph.clear()")
    tab.drop(server.view(output), "clip.mp4", "video/mp4")
    tab.wait_for_nodes(load(path))
    seed = next(node for node in tab.prompt().values() if node["class_type"] == SAMPLER)["inputs"]["seed"]
    next(node for node in ran.values() if node["class_type"] == SAMPLER)["inputs"]["seed"] = seed  # chosen anew for the next run
    assert_prompt(tab, ran, "dropped")


@needs_model
def test_a_run_can_be_cancelled(tab: Tab, server: Server) -> None:
    tab.open(load(first_steps()))
    tab.set_widget(SAMPLER, "steps", 1000)
    before = len(server.get("/history"))
    tab.press_run()
    tab.wait_for_progress(SAMPLER)
    tab.page.get_by_label("Cancel current run").first.click()
    entry = finished(server, tab, before + 1)
    assert "execution_interrupted" in [kind for kind, _ in entry["status"]["messages"]]
    assert tab.dialogs == []


@needs_model
def test_a_wrong_size_is_explained(tab: Tab, shots: Path, front_end: Any) -> None:
    tab.open(load(first_steps()))
    # As a file or a script brings it; what is typed is rounded to the nearest step.
    tab.run_on(SIZE, "node => { node.widgets.find(w => w.name === 'width').value = 100 }")
    tab.press_run()
    details = tab.page.get_by_role("button", name="View details")
    if front_end.version != "1.27.10":  # which opens a dialog by itself
        details.first.click()
        name = f"{NODES[SIZE]['display_name']} - width"
        tab.page.get_by_text(name, exact=True).first.locator("xpath=following::button[1]").click()
    tab.wait_for_text("must be a multiple of 16")
    tab.wait_for_text("96 or 112")
    tab.page.screenshot(path=shots / f"{front_end.name}-wrong-size.png")
    tab.page.keyboard.press("Escape")
    tab.problems[:] = [p for p in tab.problems if "400" not in p and "Prompt" not in p]  # they log what they show


def test_sizes_are_one_click(tab: Tab) -> None:
    """And the lines below follow the widgets, also when a graph is opened."""
    tab.open(load(first_steps()))
    picker = tab.page.locator(".allegro-sizes").first
    facts = tab.run_on(SIZE, "node => node.constructor.nodeData.input.required.length[1].allegro_sizes")
    for i, size in enumerate(facts["sizes"]):
        picker.locator("button").nth(i).click()
        assert tab.run_on(SIZE, "node => node.widgets.slice(0, 3).map(w => w.value)") == [
            size["width"], size["height"], size["length"]]
        tokens = size["width"] * size["height"] // 256 * size["length"] // 4
        assert f"{tokens:,} tokens" in picker.inner_text()
        assert picker.locator("button[aria-pressed=true]").count() == 1
        assert ("was not trained at this size" in picker.inner_text()) == (size["model"] == "released")
    tab.set_widget("LoadAllegroDiT", "model_name", "some.safetensors")
    tab.set_widget(SIZE, "width", 80)
    assert "No released model was trained at this size" in picker.inner_text()
    assert picker.locator("button[aria-pressed=true]").count() == 0


def test_help_page_is_shown(tab: Tab, shots: Path, front_end: Any) -> None:
    tab.open(load(first_steps()))
    tab.select(SIZE)
    tab.page.locator("[data-testid=info-button]").first.click()
    tab.wait_for_text(first_sentence(SIZE, "en"))
    tab.wait_for_text("Common mistakes")
    tab.page.screenshot(path=shots / f"{front_end.name}-help.png")


def test_chinese(server: Server, browser: Any, shots: Path, front_end: Any) -> None:
    """Names, sizes and help in the language of the settings."""
    server.fetch("/settings/Comfy.Locale", "zh")
    page = browser.new_page(viewport={"width": 1600, "height": 900})
    try:
        tab = Tab(page, server.url, vue=front_end.vue)
        tab.open(load(first_steps()))
        known = texts("zh")[SIZE]
        title, labels = tab.page.evaluate("""id => { const node = LiteGraph.createNode(id)
            return [node.title, Object.fromEntries(node.widgets.map(w => [w.name, w.label]))] }""", SIZE)
        assert title == known["display_name"]
        assert labels["length"] == known["inputs"]["length"]["name"]
        unknown = texts("zh", "main")["allegroSizes"]["bundledUntrained"]
        page.locator(".allegro-sizes button").first.click()
        assert unknown in page.locator(".allegro-sizes").first.inner_text()
        tab.select(SIZE)
        page.locator("[data-testid=info-button]").first.click()
        tab.wait_for_text(first_sentence(SIZE, "zh"))
        tab.wait_for_text(known["inputs"]["length"]["name"])
        page.screenshot(path=shots / f"{front_end.name}-chinese.png")
        assert tab.complaints() == []
    finally:
        page.close()
        server.fetch("/settings/Comfy.Locale", "en")
