"""GGUF files: the header is read and checked before anything is mapped; tensors are mapped packed. And writing them.

Magic, version and two counts, then key-value pairs, then name, dimensions (the fastest first), type and offset of each
tensor, then the tensors, each at a multiple of the alignment.
Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from ..errors import UnsupportedCheckpoint
from ..quantised import BY_GGML_TYPE
from .header import FileHeader, TensorInfo, damaged, short, truncated
from .keymaps import T5_GGUF_ARCHITECTURES, t5_gguf_name, t5_name

MAGIC = b"GGUF"
SUFFIX = ".gguf"
_VERSIONS = (2, 3)
_ALIGNMENT = 32
_ALIGNMENT_KEY = "general.alignment"
_ARCHITECTURE_KEY = "general.architecture"
_CONFIG_KEY = "allegro.config"
# How other tools say that a tensor was stored with fewer or other dimensions.
_SHAPE_KEY = "comfy.gguf.orig_shape."
# Far above real files, whose largest part is a vocabulary of 32,000 words.
_MAX_HEADER_BYTES = 100_000_000
_MAX_COUNT = 1_000_000
_MAX_NAME = 512
_MAX_DIMENSIONS = 8

# Types of values in pairs: number -> format of `struct`.
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<B", 10: "<Q", 11: "<q", 12: "<d"}
_UINT32, _STRING, _ARRAY = 4, 8, 9
# Types of tensors that are not packed.
_PLAIN = {0: torch.float32, 1: torch.float16, 24: torch.int8, 25: torch.int16, 26: torch.int32, 27: torch.int64,
          28: torch.float64, 30: torch.bfloat16}
_PLAIN_NUMBERS = {dtype: number for number, dtype in _PLAIN.items()}
_PACKED_NUMBERS = {layout.name: number for number, layout in BY_GGML_TYPE.items()}
# Packed types that are in use, but not read here.
_OTHERS = {10: "Q2_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S",
           22: "IQ2_S", 23: "IQ4_XS", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4"}


@dataclass(frozen=True)
class GGUFHeader(FileHeader):
    """What a GGUF file says about itself.

    Attributes:
        tensors: our or the published name -> shape (rows first) and type.
        metadata: strings and numbers of its pairs; "config" is the JSON of the model's configuration, if it has one.
        offsets: name -> position of the first byte in the file.
    """

    offsets: dict[str, int]


def is_gguf(path: Path) -> bool:
    """True for a file that begins like one; a file that cannot be opened is for others to explain."""
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def read_gguf_header(path: Path) -> GGUFHeader:
    """Reads and checks the header; no tensor is touched.

    Args:
        path: an existing file that begins with "GGUF".
    Raises:
        UnsupportedCheckpoint: another version, a type that is not read here, truncated, or contradictory.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        reader = _Reader(path, file, size)
        reader.take(len(MAGIC))
        version = reader.number("<I")
        if version not in _VERSIONS:
            raise UnsupportedCheckpoint(f"{path} is a GGUF file of version {version}, expected "
                                        f"{' or '.join(map(str, _VERSIONS))}. Make it anew with a current program.")
        num_tensors, num_pairs = reader.count("tensors"), reader.count("pairs")
        pairs: dict[str, object] = {}
        for _ in range(num_pairs):
            name = reader.text(_MAX_NAME)
            pairs[name] = reader.value()
        entries = [_read_entry(reader, pairs) for _ in range(num_tensors)]
        alignment = pairs.get(_ALIGNMENT_KEY, _ALIGNMENT)
        if not isinstance(alignment, int) or not 8 <= alignment <= 2**20 or alignment & (alignment - 1):
            raise reader.damaged(f"its alignment is {short(alignment)}")
        start = reader.position + -reader.position % alignment
    return _checked(path, size, start, alignment, entries, pairs)


