"""A ComfyUI server, spoken to over HTTP. Whatever it says is checked; only the address given is ever contacted."""

from __future__ import annotations

import base64
import hashlib
import http.client
import json
import os
import re
import ssl
import threading
import time
import urllib.parse
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..atomic import atomic_file, check_free_space, writing
from ..errors import (
    AllegroError,
    Cancelled,
    PromptRefused,
    RunFailed,
    RunInterrupted,
    RunLost,
    ServerError,
    ServerUnreachable,
)
from .events import Event, Listener

Graph = dict[str, dict[str, Any]]
"""A workflow in API form: {node id: {"class_type": ..., "inputs": {...}}}."""

POLL_SECONDS = 5.0  # between questions to the server; events come at once
_MAX_JSON = 2**28
_CHUNK = 2**18
_SHOWN = 200  # characters of an answer that makes no sense
_CANCEL_SECONDS = 10.0


@dataclass(frozen=True)
class RemoteFile:
    """A file that a run left at the server; `node` is the one that wrote it."""

    node: str
    filename: str
    subfolder: str
    type: str


@dataclass(frozen=True)
class RunState:
    """What a server knows about a run.

    Attributes:
        status: "waiting", "running", "ended" or "unknown".
        ahead: runs before it in the queue, if it is waiting.
        entry: of the server's history, if it has ended.
    """

    status: str
    ahead: int = 0
    entry: Mapping[str, Any] | None = None


