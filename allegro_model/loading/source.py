"""A checkpoint of the family that is wanted: checked by its headers, then read under our names."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from ..errors import CheckpointError, UnsupportedCheckpoint
from ..quantised import Layout
from ..tensors import shorten
from . import keymaps
from .detect import MARKS, CheckpointInfo, identify
from .files import Header, map_tensors, read_header
from .quant import check_storage, common_dtype, companions, dequantise, layout_of, packed

Config = TypeVar("Config")

_BATCH_BYTES = 512 * 2**20  # mapped at a time while weights are converted

WANTED = {
    "allegro-dit": "an Allegro text-to-video transformer or its image-to-video variant (transformer/ of rhymes-ai/Allegro or rhymes-ai/Allegro-TI2V)",
    "allegro-vae": "the Allegro VideoVAE (vae/ of rhymes-ai/Allegro)",
    "t5-encoder": "a T5 v1.1 text encoder (text_encoder/ of rhymes-ai/Allegro, or any T5 v1.1 XXL encoder)",
    "ema-vfi": "an EMA-VFI frame interpolator (ours or ours_small, made by: python -m allegro_model convert-vfi)",
}


@dataclass(frozen=True)
class Source:
    """A checkpoint of a known family, its tensors under our names; nothing but headers has been read.

    Attributes:
        path: as the user gave it, for messages.
        header: of the files.
        info: what the checkpoint is (of a bundle: the part that was asked for).
        names: our name -> name in the file.
        shapes: our name -> shape, as our modules have it.
    """

    path: Path
    header: Header
    info: CheckpointInfo
    names: dict[str, str]
    shapes: dict[str, tuple[int, ...]]


def open_source(path: str | Path, family: str, *, subfolder: str | None = None) -> Source:
    """Reads the headers of a checkpoint and makes sure that it is of a family.

    Args:
        path: as in `load_dit`.
        family: "allegro-dit", "allegro-vae", "t5-encoder" or "ema-vfi".
        subfolder: component of a model snapshot.
    Raises:
        CheckpointError, UnsupportedCheckpoint, CheckpointMismatch: as in `load_dit`.
    """
    header = read_header(path, subfolder=subfolder)
    info = identify(header.shapes, tensors=header.tensors, metadata=header.metadata, config=header.config)
    found = next((part for part in (info, *info.parts) if part.family == family), None)
    if found is None:
        raise UnsupportedCheckpoint(
            f"{path} is {with_article(info.title)}; expected {WANTED[family]}. {_lists(header, family)} "
            "Choose another file."
        )
    if info.parts:
        header = replace(
            header, config=None
        )  # of a file with several models it cannot be told whose config that is
    group = keymaps.split_prefixes(header.shapes)[found.prefix]
    names = keymaps.native_names(group, family)
    shapes = {
        ours: keymaps.native_shape(ours, header.tensors[name].shape, family) for ours, name in names.items()
    }
    check_storage(names, header.tensors)
    return Source(Path(path), header, found, names, shapes)


def config_of(source: Source, derive: Callable[..., Config]) -> Config:
    """The configuration of a source.

    Args:
        source: of `open_source`.
        derive: `dit_config_from_shapes` or one of its kind; its errors get the path in front.
    """
    try:
        return derive(source.shapes, source.header.config)
    except CheckpointError as error:
        raise type(error)(f"{source.path}: {error}") from error


def packed_layouts(source: Source) -> dict[str, Layout]:
    """How the packed tensors of a source are packed: our name -> layout; ordinary ones are left out."""
    found = {ours: layout_of(name, source.header.tensors) for ours, name in source.names.items()}
    return {ours: layout for ours, layout in found.items() if layout is not None}


def read_tensors(
    source: Source,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    keep: Container[str] = (),
) -> dict[str, Tensor]:
    """The tensors of a source under our names.

    Args:
        source: of `open_source`.
        device: where they go; on the CPU and in the stored type they stay mapped.
        dtype: type of what is not kept packed; default the one most of it is stored in (see `common_dtype`).
        keep: our names of packed matrices that stay packed, int8 [rows, bytes]; the scale that lies beside one is
            added under the name X.weight_scale.
    """
    infos = source.header.tensors
    target = dtype or common_dtype(source.names, infos, kept=any(ours in keep for ours in source.names))
    layouts = packed_layouts(source)
    state: dict[str, Tensor] = {}
    for batch in _batches(source):
        wanted = {name for original in batch.values() for name in (original, *companions(original))}
        mapped = map_tensors(source.header, only=wanted.__contains__)
        for ours, name in batch.items():
            layout = layouts.get(ours)
            if layout is not None and ours in keep:
                stored, scale = packed(name, mapped, layout)
                state[ours] = stored.to(device)
                if scale is not None:
                    state[f"{ours}_scale"] = scale.to(device)
                continue
            tensor = dequantise(name, mapped, infos[name], layout, target)
            state[ours] = keymaps.native_tensor(ours, tensor, source.info.family).to(device)
    return state


def _batches(source: Source) -> Iterator[dict[str, str]]:
    """{our name: name in the file} in portions; pages read only to be converted are let go after each."""
    batch: dict[str, str] = {}
    size = 0
    for ours, name in source.names.items():
        batch[ours] = name
        size += source.header.tensors[name].num_bytes
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = {}, 0
    yield batch


# Words


def with_article(title: str) -> str:
    """ "an Allegro VideoVAE"."""
    if title.startswith(("a ", "an ", "the ", "several ")):
        return title
    return f"an {title}" if title[0] in "AE" else f"a {title}"


def _lists(header: Header, family: str) -> str:
    return (
        f"It holds {len(header.tensors)} tensors: {shorten(sorted(header.tensors))}. "
        f"Expected tensors such as: {shorten(MARKS[family])}."
    )