def map_gguf(path: Path, header: GGUFHeader, names: Iterable[str]) -> dict[str, Tensor]:
    """Maps tensors: plain ones in their type, packed ones as uint8 [rows, bytes]. Writing never reaches the file."""
    data = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)
    tensors = {}
    for name in names:
        info, offset = header.tensors[name], header.offsets[name]
        stored = data[offset : offset + info.num_bytes]
        if info.layout is None:
            tensors[name] = stored.view(info.dtype).reshape(info.shape)
        else:
            tensors[name] = stored.reshape(-1, info.layout.row_bytes(info.shape[-1]))
    return tensors


@dataclass
class _Reader:
    """Reads forward, and never beyond the file or what a header may take."""

    path: Path
    file: BinaryIO
    size: int
    position: int = 0

    def damaged(self, why: str) -> UnsupportedCheckpoint:
        return damaged(self.path, why, kind="GGUF")

    def take(self, num_bytes: int) -> bytes:
        self._advance(num_bytes)
        return self.file.read(num_bytes)

    def _advance(self, num_bytes: int) -> None:
        end = self.position + num_bytes
        if end > self.size:
            raise truncated(self.path, end, self.size)
        if end > _MAX_HEADER_BYTES:
            raise self.damaged(f"its header is longer than {_MAX_HEADER_BYTES:,} bytes")
        self.position = end

    def number(self, form: str) -> int:
        return int(struct.unpack(form, self.take(struct.calcsize(form)))[0])

    def count(self, what: str) -> int:
        found = self.number("<Q")
        if found > _MAX_COUNT:
            raise self.damaged(f"it announces {found:,} {what}")
        return found

    def text(self, longest: int = _MAX_HEADER_BYTES) -> str:
        length = self.number("<Q")
        if length > longest:
            raise self.damaged(f"it announces a text of {length:,} bytes")
        return self.take(length).decode("utf-8", "replace")

    def value(self) -> object:
        """A number or text; of arrays only short ones of numbers, as a tuple: nobody here needs the others."""
        kind = self.number("<I")
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            return self._array()
        if kind not in _SCALARS:
            raise self.damaged(f"it has a value of the unknown type {kind}")
        return struct.unpack(_SCALARS[kind], self.take(struct.calcsize(_SCALARS[kind])))[0]

    def _array(self) -> object:
        kind, count = self.number("<I"), self.count("values in an array")
        if kind == _STRING:
            for _ in range(count):
                self.text()
            return None
        if kind not in _SCALARS:
            raise self.damaged(f"it has an array of the unknown type {kind}")
        form = _SCALARS[kind]
        if count <= _MAX_DIMENSIONS:
            return tuple(struct.unpack(form, self.take(struct.calcsize(form)))[0] for _ in range(count))
        self._advance(count * struct.calcsize(form))
        self.file.seek(self.position)
        return None


@dataclass(frozen=True)
class _Entry:
    name: str
    info: TensorInfo
    offset: int  # from the beginning of the tensors


def _read_entry(reader: _Reader, pairs: Mapping[str, object]) -> _Entry:
    name = reader.text(_MAX_NAME)
    rank = reader.number("<I")
    if rank > _MAX_DIMENSIONS:
        raise reader.damaged(f"tensor {short(name)} has {rank} dimensions")
    shape = tuple(reversed([reader.number("<Q") for _ in range(rank)]))
    number, offset = reader.number("<I"), reader.number("<Q")
    # The bound makes every product below a size that a file can have.
    if math.prod(shape) > 2**48 or any(n > 2**48 for n in shape) or offset > 2**48:
        raise reader.damaged(f"tensor {short(name)} has the shape {short(list(shape))} at {offset}")
    layout = BY_GGML_TYPE.get(number)
    if layout is None and number not in _PLAIN:
        known = ", ".join(["F32", "F16", "BF16", *(layout.name for layout in BY_GGML_TYPE.values())])
        raise UnsupportedCheckpoint(f"{reader.path}: tensor {short(name)} is stored as {_OTHERS.get(number, number)}, "
                                    f"expected one of {known}. Use another version of the file.")
    if layout is not None and not layout.fits(shape):
        raise reader.damaged(f"tensor {short(name)} of shape {list(shape)} does not divide into blocks of "
                             f"{layout.weights} ({layout.name})")
    original = pairs.get(_SHAPE_KEY + name)
    if isinstance(original, tuple) and layout is None and all(isinstance(n, int) and n >= 0 for n in original) and (
            math.prod(original) == math.prod(shape)):
        shape = original
    dtype = torch.uint8 if layout is not None else _PLAIN[number]
    return _Entry(name, TensorInfo(shape, dtype, layout), offset)


