"""Frame interpolators: loading them from safetensors, and making safetensors of the published pickles."""

from __future__ import annotations

import pickle
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config import VFI_PRESETS, VFIConfig
from ..errors import CheckpointError, MissingDependency, UnsupportedCheckpoint
from ..ops import CastParam, cast_like
from ..tensors import check_tensors
from ..vfi import EMAVFI
from .detect import identify
from .header import looks_pickled
from .keymaps import native_names, split_prefixes
from .source import WANTED, Source, config_of, open_source, read_tensors, with_article

# Entries of a file's metadata: a name of `VFI_PRESETS`, if it is one of them, and "true" or "false".
VARIANT_KEY, ARBITRARY_TIME_KEY = "ema_vfi.variant", "ema_vfi.arbitrary_time"
_SAFE_TORCH = (2, 6)  # torch.load(weights_only=True) of earlier ones can be made to run code: CVE-2025-32434


def load_interpolator(
    path: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = torch.float32,
    arbitrary_time: bool | None = None,
    operations: Any = nn,
    cast_param: CastParam = cast_like,
) -> EMAVFI:
    """Loads an EMA-VFI frame interpolator.

    Args:
        path: a .safetensors file, or a folder with one.
        device: where the weights go.
        dtype: type of the weights and of the computation, the reference's float32 by default; None for the
            stored one.
        arbitrary_time: trained for every position between two frames ("_t")? Default what the file's metadata
            says, else whether its name ends in "_t"; the tensors do not tell.
        operations, cast_param: see `EMAVFI`.
    Raises:
        CheckpointError: the file cannot be read; UnsupportedCheckpoint: it is something else, or a pickle, which
            has to be converted first; CheckpointMismatch: it is incomplete, or tensors have other shapes.
    """
    refuse_pickle(path)
    source = open_source(path, "ema-vfi")
    model = EMAVFI(interpolator_config(source, arbitrary_time), operations=operations, cast_param=cast_param, device="meta")
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    check_tensors(expected, source.shapes, what=f"{path}, {with_article(source.info.title)},")
    model.load_state_dict(read_tensors(source, device=device, dtype=dtype), strict=True, assign=True)
    # The layout the convolutions work in: else they would bring the weights into it at every call.
    return model.to(memory_format=torch.channels_last).requires_grad_(False).eval()  # type: ignore[call-overload]


def refuse_pickle(path: str | Path) -> None:
    """Raises if a path leads to a pickle, with the command that makes a file of it that can be loaded.

    Raises:
        UnsupportedCheckpoint: it does.
    """
    path = Path(path)
    if not path.is_file():
        return
    with path.open("rb") as file:
        start = file.read(4)
    if looks_pickled(start):
        command = shlex.join(["python", "-m", "allegro_model", "convert-vfi", str(path), str(path.with_suffix(".safetensors"))])
        raise UnsupportedCheckpoint(
            f"{path} is a pickle, expected a .safetensors file. Pickles can run code when they are opened and are "
            f"never loaded here. Convert it once, which is safe: {command}"
        )


def interpolator_config(source: Source, arbitrary_time: bool | None = None) -> VFIConfig:
    """The configuration of an opened EMA-VFI checkpoint; see `load_interpolator`."""
    if arbitrary_time is None:
        arbitrary_time = is_arbitrary_time(source.path, source.header.metadata)
    chosen = arbitrary_time
    return config_of(source, lambda shapes, _: VFIConfig.from_shapes(shapes, arbitrary_time=chosen))


def is_arbitrary_time(path: Path, metadata: Mapping[str, str]) -> bool:
    """What the metadata says, else whether the file is called "..._t"."""
    stated = metadata.get(ARBITRARY_TIME_KEY)
    return stated == "true" if stated is not None else re.search(r"_t$", path.stem) is not None


def interpolator_metadata(config: VFIConfig) -> dict[str, str]:
    """What to write into a file beside the weights, because the weights do not tell."""
    variant = next((name for name, preset in VFI_PRESETS.items() if preset == config), None)
    stated = {ARBITRARY_TIME_KEY: "true" if config.arbitrary_time else "false"}
    return {"format": "pt", **stated, **({VARIANT_KEY: variant} if variant else {})}


def read_pickled_interpolator(path: str | Path, *, arbitrary_time: bool | None = None) -> tuple[dict[str, Tensor], VFIConfig]:
    """Reads a published EMA-VFI checkpoint without running anything that is in it.

    Args:
        path: ours.pkl, ours_small.pkl, ours_t.pkl or ours_small_t.pkl, or one of another size.
        arbitrary_time: as in `load_interpolator`.
    Returns:
        the tensors under our names, and the sizes.
    Raises:
        CheckpointError: it cannot be opened; UnsupportedCheckpoint: it holds more than tensors, or another model;
            CheckpointMismatch: it is incomplete, or tensors have other shapes.
        MissingDependency: this PyTorch cannot read pickles safely.
    """
    path = Path(path)
    stored = _load_tensors(path)
    shapes = {name: tuple(tensor.shape) for name, tensor in stored.items()}
    info = identify(shapes)
    if info.family != "ema-vfi":
        raise UnsupportedCheckpoint(
            f"{path} is {with_article(info.title)}; expected {WANTED['ema-vfi']}. Choose another file."
        )
    names = native_names(split_prefixes(shapes)[info.prefix], "ema-vfi")
    tensors = {ours: stored[name].contiguous() for ours, name in names.items()}
    chosen = is_arbitrary_time(path, {}) if arbitrary_time is None else arbitrary_time
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    try:
        config = VFIConfig.from_shapes(found, arbitrary_time=chosen)
    except CheckpointError as error:
        raise type(error)(f"{path}: {error}") from error
    expected = EMAVFI(config, device="meta").state_dict()
    check_tensors({name: tuple(tensor.shape) for name, tensor in expected.items()}, found,
                  what=f"{path}, {with_article(info.title)},")
    return tensors, config


def _load_tensors(path: Path) -> dict[str, Tensor]:
    """The state dict in a pickle."""
    version = tuple(int(number) for number in re.findall(r"\d+", torch.__version__)[:2])
    if version < _SAFE_TORCH:
        raise MissingDependency(
            f"PyTorch {torch.__version__} cannot read pickles safely, expected 2.6 or later. Update PyTorch to convert."
        )
    try:
        path.open("rb").close()
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read: {error.strerror or error}. Check the path and its permissions."
        ) from error
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UnsupportedCheckpoint(
            f"{path} holds more than tensors, or is no pickle at all, so it was not opened: a pickle with other "
            "objects can run code. Expected a published EMA-VFI checkpoint; download it again from its official place."
        ) from error
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise UnsupportedCheckpoint(
            f"{path} cannot be read as a checkpoint ({type(error).__name__}). Expected a published EMA-VFI .pkl; "
            "download it again."
        ) from error
    if not isinstance(stored, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in stored.items()):
        raise UnsupportedCheckpoint(
            f"{path} holds a {type(stored).__name__} that is not a table of tensors by name; expected a published "
            "EMA-VFI checkpoint. Choose another file."
        )
    return dict(stored)
