"""Checkpoints in fewer bits: read, packed and written one tensor after the other.

Only the matrices of the blocks are packed (of T5, where the format has it, the table of words as well). What is small
or sensitive stays as it is: norms, biases, tables, patch embeddings, the first and the last layers.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..atomic import atomic_file, check_free_space, writing
from ..errors import OutputError, UnsupportedCheckpoint
from ..quantised import BY_NAME, Layout, unpack
from ..quantised.layouts import pack
from .detect import identify
from .files import read_header
from .gguf import SUFFIX as GGUF_SUFFIX
from .gguf import gguf_layout
from .header import DTYPES, TensorInfo
from .source import Source, open_source, read_tensors, with_article

# Name of a format -> layout of the matrices; None for bfloat16.
FORMATS: dict[str, Layout | None] = {
    "bf16": None,
    "fp8": BY_NAME["float8_e4m3fn"],
    "int8": BY_NAME["int8"],
    "gguf-q8_0": BY_NAME["Q8_0"],
    "gguf-q5_k": BY_NAME["Q5_K"],
    "gguf-q4_k": BY_NAME["Q4_K"],
}
# Family -> names of the matrices that are packed.
_PACKED = {
    "allegro-dit": re.compile(r"transformer_blocks\.\d+\.(attn1|attn2|ff)\..+\.weight"),
    "t5-encoder": re.compile(r"encoder\.block\.\d+\.layer\.\d\.(SelfAttention\.[qkvo]|DenseReluDense\.w\w+)\.weight"),
}
_WORDS = "shared.weight"
_LARGE = 1_000_000  # what stays dense and has more numbers than this is in bfloat16
_ARCHITECTURES = {"allegro-dit": "allegro", "t5-encoder": "t5encoder"}
_MARKER = json.dumps({"format": "int8_tensorwise", "full_precision_matrix_mult": True}).encode()

_DENSE = (torch.float32, torch.float16, torch.bfloat16)

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Converted:
    """One tensor of a conversion.

    Attributes:
        name: ours.
        stored_as: "Q8_0", "bfloat16", ...
        num_bytes: without the scale beside it.
        error, energy: sums of squares of the difference and of the original.
    """

    name: str
    stored_as: str
    num_bytes: int
    error: float
    energy: float

    @property
    def relative(self) -> float:
        """Root of the mean square of the difference, relative to that of the original."""
        return math.sqrt(self.error / self.energy) if self.energy else 0.0


def suffix_of(kind: str) -> str:
    """What the name of a file in a format of `FORMATS` ends in."""
    return GGUF_SUFFIX if kind.startswith("gguf") else ".safetensors"


def convert_checkpoint(path: str | Path, output: Path, kind: str, *, force: bool = False,
                       progress: Progress | None = None) -> list[Converted]:
    """Writes a transformer or text encoder in another format.

    Args:
        path: as in `load_dit`; it may be quantised already.
        output: the file to write.
        kind: a key of `FORMATS`.
        force: an existing file may be replaced.
        progress: called with tensors done and in all.
    Raises:
        CheckpointError: as `load_dit`, or neither a transformer nor a T5 encoder; OutputError: it cannot be written.
    """
    if output.suffix.lower() != suffix_of(kind):
        raise OutputError(f"Cannot write {output}: weights of the format {kind} are kept in {suffix_of(kind)} files. "
                          "Choose such a name.")
    source = _open(path)
    infos = {name: _stored(source, name, kind) for name in source.names}
    header, positions, size = _header(source, infos, kind)
    done = []
    with atomic_file(output, force=force) as temporary, writing(output):
        check_free_space(output, size)
        with temporary.open("wb") as file:
            file.truncate(size)
            file.write(header)
            for number, (name, info) in enumerate(infos.items(), 1):
                tensors, converted = _convert(source, name, info)
                for stored_name, tensor in tensors.items():
                    file.seek(positions[stored_name])
                    file.write(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
                done.append(converted)
                if progress is not None:
                    progress(number, len(infos))
    return done


def _open(path: str | Path) -> Source:
    header = read_header(path)
    info = identify(header.shapes, tensors=header.tensors, metadata=header.metadata, config=header.config)
    if info.family not in _PACKED:
        raise UnsupportedCheckpoint(f"{path} is {with_article(info.title)}; expected an Allegro transformer or a T5 v1.1 text "
                                    "encoder. The VAE is small and sensitive, and stays as it is.")
    return open_source(path, info.family)


def _stored(source: Source, name: str, kind: str) -> TensorInfo:
    """How a tensor will be stored."""
    shape, family = source.shapes[name], source.info.family
    stored = source.header.tensors[source.names[name]]
    if name == _WORDS:  # older versions of ComfyUI read this table in float8 from no file
        wanted = kind != "fp8"
    else:
        wanted = _PACKED[family].fullmatch(name) is not None
    layout = FORMATS[kind] if wanted and len(shape) == 2 else None
    if layout is not None and not layout.fits(shape):
        # Rows that do not divide into large blocks may divide into small ones.
        small = BY_NAME["Q8_0"]
        layout = small if small.fits(shape) else None
    if layout is not None:
        return TensorInfo(shape, torch.uint8, layout)
    dense = stored.dtype if stored.layout is None and stored.dtype in _DENSE else torch.bfloat16
    as_bfloat16 = math.prod(shape) > _LARGE or (kind == "bf16" and wanted)
    return TensorInfo(shape, torch.bfloat16 if as_bfloat16 else dense)


def _convert(source: Source, name: str, info: TensorInfo) -> tuple[dict[str, Tensor], Converted]:
    """What is written for a tensor: {name in the file: tensor}."""
    one = replace(source, names={name: source.names[name]})
    original = read_tensors(one, dtype=torch.float32)[name]
    tensors: dict[str, Tensor] = {}
    if info.layout is None:
        tensors[name] = original.to(info.dtype)
        found = original if info.dtype == torch.float32 else tensors[name].float()
    else:
        stored, scale = pack(info.layout, original)
        found = unpack(info.layout, stored, scale, torch.float32)
        tensors[name] = stored
        base = name.removesuffix("weight")
        if scale is not None and info.layout is FORMATS["int8"]:
            tensors |= {f"{base}weight_scale": scale, f"{base}comfy_quant": torch.tensor(list(_MARKER), dtype=torch.uint8)}
        elif scale is not None:
            tensors[f"{base}scale_weight"] = scale
    # In float64: sums of a hundred million squares.
    error = float(found.sub_(original).square_().sum(dtype=torch.float64)) if found is not original else 0.0
    energy = float(original.square().sum(dtype=torch.float64))
    return tensors, Converted(name, info.stored_as, info.num_bytes, error, energy)


def _header(source: Source, infos: dict[str, TensorInfo], kind: str) -> tuple[bytes, dict[str, int], int]:
    """Header, {name: position} and size of the file."""
    metadata = {name: text for name, text in source.header.metadata.items()
                if not name.startswith(("_", "general.", "allegro.", "tokenizer."))}
    metadata |= {"format": "pt", "allegro_format": kind}
    if source.header.config is not None:
        metadata["config"] = json.dumps(source.header.config)
    if suffix_of(kind) == GGUF_SUFFIX:
        return gguf_layout(infos, metadata, architecture=_ARCHITECTURES[source.info.family])
    return _safetensors_layout(infos, metadata)


def _safetensors_layout(infos: dict[str, TensorInfo], metadata: dict[str, str]) -> tuple[bytes, dict[str, int], int]:
    names = {dtype: name for name, dtype in DTYPES.items()}
    entries: dict[str, object] = {"__metadata__": metadata}
    offsets, position = {}, 0
    for name, info in _with_companions(infos):
        entries[name] = {"dtype": names[info.dtype], "shape": list(info.shape),
                         "data_offsets": [position, position + info.num_bytes]}
        offsets[name] = position
        position += info.num_bytes
    raw = json.dumps(entries).encode()
    raw += b" " * (-len(raw) % 8)
    start = 8 + len(raw)
    return len(raw).to_bytes(8, "little") + raw, {name: start + at for name, at in offsets.items()}, start + position


def _with_companions(infos: dict[str, TensorInfo]) -> Iterator[tuple[str, TensorInfo]]:
    """What a file holds, in ComfyUI's conventions: of fp8 the one that every version reads. Large items first."""
    small: dict[str, TensorInfo] = {}
    for name, info in infos.items():
        base = name.removesuffix("weight")
        if info.layout is None:
            yield name, info
        elif info.layout is FORMATS["int8"]:
            yield name, TensorInfo(info.shape, torch.int8)
            small[f"{base}weight_scale"] = TensorInfo((info.shape[0], 1), torch.float32)
            small[f"{base}comfy_quant"] = TensorInfo((len(_MARKER),), torch.uint8)
        else:
            yield name, TensorInfo(info.shape, torch.float8_e4m3fn)
            small[f"{base}scale_weight"] = TensorInfo((), torch.float32)
            # Empty: older versions of ComfyUI refuse any other in a text encoder.
            small["scaled_fp8"] = TensorInfo((0,), torch.float8_e4m3fn)
    # Aligned for those who map them: numbers of four bytes before single ones.
    yield from sorted(small.items(), key=lambda item: -item[1].dtype.itemsize)
