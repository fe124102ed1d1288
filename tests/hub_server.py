"""A model hub on this machine: what huggingface_hub expects of one, and every way in which it can fail."""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """Files, and what goes wrong with them.

    Attributes:
        files: (repository, path) -> content.
        faults: path -> what happens at the next requests for its content, one after the other: a status such as "503" or
            "429 Retry-After: 1", "cut N" (the connection ends after N bytes), "reset N" (it breaks), "stall N" (nothing
            comes any more), "whole" (a range is ignored), "wrong" (other bytes), "longer" (more bytes), "shift" (another
            range).
        head_faults: the same for questions about a file, statuses and "stall" only.
        etags: path -> an ETag in place of the true one.
        requests: (method, path, range header or "") of every request for a file or its content.
        served: path -> bytes of content sent.
    """

    files: dict[tuple[str, str], bytes]
    faults: dict[str, list[str]] = field(default_factory=dict)
    head_faults: dict[str, list[str]] = field(default_factory=dict)
    etags: dict[str, str] = field(default_factory=dict)
    requests: list[tuple[str, str, str]] = field(default_factory=list)
    served: dict[str, int] = field(default_factory=dict)
    port: int = 0
    hung_up: threading.Event = field(default_factory=threading.Event)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def etag(self, path: str, content: bytes) -> str:
        if path in self.etags:
            return self.etags[path]
        if path.endswith(".safetensors"):
            return hashlib.sha256(content).hexdigest()
        return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()

    def contents(self) -> list[tuple[str, str]]:
        """(path, range) of the requests for content."""
        return [(path, span) for method, path, span in self.requests if method == "GET"]


@contextmanager
def running(hub: Hub) -> Iterator[Hub]:
    """The hub, served on a free port."""
    handler = type("Handler", (_Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        hub.port = server.server_address[1]
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        try:
            yield hub
        finally:
            hub.hung_up.set()
            server.shutdown()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(head=True)

    def do_GET(self) -> None:
        self._answer(head=False)

    def _answer(self, *, head: bool) -> None:
        content_of = re.fullmatch(r"/cdn/(.+?)/(.+)", self.path)
        asked = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.path)
        if content_of:  # the store of large files, on a host of its own
            repository, path = content_of.group(1).replace("--", "/"), content_of.group(2)
            self._send_content(path, self.hub.files[repository, path], head=head)
        elif asked:
            self._resolve(*asked.groups(), head=head)
        else:
            self._refuse(404)

    def _resolve(self, repository: str, revision: str, path: str, *, head: bool) -> None:
        if head:
            self.hub.requests.append(("HEAD", path, ""))
            fault = (self.hub.head_faults.get(path) or [""]).pop(0)
            if fault == "stall":
                self.hub.hung_up.wait(30)
            elif fault:
                return self._refuse(int(fault[:3]), fault[4:])
        content = self.hub.files.get((repository, path))
        if content is None:
            return self._refuse(404, "X-Error-Code: EntryNotFound")
        etag = self.hub.etag(path, content)
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{etag}"'}
        if not path.endswith(".safetensors"):
            return self._send_content(path, content, head=head, headers=headers)
        store = f"http://localhost:{self.hub.port}/cdn/{repository.replace('/', '--')}/{path}"
        self._head(302, {**headers, "X-Linked-ETag": f'"{etag}"', "X-Linked-Size": str(len(content)), "Location": store,
                         "Content-Length": "0"})
        return None

    def _send_content(self, path: str, content: bytes, *, head: bool, headers: dict[str, str] | None = None) -> None:
        span = self.headers.get("Range", "")
        fault = ""
        if not head:
            self.hub.requests.append(("GET", path, span))
            fault = (self.hub.faults.get(path) or [""]).pop(0)
        if re.match(r"\d{3}", fault):
            return self._refuse(int(fault[:3]), fault[4:])
        if fault == "wrong":
            content = bytes(len(content))
        if fault == "longer":
            content += b"more"
        start = int(span[6:-1]) if span and fault != "whole" else 0
        if fault == "shift":
            start -= 1
        body = content[start:]
        partial = {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"} if start else {}
        self._head(206 if start else 200, {**(headers or {}), **partial, "Content-Length": str(len(body))})
        if not head:
            self._write(path, body, fault)
        return None

    def _write(self, path: str, body: bytes, fault: str) -> None:
        kind, _, count = fault.partition(" ")
        if kind in ("cut", "reset", "stall"):
            body = body[: int(count)]
            self.close_connection = True
        self.hub.served[path] = self.hub.served.get(path, 0) + len(body)
        try:
            self.wfile.write(body)
            self.wfile.flush()
        except OSError:  # the other side had enough
            self.close_connection = True
        if kind == "stall":
            self.hub.hung_up.wait(30)
        if kind == "reset":
            import socket
            import struct
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()

    def _head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def _refuse(self, status: int, header: str = "") -> None:
        name, _, value = header.partition(": ")
        body = b'{"error": "no"}'
        self._head(status, {**({name: value} if value else {}), "Content-Type": "application/json",
                            "Content-Length": str(len(body))})
        if self.command != "HEAD":
            self.wfile.write(body)
