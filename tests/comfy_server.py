"""A ComfyUI on this machine as far as scripts see one, and every way in which it can fail. Nothing is computed."""

from __future__ import annotations

import base64
import hashlib
import json
import socket
import struct
import threading
import time
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

PREVIEW = b"\xff\xd8 a picture"


@dataclass
class FakeComfy:
    """A server that "runs" prompts one after the other; what a prompt says decides what happens to it.

    Words in a prompt: "refuse" (400), "half" (accepted with node_errors), "fail" (an execution error), "fail once", "forever"
    (until interrupted), "die" (a mortal server is gone while it runs it for the first time), "hold" (until `release` is set), "nothing" (no file).

    Attributes:
        faults: "METHOD /path" -> what happens at the next such requests: a status such as "500", "reset" (the connection
            breaks before the request is handled), "deaf" (handled, but the answer is lost), "cut" (half of the content), or JSON (the answer).
        steps: events of each run.
        runs: prompts that were begun, in this order.
        requests: "METHOD /path" of each.
        uploads: name -> content.
    """

    faults: dict[str, list[str]] = field(default_factory=dict)
    steps: int = 3
    step_seconds: float = 0.01
    mortal: bool = False
    dead_seconds: float | None = None  # until it is started again after a prompt has killed it; None for ever
    runs: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    uploads: dict[str, bytes] = field(default_factory=dict)
    release: threading.Event = field(default_factory=threading.Event)
    port: int = 0
    lock: Any = field(default_factory=threading.RLock)
    queue: list[list[Any]] = field(default_factory=list)
    history: dict[str, Any] = field(default_factory=dict)
    running: str = ""
    interrupted: threading.Event = field(default_factory=threading.Event)
    sockets: dict[str, socket.socket] = field(default_factory=dict)
    connections: set[socket.socket] = field(default_factory=set)
    life: int = 0  # a thread of an earlier life does nothing any more
    server: ThreadingHTTPServer | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Begins a life with an empty queue, at the port of the last one."""
        handler = type("Handler", (_Handler,), {"comfy": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", self.port), handler)
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]
        self.life += 1
        for target, args in ((self.server.serve_forever, (0.01,)), (self._work, (self.life,))):
            threading.Thread(target=target, args=args, daemon=True).start()

    def die(self) -> None:
        """Ends as a killed process does: connections break, queue and history are gone."""
        with self.lock:
            self.life += 1
            self.queue, self.history, self.running = [], {}, ""
            if self.server is not None:
                self.server.socket.close()
                threading.Thread(target=self.server.shutdown, daemon=True).start()
            for connection in list(self.connections):
                with suppress(OSError):
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    connection.shutdown(socket.SHUT_RDWR)
            self.sockets.clear()

    def submit(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        text = text_of(body["prompt"])
        problem = {"sampler": {"class_type": "AllegroSampler",
                               "errors": [{"message": "Value too small", "details": "steps: 0"}]}}
        if "refuse" in text:
            return 400, {"error": {"message": "Prompt outputs failed validation"}, "node_errors": problem}
        with self.lock:
            self.queue.append([len(self.requests), body["prompt_id"], body["prompt"], {"client_id": body["client_id"]}, []])
        return 200, {"prompt_id": body["prompt_id"], "number": 1, "node_errors": problem if "half" in text else {}}

    def state(self) -> dict[str, Any]:
        with self.lock:
            first = [item for item in self.queue if item[1] == self.running]
            return {"queue_running": first, "queue_pending": [item for item in self.queue if item not in first]}

    def delete(self, ids: list[str]) -> None:
        with self.lock:
            self.queue = [item for item in self.queue if item[1] not in ids or item[1] == self.running]

    def interrupt(self, prompt_id: str | None) -> None:
        if prompt_id in (None, self.running):
            self.interrupted.set()

    def say(self, prompt_id: str, kind: str, **data: Any) -> None:
        """An event, sent twice: listeners have to cope with that."""
        message = json.dumps({"type": kind, "data": {"prompt_id": prompt_id, **data}}).encode()
        for _ in range(2):
            self._send(prompt_id, 0x81, message)

    def _send(self, client: str, head: int, message: bytes) -> None:
        connection = self.sockets.get(client)
        size = bytes([len(message)]) if len(message) < 126 else bytes([126]) + struct.pack(">H", len(message))
        if connection is not None:
            with suppress(OSError):
                connection.sendall(bytes([head]) + size + message)

    def _work(self, life: int) -> None:
        while self.life == life:
            with self.lock:
                item = self.queue[0] if self.queue else None
                if item is not None:
                    self.running = item[1]
                    self.interrupted.clear()
                    self.runs.append(text_of(item[2]))
            if item is None:
                time.sleep(0.005)
                continue
            outcome = self._run(item[1], item[2], life)
            with self.lock:
                if self.life != life:
                    return
                self.queue.remove(item)
                self.running = ""
                self.history[item[1]] = outcome
            self.say(item[1], "executing", node=None)

    def _run(self, prompt_id: str, graph: dict[str, Any], life: int) -> dict[str, Any]:
        text = text_of(graph)
        self.say(prompt_id, "executing", node="sampler")
        for step in range(1, self.steps + 1):
            self.say(prompt_id, "progress", node="sampler", value=step, max=self.steps)
            about = json.dumps({"prompt_id": prompt_id, "node_id": "sampler"}).encode()
            self._send(prompt_id, 0x82, struct.pack(">II", 4, len(about)) + about + PREVIEW)
            time.sleep(self.step_seconds)
        if "die" in text and self.mortal and self.runs.count(text) == 1:
            self.die()
            if self.dead_seconds is not None:
                threading.Timer(self.dead_seconds, self.start).start()
        while self.life == life and not self.interrupted.is_set() and (
                "forever" in text or ("hold" in text and not self.release.is_set())):
            time.sleep(0.005)
        if self.interrupted.is_set():
            return entry("error", [["execution_interrupted", {"prompt_id": prompt_id}]])
        if "fail" in text and not ("once" in text and self.runs.count(text) > 1):
            return entry("error", [["execution_error", {"node_id": "sampler", "node_type": "AllegroSampler",
                                                        "exception_type": "RuntimeError", "exception_message": "too hot\n"}]])
        files = [] if "nothing" in text else [
            {"filename": f"{hashlib.sha256(text.encode()).hexdigest()[:8]}_{urllib.parse.quote(text)}.mp4", "subfolder": "video",
             "type": "output"}]
        return entry("success", [], {"save": {"images": files, "animated": [True]},
                                     "preview": {"images": [{"filename": "p.png", "subfolder": "", "type": "temp"}]}})

    def content(self, filename: str) -> bytes:
        return urllib.parse.unquote(filename.partition("_")[2].removesuffix(".mp4")).encode() * 100


def text_of(graph: dict[str, Any]) -> str:
    return str(graph["prompt"]["inputs"]["text"])


def entry(status: str, messages: list[Any], outputs: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"outputs": outputs or {}, "status": {"status_str": status, "completed": status == "success", "messages": messages}}


@contextmanager
def running(*comfys: FakeComfy) -> Iterator[None]:
    for comfy in comfys:
        comfy.start()
    try:
        yield
    finally:
        for comfy in comfys:
            comfy.release.set()
            comfy.die()


class _Handler(BaseHTTPRequestHandler):
    comfy: FakeComfy
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def setup(self) -> None:
        super().setup()
        self.life = self.comfy.life
        self.comfy.connections.add(self.connection)

    def finish(self) -> None:
        with suppress(OSError):
            super().finish()
        self.comfy.connections.discard(self.connection)

    def handle(self) -> None:
        with suppress(OSError):
            super().handle()

    def do_GET(self) -> None:
        self._answer(b"")

    def do_POST(self) -> None:
        self._answer(self.rfile.read(int(self.headers.get("Content-Length", 0))))

    def _answer(self, body: bytes) -> None:
        comfy, parts = self.comfy, urllib.parse.urlsplit(self.path)
        name = f"{self.command} {parts.path}"
        comfy.requests.append(name)
        fault = (comfy.faults.get(name) or comfy.faults.get(f"{self.command} *") or [""]).pop(0)
        if fault == "reset" or self.life != comfy.life:
            return self._break()
        if fault.isdecimal():
            return self._send(int(fault), b"no")
        if fault[:1] in ("[", "{"):
            return self._send(200, fault.encode())
        if parts.path == "/ws":
            return self._listen(urllib.parse.parse_qs(parts.query)["clientId"][0])
        status, answer = self._handle(parts, body)
        if fault == "deaf":
            return self._break()
        return self._send(status, answer, half=fault == "cut")

    def _handle(self, parts: urllib.parse.SplitResult, body: bytes) -> tuple[int, bytes]:
        comfy, query = self.comfy, dict(urllib.parse.parse_qsl(parts.query))
        if parts.path == "/view":
            return 200, comfy.content(query["filename"])
        if parts.path == "/upload/image":
            head, _, rest = body.partition(b'filename="')[2].partition(b'"')
            content = rest.partition(b"\r\n\r\n")[2].rpartition(b"\r\n--")[0]
            comfy.uploads[head.decode()] = content
            return 200, json.dumps({"name": head.decode(), "subfolder": "", "type": "input"}).encode()
        found: Any = {}
        status = 200
        if parts.path == "/prompt":
            status, found = comfy.submit(json.loads(body))
        elif parts.path == "/queue" and self.command == "POST":
            comfy.delete(json.loads(body)["delete"])
            return 200, b""
        elif parts.path == "/queue":
            found = comfy.state()
        elif parts.path == "/interrupt":
            comfy.interrupt(json.loads(body or b"{}").get("prompt_id"))
            return 200, b""
        elif parts.path.startswith("/history/"):
            key = parts.path.rpartition("/")[2]
            found = {key: comfy.history[key]} if key in comfy.history else {}
        return status, json.dumps(found).encode()

    def _listen(self, client: str) -> None:
        key = self.headers["Sec-WebSocket-Key"] + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
        self.send_response(101)
        for name, value in (("Upgrade", "websocket"), ("Connection", "Upgrade"),
                            ("Sec-WebSocket-Accept", base64.b64encode(hashlib.sha1(key.encode()).digest()).decode())):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.flush()
        self.comfy.sockets[client] = self.connection
        while self.comfy.life == self.life and self.connection.recv(4096):
            pass
        self.close_connection = True

    def _send(self, status: int, body: bytes, *, half: bool = False) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if half else body)
        if half:
            self._break()

    def _break(self) -> None:
        self.close_connection = True
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)
