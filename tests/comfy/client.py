"""A ComfyUI server as a child process, and its HTTP interface. Standard library only."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PACK = Path(__file__).resolve().parents[2]


def child_environment() -> dict[str, str]:
    """The environment of a ComfyUI process: without this folder on the path, where nodes/ would hide nodes.py."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
    paths = [p for p in env.pop("PYTHONPATH", "").split(os.pathsep) if p and Path(p).resolve() != PACK]
    if paths:
        env["PYTHONPATH"] = os.pathsep.join(paths)
    return {**env, "OMP_NUM_THREADS": env.get("OMP_NUM_THREADS", "1"), "PYTHONUNBUFFERED": "1"}


@dataclass(frozen=True)
class ComfyUI:
    """A checkout and the interpreter that has its requirements."""

    path: Path
    python: str

    @property
    def version(self) -> str:
        return (self.path / "comfyui_version.py").read_text(encoding="utf-8").split('"')[1]


def find_comfyui() -> list[ComfyUI]:
    """From COMFYUI_PATH (several separated as in PATH) and COMFYUI_PYTHON, else ~/comfy/ComfyUI*."""
    given = os.environ.get("COMFYUI_PATH")
    paths = [Path(p) for p in given.split(os.pathsep)] if given else sorted((Path.home() / "comfy").glob("ComfyUI*"))
    found = []
    for path in paths:
        if (path / "main.py").is_file():
            beside = [path / "venv/bin/python", path / ".venv/bin/python", path.parent / "venv/bin/python"]
            python = os.environ.get("COMFYUI_PYTHON") or next((str(p) for p in beside if p.exists()), sys.executable)
            found.append(ComfyUI(path, python))
    return found


class PromptRefused(AssertionError):
    """HTTP 400 of POST /prompt; `answer` holds error and node_errors."""

    def __init__(self, answer: dict[str, Any]) -> None:
        super().__init__(json.dumps(answer)[:2000])
        self.answer = answer

    @property
    def details(self) -> str:
        """Everything the user would read."""
        return "\n".join(e["details"] + " " + e["message"] for node in self.answer["node_errors"].values()
                         for e in node["errors"])


@dataclass
class Server:
    """A running ComfyUI; without further options it leaves out the nodes that ask services, which take seconds to load."""

    comfyui: ComfyUI
    base: Path
    extra: list[str] = field(default_factory=lambda: ["--disable-api-nodes"])
    process: subprocess.Popen[bytes] | None = None
    port: int = 0
    forgotten: list[str] | None = None  # the last prompt that had run when all was forgotten

    def start(self, timeout: float = 600) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        command = [
            self.comfyui.python, str(self.comfyui.path / "main.py"), "--cpu", "--port", str(self.port),
            "--base-directory", str(self.base), "--disable-auto-launch", "--preview-method", "latent2rgb",
            "--database-url", f"sqlite:///{self.base / 'comfyui.db'}", *self.extra,
        ]
        self.log_file = self.base / f"server-{self.port}.log"
        with self.log_file.open("wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=self.environment(),
                                            cwd=self.base)
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            if self.process.poll() is not None:
                raise AssertionError(f"ComfyUI ended with {self.process.returncode}:\n{self.log[-3000:]}")
            try:
                self.get("/queue")
                return
            except OSError:
                time.sleep(0.2)
        raise AssertionError(f"ComfyUI did not answer in {timeout} s:\n{self.log[-3000:]}")

    def environment(self) -> dict[str, str]:
        """That of the process. A checkout that serves the folder `templates` of comfyui-workflow-templates ends at start-up
        with a newer release of that package, which has none: it gets an empty one in front."""
        env = child_environment()
        if "iter_templates" in (self.comfyui.path / "app" / "frontend_management.py").read_text(encoding="utf-8"):
            return env
        stand_in = self.base / "stand-in"
        package = stand_in / "comfyui_workflow_templates"
        (package / "templates").mkdir(parents=True, exist_ok=True)
        (package / "__init__.py").touch()
        (package / "templates" / "index.json").write_text("[]", encoding="utf-8")
        return {**env, "PYTHONPATH": os.pathsep.join(filter(None, (str(stand_in), env.get("PYTHONPATH"))))}

    def stop(self) -> None:
        if self.process is not None:
            self.process.terminate()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()

    @property
    def log(self) -> str:
        return self.log_file.read_text(encoding="utf-8", errors="replace")

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def fetch(self, path: str, body: Any = None) -> bytes:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.read()

    def get(self, path: str) -> Any:
        return json.loads(self.fetch(path))

    def submit(self, graph: dict[str, Any], client_id: str | None = None) -> str:
        """Queues a graph in API form, reported to a WebSocket of `client_id` if given; the id of the prompt."""
        body = {"prompt": graph} if client_id is None else {"prompt": graph, "client_id": client_id}
        try:
            return json.loads(self.fetch("/prompt", body))["prompt_id"]
        except urllib.error.HTTPError as error:
            raise PromptRefused(json.loads(error.read())) from error

    def wait(self, prompt_id: str, timeout: float = 900) -> dict[str, Any]:
        """The entry of /history once the prompt is done, whatever became of it."""
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            history = self.get(f"/history/{prompt_id}")
            if prompt_id in history:
                return history[prompt_id]
            time.sleep(0.1)
        raise AssertionError(f"{prompt_id} did not finish in {timeout} s:\n{self.log[-3000:]}")

    def run(self, graph: dict[str, Any]) -> dict[str, Any]:
        """Runs a graph and demands success; the outputs of its nodes."""
        entry = self.wait(self.submit(graph))
        assert entry["status"]["status_str"] == "success", f"{error_of(entry)}\n{self.log[-3000:]}"
        return entry["outputs"]

    def view(self, entry: dict[str, str]) -> bytes:
        """A file that a node reported."""
        query = urllib.parse.urlencode({k: entry[k] for k in ("filename", "subfolder", "type")})
        return self.fetch(f"/view?{query}")

    def forget(self) -> None:
        """Unloads models and drops cached outputs, unless nothing has run since the last time."""
        last = list(self.get("/history?max_items=1"))
        if last != self.forgotten:
            self.fetch("/free", {"unload_models": True, "free_memory": True})
            time.sleep(1.5)
            self.forgotten = last


def error_of(entry: dict[str, Any]) -> str:
    """The message of a failed prompt, with the type of the exception."""
    for kind, data in entry["status"]["messages"]:
        if kind == "execution_error":
            return f"{data['exception_type']}: {data['exception_message']}"
        if kind == "execution_interrupted":
            return "interrupted"
    return ""
