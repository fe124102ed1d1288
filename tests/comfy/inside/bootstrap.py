"""Starts ComfyUI's modules without its server, loads this extension, and runs checks; prints nothing.

    python bootstrap.py COMFYUI BASE_DIRECTORY RESULT.json FILE.CHECK ...

Each CHECK, a function of FILE.py in this folder, is called with a `Host`, in inference mode as ComfyUI calls the nodes of a
graph. RESULT.json: {CHECK: null, the traceback, or "skipped: " and the reason}.
"""

import asyncio
import gc
import importlib
import importlib.util
import json
import logging
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

PACK = Path(__file__).resolve().parents[3]
PACK_NAME = "custom_nodes_allegro"


class Skipped(Exception):
    """What a check needs is absent; the message says what."""


@contextmanager
def only_new_objects() -> Iterator[None]:
    """Inside, collections of garbage look at what was made since, not at all that ComfyUI imports, which takes a second."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


class Host:
    """A loaded ComfyUI with this extension in it."""

    def __init__(self, comfyui: Path, base: Path) -> None:
        sys.argv = ["main.py", "--cpu", "--base-directory", str(base)]
        sys.path.insert(0, str(comfyui))
        options = importlib.import_module("comfy.options")
        options.enable_args_parsing()
        self.folder_paths = importlib.import_module("folder_paths")
        self.base = base
        self.log: list[str] = []
        self.own_warnings: list[str] = []  # of this extension, in the check that runs
        root = logging.getLogger()
        root.addHandler(_Collect(self.log, self.own_warnings))
        root.setLevel(logging.INFO)
        logging.captureWarnings(True)
        importlib.import_module("utils.extra_config")  # first, as main.py does: nodes.py puts another `utils` in front
        importlib.import_module("server")
        self.core = importlib.import_module("nodes")
        start = time.process_time()  # of this process alone: the machine may be busy
        self.pack = load_pack(PACK_NAME, PACK)
        extension = asyncio.run(self.pack.comfy_entrypoint())
        nodes = asyncio.run(extension.get_node_list())
        self.import_seconds = time.process_time() - start
        self.import_warnings = self.own_warnings.copy()
        self.nodes = {node.define_schema().node_id: node for node in nodes}

    def module(self, name: str) -> ModuleType:
        """A module of the pack, e.g. "nodes.bridge.model"."""
        return importlib.import_module(f"{self.pack.__name__}.{name}")

    def run(self, node_id: str, **inputs: Any) -> Any:
        """Executes one of our nodes; the result of its first output."""
        return self.nodes[node_id].execute(**inputs).args[0]

    def extra(self, module: str, class_name: str) -> Any:
        """A node class of ComfyUI outside its nodes.py."""
        return getattr(importlib.import_module(f"comfy_extras.{module}"), class_name)


def call(node: Any, **inputs: Any) -> Any:
    """Executes a node of ComfyUI, of the old or the new kind; the first output."""
    if hasattr(node, "define_schema"):
        return node.execute(**inputs).args[0]
    return getattr(node(), node.FUNCTION)(**inputs)[0]


def load_pack(name: str, folder: Path) -> ModuleType:
    """Imports a pack of custom nodes the way ComfyUI does."""
    spec = importlib.util.spec_from_file_location(name, folder / "__init__.py", submodule_search_locations=[str(folder)])
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


class _Collect(logging.Handler):
    def __init__(self, lines: list[str], own_warnings: list[str]) -> None:
        super().__init__()
        self.lines, self.own_warnings = lines, own_warnings

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        self.lines.append(f"{record.levelname} {message}")
        ours = record.name.startswith(PACK_NAME) or (record.name == "py.warnings" and str(PACK) in message)
        if ours and record.levelno >= logging.WARNING:
            self.own_warnings.append(f"{record.name}: {message}")


def main(comfyui: str, base: str, result: str, *checks: str) -> None:
    names = dict(reversed(check.split(".")) for check in checks)
    found: dict[str, str | None] = {}
    try:
        host = Host(Path(comfyui), Path(base))
        inference_mode = importlib.import_module("torch").inference_mode
        sys.modules["bootstrap"] = sys.modules["__main__"]
        modules = {file: importlib.import_module(file) for file in dict.fromkeys(names.values())}
    except BaseException:  # noqa: BLE001 (reported, whatever it is)
        found = dict.fromkeys(names, traceback.format_exc())
        Path(result).write_text(json.dumps(found))
        return
    for name, file in names.items():
        start = time.perf_counter()
        host.log.clear()
        host.own_warnings.clear()
        try:
            with inference_mode():
                getattr(modules[file], name)(host)
            found[name] = None
        except Skipped as reason:
            found[name] = f"skipped: {reason}"
        except BaseException:  # noqa: BLE001
            found[name] = traceback.format_exc() + "\n".join(["", "log:", *host.log[-20:]])
        found[f"seconds {name}"] = f"{time.perf_counter() - start:.2f}"
        Path(result).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