def _checked(path: Path, size: int, start: int, alignment: int, entries: list[_Entry],
             pairs: Mapping[str, object]) -> GGUFHeader:
    """Checks that the tensors lie in the file, aligned, and do not overlap; gives them the published names."""
    tensors: dict[str, TensorInfo] = {}
    offsets: dict[str, int] = {}
    is_t5 = pairs.get(_ARCHITECTURE_KEY) in T5_GGUF_ARCHITECTURES
    end, before = start, ""
    for entry in sorted(entries, key=lambda entry: entry.offset):
        begin = start + entry.offset
        if entry.offset % alignment or begin < end:
            where = "is not aligned" if entry.offset % alignment else f"overlaps {short(before)}"
            raise damaged(path, f"tensor {short(entry.name)} {where}", kind="GGUF")
        end, before = begin + entry.info.num_bytes, entry.name
        if end > size:
            raise truncated(path, end, size)
        name = t5_name(entry.name) if is_t5 else entry.name
        if name in tensors:
            raise damaged(path, f"two tensors have the name {short(name)}", kind="GGUF")
        tensors[name], offsets[name] = entry.info, begin
    metadata = {name: str(value) for name, value in pairs.items() if isinstance(value, str | int | float)}
    if _CONFIG_KEY in metadata:
        metadata["config"] = metadata[_CONFIG_KEY]
    return GGUFHeader(tensors, metadata, offsets)


# Writing


def gguf_layout(infos: Mapping[str, TensorInfo], metadata: Mapping[str, str], *, architecture: str) -> tuple[
        bytes, dict[str, int], int]:
    """The header of a file that is about to be written.

    Args:
        infos: our name -> shape and type, in the order of writing.
        metadata: texts; "config" is the JSON of the configuration.
        architecture: "allegro", or "t5encoder", whose tensors get the names that llama.cpp gave them.
    Returns:
        the header, the position of each tensor, and the size of the file.
    """
    pairs = {_ARCHITECTURE_KEY: architecture}
    pairs |= {_CONFIG_KEY if name == "config" else name: text for name, text in metadata.items()}
    out = bytearray(MAGIC + struct.pack("<IQQ", _VERSIONS[-1], len(infos), len(pairs) + 1))
    for key, text in pairs.items():
        out += _text(key) + struct.pack("<I", _STRING) + _text(text)
    out += _text(_ALIGNMENT_KEY) + struct.pack("<II", _UINT32, _ALIGNMENT)
    position, positions = 0, {}
    for name, info in infos.items():
        stored_as = t5_gguf_name(name) if architecture in T5_GGUF_ARCHITECTURES else name
        number = _PLAIN_NUMBERS[info.dtype] if info.layout is None else _PACKED_NUMBERS[info.layout.name]
        out += _text(stored_as) + struct.pack(f"<I{len(info.shape)}Q", len(info.shape), *reversed(info.shape))
        out += struct.pack("<IQ", number, position)
        positions[name] = position
        position += info.num_bytes + -info.num_bytes % _ALIGNMENT
    out += bytes(-len(out) % _ALIGNMENT)
    start = len(out)
    return bytes(out), {name: start + offset for name, offset in positions.items()}, start + position


def _text(text: str) -> bytes:
    raw = text.encode("utf-8")
    return struct.pack("<Q", len(raw)) + raw
