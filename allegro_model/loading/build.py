"""Models from checkpoints: built on the meta device, compared strictly, filled from the mapped file."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from ..config import PRESETS, SAMPLING_88X720P, DiTConfig, SamplingConfig, VAEConfig
from ..dit import AllegroDiT
from ..errors import CheckpointError, CheckpointMismatch, UnsupportedCheckpoint
from ..vae import VideoVAE
from . import keymaps
from .detect import MARKS, CheckpointInfo, identify
from .dimensions import dit_config_from_shapes, preset_name, vae_config_from_shapes
from .files import Header, map_tensors, read_header, read_json
from .quant import check_storage, common_dtype, companions, dequantise

logger = logging.getLogger(__name__)

Part = Literal["full", "encoder", "decoder"]
AnyModule = TypeVar("AnyModule", bound=nn.Module)

ASSETS = Path(__file__).resolve().parents[1] / "assets"
_SHOWN = 8  # names per list in a message
_BATCH_BYTES = 512 * 2**20  # mapped at a time while weights are converted

WANTED = {
    "allegro-dit": "an Allegro text-to-video transformer (transformer/ of rhymes-ai/Allegro)",
    "allegro-vae": "the Allegro VideoVAE (vae/ of rhymes-ai/Allegro)",
    "t5-encoder": "a T5 v1.1 text encoder (text_encoder/ of rhymes-ai/Allegro, or any T5 v1.1 XXL encoder)",
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


def load_dit(
    path: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    operations: Any = nn,
    config: DiTConfig | None = None,
) -> AllegroDiT:
    """Loads the text-to-video transformer.

    Args:
        path: a .safetensors file, an index, a folder with them, or the root of a model snapshot.
        device: where the weights go. On the CPU, and in the stored type, they stay mapped to the file and
            take memory only as they are used.
        dtype: type of the weights; default the type most of them are stored in (bfloat16 for float8 files).
        operations: namespace of layer classes.
        config: sizes and scales; default from the shapes and the config.json beside the weights.
    Raises:
        CheckpointError: the file cannot be read; UnsupportedCheckpoint: it is something else;
        CheckpointMismatch: it is incomplete, or tensors have other shapes.
    """
    source = open_source(path, "allegro-dit", subfolder="transformer")
    config = config or dit_config_from_shapes(source.shapes, source.header.config)
    return _fill(AllegroDiT(config, operations=operations, device="meta"), source, device, dtype)


def load_vae(
    path: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = torch.float32,
    operations: Any = nn,
    config: VAEConfig | None = None,
    part: Part = "full",
) -> VideoVAE:
    """Loads the VideoVAE, or one half of it.

    Args:
        path, device, operations, config: as in `load_dit`.
        dtype: type of the weights, the reference's float32 by default; None for the stored one.
        part: "encoder" or "decoder" leaves the other half out; it need not be in the file then.
    Raises:
        CheckpointError, UnsupportedCheckpoint, CheckpointMismatch: as in `load_dit`.
    """
    source = open_source(path, "allegro-vae", subfolder="vae")
    if part != "full":
        source = _half(source, part)
    elif source.info.variant != "full":
        raise CheckpointMismatch(f"{path} is {_with_article(source.info.title)}; expected encoder and decoder. Load it "
                                 f"with part={source.info.variant!r}, or use the file with both halves.")
    config = config or vae_config_from_shapes(source.shapes, source.header.config)
    return _fill(VideoVAE(config, part=part, operations=operations, device="meta"), source, device, dtype)


def open_source(path: str | Path, family: str, *, subfolder: str | None = None) -> Source:
    """Reads the headers of a checkpoint and makes sure that it is of a family.

    Args:
        path: as in `load_dit`.
        family: "allegro-dit", "allegro-vae" or "t5-encoder".
        subfolder: component of a model snapshot.
    Raises:
        CheckpointError, UnsupportedCheckpoint, CheckpointMismatch: as in `load_dit`.
    """
    header = read_header(path, subfolder=subfolder)
    info = identify(header.shapes, dtypes=header.dtypes, metadata=header.metadata, config=header.config)
    found = next((part for part in (info, *info.parts) if part.family == family), None)
    if found is None:
        raise UnsupportedCheckpoint(f"{path} is {_with_article(info.title)}; expected {WANTED[family]}. {_lists(header, family)} "
                                    "Choose another file.")
    if found.variant == "ti2v":
        raise UnsupportedCheckpoint(f"{path} is an {found.title}, the image-to-video variant, whose input is a video, a masked "
                                    f"video and a mask; expected {WANTED[family]}. Choose the text-to-video model.")
    group = keymaps.split_prefixes(header.shapes)[found.prefix]
    names = keymaps.native_names(group, family)
    shapes = {ours: keymaps.native_shape(ours, header.tensors[name].shape, family) for ours, name in names.items()}
    check_storage({name: header.tensors[name] for name in names.values()})
    return Source(Path(path), header, found, names, shapes)


def check_tensors(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], *, what: str) -> None:
    """Compares names and shapes strictly.

    Args:
        expected: of our module.
        found: of the checkpoint, under our names.
        what: begins the message, e.g. "FILE, an Allegro VideoVAE,".
    Raises:
        CheckpointMismatch: with the sorted, shortened lists of what is missing, unexpected and of another shape.
    """
    missing = sorted(expected.keys() - found.keys())
    unexpected = sorted(found.keys() - expected.keys())
    reshaped = [f"{name} is {list(found[name])}, expected {list(expected[name])}"
                for name in sorted(expected.keys() & found.keys()) if found[name] != expected[name]]
    lists = [f"{label} ({len(names)}): {_shorten(names)}." for label, names in
             (("Missing", missing), ("Unexpected", unexpected), ("Other shapes", reshaped)) if names]
    if lists:
        raise CheckpointMismatch(f"{what} does not fit: {len(found)} tensors found, {len(expected)} expected. "
                                 f"{' '.join(lists)} The file is damaged or was changed; download it again.")


def load_sampling_defaults(path: str | Path) -> SamplingConfig:
    """The settings a model was made for.

    Args:
        path: the root of a model snapshot, or a transformer.
    Returns:
        "allegro_sampling" of the snapshot's model_index.json; else those of the released model with the same
        transformer config; else the released ones at the size the transformer was trained for.
    Raises:
        CheckpointError, UnsupportedCheckpoint, CheckpointMismatch: as in `load_dit`, or a setting of a wrong type.
    """
    index = Path(path) / "model_index.json"
    stated = read_json(index).get("allegro_sampling") if index.is_file() else None
    if stated is not None:
        return _sampling_from(stated, index)
    source = open_source(path, "allegro-dit", subfolder="transformer")
    config = dit_config_from_shapes(source.shapes, source.header.config)
    if name := preset_name(config):
        return PRESETS[name].sampling
    # 8 pixels and 4 frames per latent cell
    return replace(SAMPLING_88X720P, width=config.sample_size[1] * 8, height=config.sample_size[0] * 8,
                   num_frames=config.sample_size_t * 4)


def bundled_model(name: str) -> Path:
    """The folder of a model that comes with the package, e.g. `bundled_model("tiny")`.

    Raises:
        CheckpointError: there is no such model.
    """
    present = sorted(entry.name for entry in ASSETS.iterdir() if entry.is_dir()) if ASSETS.is_dir() else []
    if name not in present:
        raise CheckpointError(f"there is no bundled model {name!r}, expected one of: {', '.join(present) or 'none'}. "
                              "Give one of these, or the folder of a downloaded model.")
    return ASSETS / name


# Steps of a load


def _half(source: Source, part: Part) -> Source:
    prefixes = ("encoder.", "quant_conv.") if part == "encoder" else ("decoder.", "post_quant_conv.")
    other = ("decoder.", "post_quant_conv.") if part == "encoder" else ("encoder.", "quant_conv.")
    if not any(name.startswith(prefixes) for name in source.names):
        raise CheckpointMismatch(f"{source.path} is {_with_article(source.info.title)}; expected the {part}. Use the file with "
                                 "both halves.")
    names = {ours: name for ours, name in source.names.items() if not ours.startswith(other)}
    return replace(source, names=names, shapes={ours: source.shapes[ours] for ours in names})


def _fill(model: AnyModule, source: Source, device: torch.device | str, dtype: torch.dtype | None) -> AnyModule:
    """Compares a model on the meta device with its checkpoint, and gives it the tensors."""
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    check_tensors(expected, source.shapes, what=f"{source.path}, {_with_article(source.info.title)},")
    model.load_state_dict(read_tensors(source, device=device, dtype=dtype), strict=True, assign=True)
    return model.requires_grad_(False).eval()


def read_tensors(source: Source, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The tensors of a source under our names.

    Args:
        source: of `open_source`.
        device: where they go; on the CPU and in the stored type they stay mapped.
        dtype: their type; default the one most of them are stored in, bfloat16 for float8 files.
    """
    target = dtype or common_dtype({name: source.header.tensors[name] for name in source.names.values()})
    state: dict[str, Tensor] = {}
    for batch in _batches(source):
        wanted = {name for original in batch.values() for name in (original, *companions(original))}
        mapped = map_tensors(source.header, only=wanted.__contains__)
        for ours, name in batch.items():
            tensor = dequantise(name, mapped[name], mapped, target)
            state[ours] = keymaps.native_tensor(ours, tensor, source.info.family).to(device)
    return state


