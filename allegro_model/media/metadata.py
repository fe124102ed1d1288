"""The settings a clip was made with, as JSON inside the clip.

The JSON object sits under the one key "allegro" of a comment, so that programs which look for other
applications' keys (a graph called "prompt" or "workflow") do not take ours for theirs. Places: the comment
tag of .mp4 and .webm, a comment block of .gif, a tEXt chunk "Comment" of .png.
"""

from __future__ import annotations

import json
import os
import re
import struct
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from ..errors import AllegroError
from .ffmpeg import run, source

_KEY = "allegro"
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_KEYWORD = b"Comment"
# Tags that every writer sets for itself.
_OWN_TAGS = ("comment", "encoder", "major_brand", "minor_version", "compatible_brands", "duration")
_GIF_TRAILER = b"\x3b"
_GIF_COMMENT = b"\x21\xfe"


def to_comment(metadata: Mapping[str, Any]) -> str:
    """The comment to store: ASCII, one line, since some containers mangle anything else."""
    return json.dumps({_KEY: dict(metadata)}, ensure_ascii=True, separators=(",", ":"))


def from_comment(comment: str) -> dict[str, Any]:
    """The settings in a comment; empty when it is not one of ours."""
    try:
        found = json.loads(comment)
    except ValueError:
        return {}
    inner = found.get(_KEY) if isinstance(found, dict) else None
    return inner if isinstance(inner, dict) else {}


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads back the settings stored by a clip writer.

    Args:
        path: a .mp4, .webm or .gif clip, or one .png picture.
    Returns:
        what was given to the writer as `metadata`; empty when the file holds none.
    Raises:
        AllegroError: the file is missing or cannot be read.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            head = file.read(8)
            file.seek(0)
            if head == PNG_SIGNATURE:
                return from_comment(_png_comment(file))
            if head[:3] == b"GIF":
                return from_comment(_gif_comment(file))
    except OSError as error:
        raise AllegroError(f"Cannot read {path}: {error.strerror}. Check the path.") from error
    except (struct.error, zlib.error, ValueError, IndexError):
        return {}  # a damaged picture has no settings to show
    return from_comment(_container_comment(path))


# .mp4 and .webm


def ffmetadata(metadata: Mapping[str, Any]) -> str:
    """The text of an ffmetadata file; a file, because a prompt may be longer than a command line can be."""
    comment = to_comment(metadata)
    for special in "\\=;#\n":
        comment = comment.replace(special, "\\" + special)
    return f";FFMETADATA1\ncomment={comment}\n"


def foreign_tags(path: Path) -> str:
    """Tags of a container that other programs have put there, as lines of an ffmetadata file; empty if there are none."""
    _, output, _ = run(["-v", "error", *source(path), "-f", "ffmetadata", "-"])
    text = re.split(r"^\[", output.decode("utf-8", "replace"), maxsplit=1, flags=re.MULTILINE)[0]  # without chapters
    tags = re.findall(r"^([^;=\n][^=\n]*)=((?:\\\n|.)*)$", text, re.MULTILINE)
    return "".join(f"{key}={value}\n" for key, value in tags if key.lower() not in _OWN_TAGS)


def _container_comment(path: Path) -> str:
    _, output, _ = run(["-v", "error", *source(path), "-f", "ffmetadata", "-"])
    text = output.decode("utf-8", "replace")
    for line in text.replace("\\\n", "").splitlines():
        key, _, value = line.partition("=")
        if key.lower() == "comment":
            return _unescape(value)
    return ""


def _unescape(value: str) -> str:
    result, escaped = [], False
    for char in value:
        if char == "\\" and not escaped:
            escaped = True
            continue
        result.append(char)
        escaped = False
    return "".join(result)


# .gif


def append_gif_comment(path: Path, metadata: Mapping[str, Any]) -> None:
    """Adds a comment block at the end of a finished GIF; ffmpeg writes none."""
    data = to_comment(metadata).encode("ascii")
    blocks = (data[i:i + 255] for i in range(0, len(data), 255))
    with open(path, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(_GIF_COMMENT + b"".join(bytes([len(b)]) + b for b in blocks) + b"\0" + _GIF_TRAILER)


def _gif_comment(file: IO[bytes]) -> str:
    """The last comment of a GIF. Source: the GIF89a specification, section "Grammar"."""
    header = file.read(13)
    _skip_color_table(file, header[10])
    comment = b""
    while (kind := file.read(1)) in (b"\x21", b"\x2c"):
        if kind == b"\x2c":  # image: descriptor, colours, code size, data
            _skip_color_table(file, file.read(9)[8])
            file.read(1)
            _gif_blocks(file)
        elif kind + file.read(1) == _GIF_COMMENT:
            comment = _gif_blocks(file)
        else:
            _gif_blocks(file)
    return comment.decode("ascii", "replace")


def _skip_color_table(file: IO[bytes], flags: int) -> None:
    if flags & 0x80:
        file.seek(3 << ((flags & 7) + 1), os.SEEK_CUR)


def _gif_blocks(file: IO[bytes]) -> bytes:
    data = []
    while (size := file.read(1)) not in (b"", b"\0"):
        data.append(file.read(size[0]))
    return b"".join(data)


# .png


def png_chunk(kind: bytes, data: bytes) -> bytes:
    """One PNG chunk: length, kind, data, checksum."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_comment(metadata: Mapping[str, Any]) -> bytes:
    """A tEXt chunk; the comment is ASCII, so Latin-1 text is enough."""
    return png_chunk(b"tEXt", _PNG_KEYWORD + b"\0" + to_comment(metadata).encode("ascii"))


def _png_chunks(file: IO[bytes]) -> Iterator[tuple[bytes, bytes]]:
    file.seek(len(PNG_SIGNATURE))
    while len(head := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        if kind == b"IDAT":  # our comment stands before the pixels
            return
        yield kind, file.read(length)
        file.seek(4, os.SEEK_CUR)


def _png_comment(file: IO[bytes]) -> str:
    for kind, data in _png_chunks(file):
        keyword, _, text = data.partition(b"\0")
        if kind == b"tEXt" and keyword == _PNG_KEYWORD:
            return text.decode("ascii", "replace")
    return ""
