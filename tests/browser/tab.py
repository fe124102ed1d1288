"""A page with the editor open: what a user does in it, and what it complained about."""

import re
from contextlib import suppress
from typing import Any

PATIENCE = 180_000
APP = "(window.comfyAPI?.app?.app ?? window.app)"
# What front ends complain about by themselves, also without any extension. Whatever names this one is never allowed.
NOISE = re.compile("|".join((
    r"404 .*/(user\.css|favicon\.ico|userdata[^ ]*)$",  # a user who has saved nothing yet
    r"ERR_NAME_NOT_RESOLVED|ERR_INTERNET_DISCONNECTED|ERR_CONNECTION|ERR_TIMED_OUT|Failed to fetch",  # look-ups without network
    r"404 .*/api/view\?type=input",  # example graphs name files of the user's
    r"404 .*/templates/",  # pictures of ComfyUI's own templates
    r"ComfyApp graph accessed before initialization",  # 1.49.6, at its start
    r"Cannot read properties of undefined \(reading 'id'\)",  # 1.27.10, at its start
)))
# Help pages in English lie one level higher, which the front ends try second. With an error they ask a registry for the nodes.
OWN_NOISE = re.compile(r"404 .*/extensions/allegro-video/docs/\w+/en\.md$|ERR_NAME_NOT_RESOLVED https://")