def _batches(source: Source) -> Iterator[dict[str, str]]:
    """{our name: name in the file} in portions; pages that were only read to be converted are let go after each."""
    batch: dict[str, str] = {}
    size = 0
    for ours, name in source.names.items():
        batch[ours] = name
        size += source.header.tensors[name].num_bytes
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = {}, 0
    yield batch


def _sampling_from(stated: Any, path: Path) -> SamplingConfig:
    if not isinstance(stated, dict):
        raise UnsupportedCheckpoint(f"{path}: allegro_sampling is {stated!r}, expected a table. Download the file again.")
    for name, released in SAMPLING_88X720P.to_dict().items():
        value = stated.get(name, released)
        fits = type(value) is type(released) or (isinstance(released, float) and type(value) is int)
        if not fits:
            raise UnsupportedCheckpoint(f"{path}: {name} is {value!r}, expected a value of type {type(released).__name__}. "
                                        "Correct the file or download it again.")
    return SamplingConfig.from_dict(stated)


# Words


def _with_article(title: str) -> str:
    if title.startswith(("a ", "an ", "the ", "several ")):
        return title
    return f"an {title}" if title[0] in "AE" else f"a {title}"


def _lists(header: Header, family: str) -> str:
    return (f"It holds {len(header.tensors)} tensors: {_shorten(sorted(header.tensors))}. "
            f"Expected tensors such as: {_shorten(MARKS[family])}.")


def _shorten(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:_SHOWN]) + (f", ... ({len(names) - _SHOWN} more)" if len(names) > _SHOWN else "")