class ComfyServer:
    """A ComfyUI server.

    Args:
        url: http:// or https://, e.g. "http://127.0.0.1:8188"; a name and password in it are sent to this server.
        timeout: seconds to wait for an answer.
    Raises:
        AllegroError: the address cannot be used.
    """

    def __init__(self, url: str, *, timeout: float = 30.0) -> None:
        parts = urllib.parse.urlsplit(url if "://" in url else f"http://{url}")
        try:
            port = parts.port
        except ValueError:
            port = 0
        if parts.scheme not in ("http", "https") or not parts.hostname or port == 0 or parts.query:
            shown = re.sub(r"[^/]*@", "...@", url)  # without a password
            raise AllegroError(f"{shown!r} is no address of a server: expected one such as http://127.0.0.1:8188.")
        self._host, self._port = parts.hostname, port or (443 if parts.scheme == "https" else 80)
        self._prefix = parts.path.rstrip("/")
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._headers = {}
        if parts.username is not None:
            secret = f"{urllib.parse.unquote(parts.username)}:{urllib.parse.unquote(parts.password or '')}"
            self._headers["Authorization"] = "Basic " + base64.b64encode(secret.encode()).decode()
        host = f"[{self._host}]" if ":" in self._host else self._host
        self.url = f"{parts.scheme}://{host}:{self._port}{self._prefix}"
        self.timeout = timeout

    def __repr__(self) -> str:
        return f"ComfyServer({self.url!r})"

    # Runs

    def run(self, graph: Graph, on_event: Callable[[Event], None] | None = None) -> list[RemoteFile]:
        """Runs a graph and waits for it.

        Args:
            graph: in API form.
            on_event: called with every step and preview.
        Returns:
            what to give to `download`.
        Raises:
            PromptRefused, ServerError: as in `submit` and `wait`.
        """
        prompt_id = self.submit(graph)
        try:
            return self.wait(prompt_id, on_event)
        except KeyboardInterrupt:
            self.cancel(prompt_id)
            raise

    def submit(self, graph: Graph, prompt_id: str | None = None) -> str:
        """Puts a graph into the server's queue.

        Args:
            graph: in API form.
            prompt_id: a UUID of the caller's choice, so that it can ask for the run even if the answer is lost.
        Returns:
            the id of the run.
        Raises:
            PromptRefused: the server found something wrong with it, also if a part of it could be run.
            ServerError: it did not answer, or not as expected.
        """
        prompt_id = prompt_id or str(uuid.uuid4())
        # Events go to the socket of the id `client_id`: whoever knows the id of a run can listen to it.
        body = {"prompt": graph, "prompt_id": prompt_id, "client_id": prompt_id}
        answer = self._json("POST", "/prompt", body, allow=(400,))
        if answer.get("node_errors") or "prompt_id" not in answer:
            if "prompt_id" in answer:  # the server would run the sound part alone: a clip would be missing
                self.cancel(str(answer["prompt_id"]))
            with self._understanding("/prompt", answer):
                refusal = _refusal(graph, answer)
            raise PromptRefused(f"{self.url} refused the workflow: {refusal}")
        if answer["prompt_id"] != prompt_id:
            raise ServerError(f"{self.url} gave a run another id than it was asked for: it is older than ComfyUI 0.3.64. "
                              "Update it.")
        return prompt_id

    def state(self, prompt_id: str) -> RunState:
        """What became of a run.

        Raises:
            ServerError: the server did not answer, or not as expected.
        """
        for _ in range(2):  # between the first two questions it may go from the queue to the history
            entry = self._json("GET", f"/history/{urllib.parse.quote(prompt_id)}").get(prompt_id)
            if entry is not None:
                with self._understanding("/history", entry):
                    return RunState("ended", entry=_mapping(entry))
            queue = self._json("GET", "/queue")
            with self._understanding("/queue", queue):
                running = [item[1] for item in queue.get("queue_running", [])]
                waiting = [item[1] for item in sorted(queue.get("queue_pending", []), key=lambda item: (item[0], item[1]))]
            if prompt_id in running:
                return RunState("running")
            if prompt_id in waiting:
                return RunState("waiting", waiting.index(prompt_id) + len(running))
        return RunState("unknown")

    def wait(self, prompt_id: str, on_event: Callable[[Event], None] | None = None, *,
             stop: threading.Event | None = None, timeout: float | None = None) -> list[RemoteFile]:
        """Waits until a run has ended. Events only tell how far it is: what counts is what the server says when asked.

        Args:
            prompt_id: from `submit`.
            on_event: called with every step and preview.
            stop: once it is set, waiting ends; the run goes on.
            timeout: seconds the run may take, not counting the time in the queue.
        Returns:
            the files it saved, in the order of the server.
        Raises:
            RunFailed: it failed, was interrupted, or took too long; it is cancelled then.
            RunLost: the server knows nothing about it.
            ServerUnreachable: the server does not answer; the run may go on.
            Cancelled: `stop` was set.
        """
        stop = stop or threading.Event()
        tell = on_event or (lambda event: None)
        started: float | None = None
        with Listener(prompt_id, self._listen) as listener:
            while True:
                state = self.state(prompt_id)
                if state.entry is not None:
                    return self._results(state.entry)
                if state.status == "unknown":
                    raise RunLost(f"{self.url} does not know the run {prompt_id}: it was restarted, or its queue was "
                                  "cleared. Submit it again.")
                if state.status == "waiting":
                    tell(Event(ahead=state.ahead))
                elif started is None:
                    started = time.monotonic()
                listener.follow(POLL_SECONDS, tell, stop)
                if stop.is_set():
                    raise Cancelled(f"Waiting for the run {prompt_id} was stopped.")
                if timeout is not None and started is not None and time.monotonic() - started > timeout:
                    self.cancel(prompt_id)
                    raise RunFailed(f"{self.url} did not finish the run in {timeout:g} s, and it was cancelled. Allow more "
                                    "time, or make less of it.")

    def cancel(self, prompt_id: str) -> None:
        """Takes a run out of the queue, or stops it; no other run is touched.

        Raises:
            ServerError: the server did not answer.
        """
        end = time.monotonic() + _CANCEL_SECONDS
        while True:
            self._json("POST", "/queue", {"delete": [prompt_id]})
            self._json("POST", "/interrupt", {"prompt_id": prompt_id})
            if self.state(prompt_id).status in ("ended", "unknown") or time.monotonic() > end:
                return
            time.sleep(0.1)

    # Files

    def upload(self, path: str | os.PathLike[str]) -> str:
        """Puts a picture, video or sound into the server's input folder.

        Args:
            path: the file.
        Returns:
            its name there, for LoadImage and its like: one made of its content, so that equal files lie there once.
        Raises:
            AllegroError: the file cannot be read.
            ServerError: the server did not take it.
        """
        content, name = read_upload(path), upload_name(path)
        boundary = uuid.uuid4().hex
        head = (f'--{boundary}\r\nContent-Disposition: form-data; name="overwrite"\r\n\r\ntrue\r\n--{boundary}\r\n'
                f'Content-Disposition: form-data; name="image"; filename="{name}"\r\n'
                "Content-Type: application/octet-stream\r\n\r\n")
        body = head.encode() + content + f"\r\n--{boundary}--\r\n".encode()
        with self._open("POST", "/upload/image", body, f"multipart/form-data; boundary={boundary}") as answer:
            found = self._read_json(answer, "/upload/image")
        if found.get("name") != name:
            raise ServerError(f"{self.url} did not keep {path} as {name}. Is it a ComfyUI?")
        return name

    def download(self, file: RemoteFile, path: str | os.PathLike[str], *, force: bool = False) -> Path:
        """Fetches a file; it appears when it is complete.

        Args:
            file: from `run` or `wait`.
            path: where to put it.
            force: an existing file may be replaced.
        Raises:
            ServerError: it is gone, or the connection broke.
            OutputError: it cannot be written, or is larger than what the disk has left.
        """
        path = Path(path)
        query = urllib.parse.urlencode({"filename": file.filename, "subfolder": file.subfolder, "type": file.type})
        with atomic_file(path, force=force) as temporary, self._open("GET", f"/view?{query}") as answer:
            with writing(path):
                check_free_space(path, answer.length or 0)
                target = temporary.open("wb")
            with target:
                for chunk in self._chunks(answer):
                    with writing(path):
                        target.write(chunk)
        return path

    # HTTP

    def check(self) -> None:
        """Raises unless a ComfyUI answers.

        Raises:
            ServerError: no, or something else does.
        """
        if "queue_running" not in self._json("GET", "/queue"):
            raise ServerError(f"{self.url} is no ComfyUI: it has no queue. Check the address.")

    def _listen(self, path: str) -> tuple[str, int, str, dict[str, str], ssl.SSLContext | None]:
        """What a WebSocket for `path` needs."""
        return self._host, self._port, self._prefix + path, self._headers, self._tls

    @contextmanager
    def _open(self, method: str, path: str, body: bytes | None = None,
              content_type: str = "application/json", allow: tuple[int, ...] = ()) -> Iterator[http.client.HTTPResponse]:
        kind = http.client.HTTPConnection if self._tls is None else http.client.HTTPSConnection
        options: dict[str, Any] = {} if self._tls is None else {"context": self._tls}
        connection = kind(self._host, self._port, timeout=self.timeout, **options)
        try:
            with self._reaching():
                headers = {**self._headers, **({} if body is None else {"Content-Type": content_type})}
                connection.request(method, self._prefix + path, body, headers)
                answer = connection.getresponse()
            if answer.status != 200 and answer.status not in allow:
                self._refuse(answer, f"{method} {path.partition('?')[0]}")
            yield answer
        finally:
            connection.close()

    def _refuse(self, answer: http.client.HTTPResponse, request: str) -> None:
        if answer.status >= 500 or answer.status == 429:
            raise ServerUnreachable(f"{self.url} answered {request} with {answer.status} {answer.reason}. It may be starting "
                                    "or overloaded: try again.")
        if 300 <= answer.status < 400:
            raise ServerError(f"{self.url} sends {request} on to {answer.headers.get('Location', 'another address')!r}. "
                              "Give that address, if you trust it.")
        raise ServerError(f"{self.url} answered {request} with {answer.status} {answer.reason}. Check the address, and "
                          "whether the server wants a password.")

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        """Turns what goes wrong with the connection into an error about the server."""
        try:
            yield
        except ssl.SSLCertVerificationError as error:
            raise ServerError(f"{self.url} has no valid certificate: {error.verify_message}. Check the address.") from error
        except (OSError, http.client.HTTPException) as error:
            reason = str(error) or type(error).__name__
            raise ServerUnreachable(f"{self.url} cannot be reached: {reason}. Check the address, and that ComfyUI is "
                                    "running.") from error

    def _chunks(self, answer: http.client.HTTPResponse) -> Iterator[bytes]:
        expected = answer.length
        received = 0
        while True:
            with self._reaching():
                chunk = answer.read(_CHUNK)
                if not chunk and expected is not None and received < expected:
                    raise http.client.IncompleteRead(b"", expected - received)
            if not chunk:
                return
            received += len(chunk)
            yield chunk

    def _json(self, method: str, path: str, body: Any = None, allow: tuple[int, ...] = ()) -> dict[str, Any]:
        data = None if body is None else json.dumps(body).encode()
        with self._open(method, path, data, allow=allow) as answer:
            return self._read_json(answer, path)

    def _read_json(self, answer: http.client.HTTPResponse, path: str) -> dict[str, Any]:
        text = bytearray()
        for chunk in self._chunks(answer):
            text += chunk
            if len(text) > _MAX_JSON:
                raise ServerError(f"{self.url} sent more than {_MAX_JSON} bytes for {path}. Is it a ComfyUI?")
        if not text.strip():
            return {}  # what the queue answers to orders
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            raise ServerError(f"{self.url} did not answer {path} with JSON. Is it a ComfyUI?") from None
        with self._understanding(path, found):
            return _mapping(found)

    @contextmanager
    def _understanding(self, path: str, found: object) -> Iterator[None]:
        """Turns what fails when JSON is not shaped as a ComfyUI's into an error about the server."""
        try:
            yield
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise ServerError(f"{self.url} answered {path} with {repr(found)[:_SHOWN]}, which a ComfyUI does not. Check the "
                              "address.") from error

    def _results(self, entry: Mapping[str, Any]) -> list[RemoteFile]:
        """The files of a run that succeeded."""
        with self._understanding("/history", entry):
            status = entry.get("status") or {}
            if status.get("status_str", "success") == "success":
                return list(_files(entry.get("outputs") or {}))
            for kind, data in status.get("messages", []):
                if kind == "execution_interrupted":
                    raise RunInterrupted(f"{self.url}: somebody interrupted the run. Submit it again to do it all the same.")
                if kind == "execution_error":
                    raise RunFailed(f"{self.url}: node {data.get('node_id')} ({data.get('node_type')}) failed with "
                                    f"{data.get('exception_type')}: {str(data.get('exception_message')).strip()}")
        raise RunFailed(f"{self.url}: the run failed, and the server does not say why. Look into its log.")


