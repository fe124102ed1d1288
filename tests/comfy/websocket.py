"""A minimal WebSocket client (RFC 6455), enough to listen to ComfyUI. Standard library only."""

import base64
import json
import os
import socket
import struct
from collections.abc import Iterator
from typing import Any

TEXT, BINARY, CLOSE, PING, PONG = 1, 2, 8, 9, 10


class WebSocket:
    """A connection to ComfyUI's /ws.

    Args:
        port: of the server.
        client_id: prompts sent with the same id are reported here.
    """

    def __init__(self, port: int, client_id: str, timeout: float = 120) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout)
        self._stream = self._socket.makefile("rb")
        key = base64.b64encode(os.urandom(16)).decode()
        self._socket.sendall((
            f"GET /ws?clientId={client_id} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nUpgrade: websocket\r\n"
            f"Connection: Upgrade\r\nSec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n").encode())
        status = self._stream.readline()
        assert b"101" in status, status
        while self._stream.readline().strip():
            pass  # the other headers

    def close(self) -> None:
        self._stream.close()
        self._socket.close()

    def send(self, message: dict[str, Any]) -> None:
        self._send(TEXT, json.dumps(message).encode())

    def messages(self) -> Iterator[dict[str, Any] | bytes]:
        """Everything the server says: JSON as a dictionary, binary messages as they are."""
        while True:
            kind, content = self._frame()
            if kind == PING:
                self._send(PONG, content)
            elif kind == TEXT:
                yield json.loads(content)
            elif kind == BINARY:
                yield content
            elif kind == CLOSE:
                return

    def _frame(self) -> tuple[int, bytes]:
        """One message; ComfyUI does not split any, and servers do not mask."""
        first, length = self._stream.read(2)
        assert first & 0x80, "a message in several frames"
        if length >= 126:
            form = ">H" if length == 126 else ">Q"
            (length,) = struct.unpack(form, self._stream.read(struct.calcsize(form)))
        return first & 0x0F, self._stream.read(length)

    def _send(self, kind: int, content: bytes) -> None:
        """Clients have to mask what they send; a mask of zeros changes nothing."""
        size = bytes([0x80 | len(content)]) if len(content) < 126 else bytes([0x80 | 126]) + struct.pack(">H", len(content))
        self._socket.sendall(bytes([0x80 | kind]) + size + bytes(4) + content)
