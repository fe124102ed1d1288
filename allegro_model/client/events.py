"""What a server tells about a run while it works."""

from __future__ import annotations

import json
import math
import struct
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .websocket import WebSocket

# Kinds of binary messages. Source: BinaryEventTypes of ComfyUI's protocol.
_PREVIEW, _PREVIEW_WITH_METADATA = 1, 4
_ENDED = ("execution_success", "execution_error", "execution_interrupted")
_TICK_SECONDS = 0.25  # how soon a request to stop is noticed
_RETRY_SECONDS = 1.0  # between attempts to listen

Opener = Callable[[str], tuple[Any, ...]]


@dataclass(frozen=True)
class Event:
    """One message about a run.

    Attributes:
        node: id of the node that works; empty if none does yet.
        done, total: its steps; total 0 if it does not count any.
        preview: a picture, JPEG or PNG, or None.
        ahead: runs before this one in the queue, or None when it has begun.
    """

    node: str = ""
    done: int = 0
    total: int = 0
    preview: bytes | None = None
    ahead: int | None = None


class Listener:
    """Follows one run over a WebSocket, and opens it anew when it breaks.

    Args:
        prompt_id: of a run that was submitted with the same text as client_id.
        where: gives what a WebSocket needs for a path.
    """

    def __init__(self, prompt_id: str, where: Opener) -> None:
        self._prompt_id = prompt_id
        self._where = where
        self._socket: WebSocket | None = None
        self._node = ""

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *error: object) -> None:
        if self._socket is not None:
            self._socket.close()

    def follow(self, seconds: float, tell: Callable[[Event], None], stop: threading.Event) -> None:
        """Passes events on for some time, or until the run seems to have ended.

        Args:
            seconds: at most.
            tell: takes the events.
            stop: once it is set, this ends soon.
        """
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0 and not stop.is_set():
            try:
                if self._socket is None:
                    self._socket = self._open()
                message = self._socket.receive(min(left, _TICK_SECONDS))
            except OSError:  # the server tells how it is when it is asked; only the steps are missed
                self.__exit__()
                self._socket = None
                stop.wait(min(left, _RETRY_SECONDS))
                return
            if message is not None and self._ends(message, tell):
                return

    def _open(self) -> WebSocket:
        host, port, path, headers, tls = self._where(f"/ws?clientId={self._prompt_id}")
        socket = WebSocket(host, port, path, headers=headers, tls=tls)
        # Previews then say which run and node they belong to.
        socket.send(json.dumps({"type": "feature_flags", "data": {"supports_preview_metadata": True}}))
        return socket

    def _ends(self, message: str | bytes, tell: Callable[[Event], None]) -> bool:
        """Passes one message on; whether it is the last of the run."""
        if isinstance(message, bytes):
            event = self._preview(message)
            if event is not None:
                tell(event)
            return False
        try:
            found = json.loads(message)
            kind, data = found["type"], found["data"]
        except (ValueError, KeyError, TypeError, RecursionError):  # other nodes send what they like
            return False
        if not isinstance(data, dict) or data.get("prompt_id") != self._prompt_id:
            return False
        if kind in _ENDED or (kind == "executing" and data.get("node") is None):
            return True
        self._progress(kind, data, tell)
        return False

    def _progress(self, kind: str, data: Mapping[str, Any], tell: Callable[[Event], None]) -> None:
        node = str(data.get("node") or "")
        if kind == "executing":
            self._node = node
            tell(Event(node=node))
        elif kind == "progress":
            self._node = node or self._node
            tell(Event(self._node, _whole(data.get("value")), _whole(data.get("max"))))

    def _preview(self, message: bytes) -> Event | None:
        if len(message) < 8:
            return None
        kind, number = struct.unpack(">II", message[:8])
        if kind == _PREVIEW:  # `number` is the format of the picture, which its content tells as well
            return Event(self._node, preview=message[8:])
        if kind != _PREVIEW_WITH_METADATA:
            return None
        try:
            about = json.loads(message[8 : 8 + number])
        except (ValueError, RecursionError):
            return None
        if not isinstance(about, dict) or about.get("prompt_id") != self._prompt_id:
            return None
        return Event(str(about.get("node_id") or self._node), preview=message[8 + number :])


def _whole(value: object) -> int:
    return int(value) if isinstance(value, int | float) and math.isfinite(value) else 0