def _mapping(found: Any) -> dict[str, Any]:
    if not isinstance(found, dict):
        raise TypeError("no JSON object")
    return found


def _files(outputs: Mapping[str, Any]) -> Iterator[RemoteFile]:
    """Every file that a node reports as saved; previews, which the server keeps for a while only, are left out."""
    for node, found in outputs.items():
        for items in found.values() if isinstance(found, dict) else ():
            for item in items if isinstance(items, list) else ():
                if isinstance(item, dict) and isinstance(item.get("filename"), str) and item.get("type") == "output":
                    yield RemoteFile(node, item["filename"], str(item.get("subfolder") or ""), "output")


def _refusal(graph: Graph, answer: Mapping[str, Any]) -> str:
    """What a server finds wrong with a graph, each thing once."""
    found = []
    for node, about in (answer.get("node_errors") or {}).items():
        where = f"node {node} ({graph.get(node, {}).get('class_type', about.get('class_type', 'unknown'))})"
        found += [f"{where}: {_what_is_wrong(error)}" for error in about.get("errors", [])]
    if found:
        return "; ".join(dict.fromkeys(found))
    error = answer.get("error") or {}
    words = [str(error.get(key, "")).strip() for key in ("message", "details")] if isinstance(error, dict) else [str(error)]
    return ": ".join(word for word in words if word) or "it does not say why"


def _what_is_wrong(error: Mapping[str, Any]) -> str:
    """One error of a node. What the node itself refuses comes once for each input that it looks at, after its name: "width - ..."."""
    details = str(error.get("details", ""))
    own = details.partition(" - ")[2] if error.get("type") == "custom_validation_failed" else ""
    return own or f"{error.get('message', '')}: {details}".rstrip(": ")


def read_upload(path: str | os.PathLike[str]) -> bytes:
    """The content of a file that is to be uploaded.

    Raises:
        AllegroError: it cannot be read.
    """
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise AllegroError(f"Cannot read {path}: {error.strerror or error}. Check the path.") from error


def upload_name(path: str | os.PathLike[str]) -> str:
    """The name a file gets at the server: the same for the same content, whatever it is called here.

    Raises:
        AllegroError: it cannot be read.
    """
    suffix = Path(path).suffix.lower()
    digest = hashlib.sha256(read_upload(path)).hexdigest()[:16]
    return f"allegro_{digest}{suffix if suffix[1:].isalnum() and suffix.isascii() else ''}"
