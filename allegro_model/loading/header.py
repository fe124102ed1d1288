"""The header of a safetensors file: read and checked before anything is allocated or mapped.

A file starts with 8 bytes (length of the header, little endian), then the header as JSON, then the tensors
without gaps. Source: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError, UnsupportedCheckpoint
from ..quantised import Layout

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
_SNIFF_BYTES = 1024

# Name in the header -> torch dtype. Formats that plain torch cannot hold (4 and 6 bit) are left out.
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    """Shape and storage type of one tensor, known without reading it.

    Attributes:
        shape: of what it stands for.
        dtype: of its elements; uint8 for one that is packed in blocks.
        layout: of the blocks; None for ordinary tensors.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: Layout | None = None

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        if self.layout is not None:
            return self.layout.row_bytes(self.num_elements)
        return self.num_elements * self.dtype.itemsize

    @property
    def stored_as(self) -> str:
        """For people: "bfloat16", "Q8_0"."""
        return self.layout.name if self.layout is not None else str(self.dtype).removeprefix("torch.")


@dataclass(frozen=True)
class FileHeader:
    """What one file of weights says about itself."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]


def read_file_header(path: Path) -> FileHeader:
    """Reads and checks the header of one safetensors file; no tensor is touched.

    Args:
        path: an existing file.
    Raises:
        CheckpointError: the file cannot be opened.
        UnsupportedCheckpoint: not a safetensors file (the message says what it looks like), truncated, or
            with a header that does not describe the bytes that follow it.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(_SNIFF_BYTES)
            length = int.from_bytes(start[:8], "little")
            # Only a real header has "{" here; every other format is told apart by its first bytes.
            if start[8:9] != b"{" or length > MAX_HEADER_BYTES:
                raise UnsupportedCheckpoint(_explain_foreign(path, start, size))
            if 8 + length > size:
                raise truncated(path, 8 + length, size)
            file.seek(8)
            raw = file.read(length)
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read: {error.strerror or error}. Check the path and its permissions."
        ) from error
    header = _parse_json(path, raw)
    metadata = _parse_metadata(path, header.pop("__metadata__", {}))
    return FileHeader(_parse_tensors(path, header, 8 + length, size), metadata)


def _parse_json(path: Path, raw: bytes) -> dict[str, Any]:
    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise ValueError("a name occurs twice")
        return result

    try:
        header = json.loads(raw, object_pairs_hook=no_duplicates)
    except (ValueError, RecursionError) as error:
        raise damaged(path, f"its header is not valid JSON ({error})") from error
    if not isinstance(header, dict):
        raise damaged(path, "its header is not a JSON object")
    return header


def _parse_metadata(path: Path, metadata: object) -> dict[str, str]:
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise damaged(path, "its metadata is not a table of strings")
    return metadata


def _parse_tensors(path: Path, header: dict[str, Any], data_start: int, size: int) -> dict[str, TensorInfo]:
    """Checks every entry, and that the tensors fill the data section exactly: no overlap, no gap, no rest."""
    spans: list[tuple[int, int, str]] = []
    tensors: dict[str, TensorInfo] = {}
    for name, entry in header.items():
        info, begin, end = _parse_entry(path, name, entry)
        tensors[name] = info
        spans.append((begin, end, name))
    position = 0
    data_bytes = size - data_start
    for begin, end, name in sorted(spans):
        if begin != position:
            problem = "overlaps the tensor before it" if begin < position else "leaves a gap before it"
            raise damaged(path, f"tensor {short(name)} {problem}")
        position = end
    if position > data_bytes:
        raise truncated(path, data_start + position, size)
    if position < data_bytes:
        raise damaged(path, f"{data_bytes - position} bytes follow the last tensor")
    return tensors


def _parse_entry(path: Path, name: str, entry: object) -> tuple[TensorInfo, int, int]:
    if not isinstance(entry, dict):
        raise damaged(path, f"the entry of tensor {short(name)} is not a JSON object")
    dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise UnsupportedCheckpoint(
            f"{path}: tensor {short(name)} is stored as {short(dtype)}, expected one of "
            f"{', '.join(DTYPES)}. "
            "Use a bf16, fp16, fp32 or fp8 version of the file."
        )
    if not isinstance(shape, list) or not _are_sizes(shape):
        raise damaged(path, f"tensor {short(name)} has the shape {short(shape)}")
    if (
        not isinstance(offsets, list)
        or len(offsets) != 2
        or not _are_sizes(offsets)
        or offsets[0] > offsets[1]
    ):
        raise damaged(path, f"tensor {short(name)} has the offsets {short(offsets)}")
    info = TensorInfo(tuple(shape), DTYPES[dtype])
    if info.num_bytes != offsets[1] - offsets[0]:
        raise damaged(
            path,
            f"tensor {short(name)} of shape {list(shape)} and type {dtype} needs "
            f"{info.num_bytes} bytes, the header gives it {offsets[1] - offsets[0]}",
        )
    return info, offsets[0], offsets[1]


def _are_sizes(values: list[Any]) -> bool:
    # bool is an int in Python, and `true` is not a size
    return all(type(n) is int and 0 <= n < 2**63 for n in values)


def short(value: object) -> str:
    """A value of a file in a message, whatever its length."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def damaged(path: Path, why: str, *, kind: str = "safetensors") -> UnsupportedCheckpoint:
    """The error for a header that contradicts itself."""
    return UnsupportedCheckpoint(f"{path} is not a valid {kind} file: {why}. Download it again.")


def truncated(path: Path, expected: int, found: int) -> UnsupportedCheckpoint:
    """The error for a file that ends too early."""
    return UnsupportedCheckpoint(
        f"{path} is truncated: it has {found:,} bytes, its header announces at least {expected:,}. "
        "The download was probably interrupted; download the file again."
    )


def looks_pickled(start: bytes) -> bool:
    """True for the first bytes of a pickle, or of the zip archive that PyTorch makes of one."""
    return start.startswith(b"PK\x03\x04") or (
        start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")
    )


def _explain_foreign(path: Path, start: bytes, size: int) -> str:
    """Says what a file that is not safetensors looks like, and what to do."""
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    kind = "GGUF" if path.suffix.lower() == ".gguf" else "safetensors"
    want = f"expected a {kind} file"
    if size == 0:
        return f"{path} is empty (0 bytes), {want}. Download it again."
    if text.startswith(b"version https://git-lfs"):
        return (
            f"{path} is a Git LFS pointer, a {size}-byte text that stands for the real file, {want}. "
            "Download the real file (`git lfs pull`, or the download button of the web page)."
        )
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return (
            f"{path} is a web page, {want}. The download saved an error or log-in page; download the file "
            "again, signed in if the model asks for it."
        )
    if looks_pickled(start):
        return (
            f"{path} is a pickled PyTorch checkpoint (.pt, .ckpt or .bin, whatever its name says), {want}. "
            "Pickles can run code when they are opened and are never read here; download the safetensors "
            "version, or convert an EMA-VFI checkpoint with: allegro convert-vfi IN.pkl OUT.safetensors."
        )
    if text.startswith((b"{", b"[")):
        return f"{path} is a JSON text, {want}. Choose the file of weights, or the folder that holds it."
    if size < 9:
        return f"{path} has only {size} bytes, {want}. Download it again."
    return (
        f"{path} is not a {kind} file (unknown content), {want}. Download it again, or choose another."
    )