class Tab:
    """An open editor.

    Attributes:
        page: of playwright.
        vue: nodes are elements of the page ("Nodes 2.0"), not drawn on a canvas.
        too_slow: playwright's error when something does not happen in time.
    """

    def __init__(self, page: Any, url: str, *, vue: bool) -> None:
        self.page, self.vue = page, vue
        self.problems: list[str] = []
        # Not above: without playwright these tests are skipped.
        from playwright.sync_api import TimeoutError as TooSlow

        self.too_slow = TooSlow
        page.set_default_timeout(PATIENCE)
        page.on("console", lambda message: message.type == "error" and self.problems.append(
            f"{message.text} {message.location.get('url', '')}"))
        page.on("pageerror", lambda error: self.problems.append(f"{error} {error.stack}"))
        page.goto(url)
        # The editor opens its own first graph late; what is loaded before that would be replaced by it.
        page.wait_for_function(f"() => {APP}?.canvas?.canvas && {APP}.extensionManager && {APP}.graph._nodes.length > 0 "
                               "&& Object.keys(LiteGraph.registered_node_types).includes('AllegroSampler')")
        page.wait_for_load_state("networkidle")

    def complaints(self) -> list[str]:
        """Errors since the last call that a user of this extension should not see."""
        found = [p for p in self.problems if not OWN_NOISE.search(p) and ("llegro" in p or not NOISE.search(p))]
        self.problems.clear()
        return found

    # What is on the screen

    @property
    def dialogs(self) -> list[str]:
        """Texts of the dialogs on the screen."""
        return self.page.locator("[role=dialog]:visible").all_inner_texts()

    def wait_for_text(self, text: str) -> None:
        self.page.wait_for_function("text => document.body.innerText.replace(/\\s+/g, ' ').includes(text)", arg=text)

    def run_on(self, node_type: str, code: str, *args: Any) -> Any:
        """A function (node, ...args) of JavaScript on the first node of a type."""
        return self.page.evaluate(
            f"([type, args]) => ({code})({APP}.graph._nodes.find(node => node.type === type), ...args)", [node_type, args])

    # What a user does

    def open(self, graph: dict[str, Any]) -> None:
        """As if the file were dropped."""
        self.page.evaluate(f"async graph => {{ await {APP}.loadGraphData(graph) }}", graph)
        self.wait_for_nodes(graph)

    def wait_for_nodes(self, graph: dict[str, Any]) -> None:
        types = sorted(node["type"] for node in graph["nodes"])
        self.page.wait_for_function(
            f"types => JSON.stringify({APP}.graph._nodes.map(node => node.type).sort()) === types",
            arg=self.page.evaluate("types => JSON.stringify(types)", types))
        if self.vue:
            self.page.wait_for_function("count => document.querySelectorAll('[data-node-id]').length === count", arg=len(types))
        self.page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def open_template(self, name: str, graph: dict[str, Any]) -> None:
        """From the template browser, in the category of this extension."""
        self.page.get_by_label("Templates", exact=True).first.click()
        dialog = self.page.locator("[role=dialog]:visible").first
        dialog.get_by_text("allegro-video", exact=True).first.click()
        dialog.get_by_placeholder(re.compile("Search")).fill(name)
        card = dialog.get_by_text(name, exact=True).first
        picture = dialog.locator("img").first
        picture.wait_for()
        self.page.wait_for_function("picture => picture.naturalWidth > 0", arg=picture.element_handle())
        self._settle(dialog)
        for _ in range(10):  # the list is drawn anew while one types: a click in that moment is lost
            with suppress(self.too_slow):  # or the dialog closed since
                card.click(timeout=10_000)
            with suppress(self.too_slow):
                dialog.wait_for(state="hidden", timeout=10_000)
                break
        else:
            raise AssertionError(f"the template {name} could not be opened: {self.dialogs}")
        self.wait_for_nodes(graph)

    def _settle(self, dialog: Any) -> None:
        """Waits until the list in it stays as it is: it is drawn anew a moment after one has typed."""
        seen, shown = None, dialog.inner_text()
        while shown != seen:
            self.page.wait_for_timeout(500)
            seen, shown = shown, dialog.inner_text()

    def wait_for_progress(self, node_type: str) -> None:
        """In the title of the page, or on the node."""
        self.page.wait_for_function(f"""type => /\\d+%/.test(document.title)
            || {APP}.graph._nodes.some(node => node.type === type && node.progress > 0)""", arg=node_type)

    def set_widget(self, node_type: str, name: str, value: Any) -> None:
        """As typing into a widget does."""
        self.run_on(node_type, f"""(node, name, value) => {{ const widget = node.widgets.find(w => w.name === name)
            widget.value = value; widget.callback?.(value, {APP}.canvas, node) }}""", name, value)

    def press_run(self) -> None:
        self.page.get_by_role("button", name="Run", exact=True).first.click()

    def select(self, node_type: str) -> None:
        self.run_on(node_type, f"""node => {{
            const canvas = {APP}.canvas
            canvas.deselectAll()
            canvas.selectNode ? canvas.selectNode(node) : canvas.select(node)
            canvas.setDirty(true, true) }}""")

    def drop(self, data: bytes, name: str, kind: str) -> None:
        """A file onto the canvas."""
        self.page.evaluate(f"""([bytes, name, type]) => {{
            const transfer = new DataTransfer()
            transfer.items.add(new File([new Uint8Array(bytes)], name, {{ type }}))
            const box = {APP}.canvas.canvas.getBoundingClientRect()
            const at = {{ clientX: box.right - 60, clientY: box.top + box.height / 2, bubbles: true, cancelable: true,
                          dataTransfer: transfer }}
            for (const event of ["dragenter", "dragover", "drop"]) {APP}.canvas.canvas.dispatchEvent(new DragEvent(event, at))
        }}""", [list(data), name, kind])

    # What the graph is

    def prompt(self) -> dict[str, Any]:
        return self.page.evaluate(f"async () => (await {APP}.graphToPrompt()).output")

    def serialised(self) -> dict[str, Any]:
        return self.page.evaluate(f"() => {APP}.graph.serialize()")

    def overlaps(self) -> list[str]:
        """Pairs of nodes that lie on each other by more than a margin."""
        boxes = self.page.evaluate(f"""vue => {APP}.graph._nodes.map(node => {{
            const scale = {APP}.canvas.ds.scale
            const element = vue && document.querySelector(`[data-node-id="${{node.id}}"]`)
            if (element) {{
                const box = element.getBoundingClientRect()
                return [node.title, box.x / scale, box.y / scale, box.width / scale, box.height / scale]
            }}
            return [node.title, node.pos[0], node.pos[1] - 30, node.size[0], node.size[1] + 30]
        }})""", self.vue)
        return [f"{a[0]} and {b[0]}" for i, a in enumerate(boxes) for b in boxes[:i]
                if min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1]) > 5 and min(a[2] + a[4], b[2] + b[4]) - max(a[2], b[2]) > 5]
