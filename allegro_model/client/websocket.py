"""The part of a WebSocket client (RFC 6455) that listening needs. Nothing is lost when a message comes in pieces."""

from __future__ import annotations

import base64
import hashlib
import os
import socket
import ssl
import struct
import time
from collections.abc import Mapping

_CONTINUATION, _TEXT, _BINARY, _CLOSE, _PING, _PONG = 0, 1, 2, 8, 9, 10
_ACCEPT = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455, section 1.3
_MAX_HEAD = 2**16  # bytes of the server's first answer
MAX_MESSAGE = 2**26  # bytes; a preview has some thousands


class WebSocket:
    """A connection that was opened by a request of HTTP.

    Args:
        host, port: of the server.
        path: with the query.
        headers: further ones, e.g. for authorisation.
        tls: for wss.
        timeout: seconds to wait for the connection.
    Raises:
        OSError: it cannot be opened, or the server speaks no WebSocket.
    """

    def __init__(self, host: str, port: int, path: str, *, headers: Mapping[str, str] | None = None,
                 tls: ssl.SSLContext | None = None, timeout: float = 10) -> None:
        self._buffer = bytearray()
        self._parts: list[bytes] = []  # of a message that is not complete
        self._kind = 0
        self._socket = socket.create_connection((host, port), timeout)
        try:
            if tls is not None:
                self._socket = tls.wrap_socket(self._socket, server_hostname=host)
            self._open(f"[{host}]:{port}" if ":" in host else f"{host}:{port}", path, headers or {}, time.monotonic() + timeout)
        except BaseException:
            self._socket.close()
            raise

    def close(self) -> None:
        """Ends the connection."""
        self._socket.close()

    def send(self, text: str) -> None:
        """Sends a text message.

        Raises:
            OSError: the connection is broken.
        """
        self._send(_TEXT, text.encode())

    def receive(self, timeout: float) -> str | bytes | None:
        """The next message; None when none is complete after `timeout` seconds.

        Raises:
            OSError: the connection has ended, or breaks the rules.
        """
        end = time.monotonic() + timeout
        while True:
            frame = self._take_frame()
            if frame is None:
                if not self._fill(end):
                    return None
                continue
            message = self._handle(*frame)
            if message is not None:
                return message

    def _open(self, host: str, path: str, headers: Mapping[str, str], end: float) -> None:
        key = base64.b64encode(os.urandom(16)).decode()
        lines = {"Host": host, "Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Key": key,
                 "Sec-WebSocket-Version": "13", **headers}
        request = f"GET {path} HTTP/1.1\r\n" + "".join(f"{name}: {value}\r\n" for name, value in lines.items()) + "\r\n"
        self._socket.sendall(request.encode("latin-1"))
        while (length := self._buffer.find(b"\r\n\r\n")) < 0:
            if len(self._buffer) > _MAX_HEAD or not self._fill(end):
                raise ConnectionError("no answer to the request for a WebSocket")
        head = bytes(self._buffer[:length]).decode("latin-1").split("\r\n")
        del self._buffer[: length + 4]
        answers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:])}
        expected = base64.b64encode(hashlib.sha1((key + _ACCEPT).encode()).digest()).decode()
        if head[0].split()[1:2] != ["101"] or answers.get("sec-websocket-accept") != expected:
            raise ConnectionError(f"the server opens no WebSocket: {head[0][:100]}")

    def _fill(self, end: float) -> bool:
        """Reads what has come; False when nothing did until `end`."""
        self._socket.settimeout(max(0.001, end - time.monotonic()))
        try:
            data = self._socket.recv(2**16)
        except TimeoutError:
            return False
        if not data:
            raise ConnectionError("the server ended the connection")
        self._buffer += data
        return True

    def _take_frame(self) -> tuple[bool, int, bytes] | None:
        """(the message ends here, kind, content), once all of it is there."""
        data = self._buffer
        if len(data) < 2:
            return None
        if data[0] & 0x70 or data[1] & 0x80:
            raise ConnectionError("the server sent a frame that RFC 6455 does not allow")
        length, start = data[1], 2
        if length >= 126:
            form, start = (">H", 4) if length == 126 else (">Q", 10)
            if len(data) < start:
                return None
            (length,) = struct.unpack_from(form, data, 2)
        if length + sum(map(len, self._parts)) > MAX_MESSAGE:
            raise ConnectionError(f"the server sent a message of more than {MAX_MESSAGE} bytes")
        if len(data) < start + length:
            return None
        frame = bool(data[0] & 0x80), data[0] & 0x0F, bytes(data[start : start + length])
        del data[: start + length]
        return frame

    def _handle(self, final: bool, kind: int, content: bytes) -> str | bytes | None:
        """Answers what wants an answer; gives a message that is complete."""
        if kind == _PING:
            self._send(_PONG, content)
        elif kind == _CLOSE:
            raise ConnectionError("the server closed the connection")
        elif kind in (_CONTINUATION, _TEXT, _BINARY):
            if kind != _CONTINUATION:
                self._kind, self._parts = kind, []
            self._parts.append(content)
            if final:
                whole, self._parts = b"".join(self._parts), []
                return whole.decode("utf-8", "replace") if self._kind == _TEXT else whole
        return None

    def _send(self, kind: int, content: bytes) -> None:
        """One frame, masked as the standard wants it of clients."""
        mask = os.urandom(4)
        length = len(content)
        if length < 126:
            size = struct.pack(">B", 0x80 | length)
        else:
            size = struct.pack(">BH", 0x80 | 126, length) if length < 2**16 else struct.pack(">BQ", 0x80 | 127, length)
        masked = bytes(byte ^ mask[index % 4] for index, byte in enumerate(content))
        self._socket.settimeout(10)
        self._socket.sendall(bytes([0x80 | kind]) + size + mask + masked)
