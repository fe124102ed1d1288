"""From a path to checked, memory-mapped tensors: single files, sharded folders and whole model snapshots."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..errors import CheckpointError, CheckpointMismatch, UnsupportedCheckpoint
from .gguf import SUFFIX as GGUF_SUFFIX
from .gguf import is_gguf, map_gguf, read_gguf_header
from .header import FileHeader, TensorInfo, read_file_header
from .released import COMMAND, fetch_part

COMPONENTS = ("transformer", "vae", "text_encoder")
# What a model may take from another folder, which "allegro_shared" of its model_index.json names.
_SHARED_COMPONENTS = ("vae", "text_encoder", "tokenizer")
INDEX_SUFFIX = ".index.json"
# The names under which models are published; they win when a folder holds several files.
_PUBLISHED = ("diffusion_pytorch_model", "model")
WEIGHTS = (".safetensors", GGUF_SUFFIX)
_SHARD = re.compile(r"(?P<stem>.+)-(?P<part>\d{5})-of-(?P<total>\d{5})\.safetensors")
_MAX_JSON_BYTES = 50_000_000  # the index of the largest public models is below 1 MB


@dataclass(frozen=True)
class Header:
    """Everything a checkpoint says about itself, over all its files, without reading a tensor.

    Attributes:
        tensors: name -> shape and storage type.
        metadata: the `__metadata__` of the files, first file first.
        config: the `config.json` (or NAME.config.json) that belongs to the weights, else the JSON in metadata["config"], else None.
        files: the files of weights, in the order of their names.
        shards: tensor name -> the file that holds it.
    """

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    config: dict[str, Any] | None
    files: tuple[Path, ...]
    shards: dict[str, Path]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: info.shape for name, info in self.tensors.items()}

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensors."""
        return sum(info.num_bytes for info in self.tensors.values())


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose tensors are mapped from disk: they take memory only once they are used.

    Attributes:
        tensors: name -> tensor on the CPU. The mapping is private: writing to a tensor never changes the
            file.
        metadata, config, files: as in `Header`.
    """

    tensors: dict[str, torch.Tensor]
    metadata: dict[str, str]
    config: dict[str, Any] | None
    files: tuple[Path, ...]


def read_header(path: str | Path, *, subfolder: str | None = None) -> Header:
    """Reads and checks the headers of a checkpoint; takes milliseconds whatever its size.

    Args:
        path: a .safetensors or .gguf file, an index (`*.index.json`), a folder that holds one of them, or the root
            of a model snapshot (then `subfolder` chooses the component).
        subfolder: used when `path` is a folder that contains it, e.g. "transformer".
    Raises:
        CheckpointError: the path, or a shard an index lists, does not exist or cannot be opened.
        UnsupportedCheckpoint: something else than sound safetensors or GGUF, or a folder where it is not clear what
            to load.
        CheckpointMismatch: shards that do not hold what their index lists.
    """
    try:
        files, listed = _locate(Path(path), subfolder)
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read: {error.strerror or error}. Check the path and its permissions."
        ) from error
    tensors: dict[str, TensorInfo] = {}
    metadata: dict[str, str] = {}
    shards: dict[str, Path] = {}
    for file in files:
        header = read_any_header(file)
        for name in header.tensors.keys() & tensors.keys():
            raise CheckpointMismatch(
                f"tensor {name} is in {shards[name].name} and in {file.name} of {file.parent}. "
                "Keep the files of one model only, or download it again."
            )
        tensors |= header.tensors
        shards |= dict.fromkeys(header.tensors, file)
        metadata = header.metadata | metadata
    absent = sorted(name for name, file in listed.items() if shards.get(name) != file)
    if absent:
        raise CheckpointMismatch(
            f"{len(absent)} tensors are not in the files in which the index of {files[0].parent} "
            f"lists them, the first is {absent[0]}. Index and files belong to different "
            "downloads; download all of them again."
        )
    return Header(tensors, metadata, _find_config(files, metadata), files, shards)


def read_any_header(path: Path) -> FileHeader:
    """The header of one file, safetensors or GGUF by its first bytes; see `read_file_header`, `read_gguf_header`."""
    return read_gguf_header(path) if is_gguf(path) else read_file_header(path)


def read_checkpoint(
    path: str | Path,
    *,
    subfolder: str | None = None,
    only: Callable[[str], bool] | None = None,
) -> Checkpoint:
    """Opens a checkpoint with every tensor mapped from disk, after all headers were checked.

    Args:
        path, subfolder: as in `read_header`.
        only: keeps the tensors for whose name it is true; all by default.
    Raises:
        CheckpointError, UnsupportedCheckpoint, CheckpointMismatch: as in `read_header`.
    """
    header = read_header(path, subfolder=subfolder)
    return Checkpoint(map_tensors(header, only=only), header.metadata, header.config, header.files)


def map_tensors(header: Header, *, only: Callable[[str], bool] | None = None) -> dict[str, torch.Tensor]:
    """Maps the tensors of a checked header, in the order of the files; packed ones as uint8 [rows, bytes]."""
    tensors: dict[str, torch.Tensor] = {}
    for file in header.files:
        if is_gguf(file):
            found = read_gguf_header(file)
            tensors |= map_gguf(file, found, (name for name in found.tensors if only is None or only(name)))
            continue
        try:
            with safe_open(file, framework="pt", device="cpu") as handle:
                for name in handle.keys():
                    if only is None or only(name):
                        tensors[name] = handle.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise UnsupportedCheckpoint(f"{file} cannot be mapped: {error}. Download it again.") from error
    return tensors


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object such as `config.json`.

    Raises:
        CheckpointError: it cannot be opened.
        UnsupportedCheckpoint: it is too large, or not a JSON object.
    """
    try:
        size = path.stat().st_size
        if size > _MAX_JSON_BYTES:
            raise UnsupportedCheckpoint(
                f"{path} has {size:,} bytes, expected a small JSON file. Download it again."
            )
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read: {error.strerror or error}. Check the path and its permissions."
        ) from error
    except (ValueError, RecursionError) as error:
        hint = " It is a Git LFS pointer or a web page." if _looks_foreign(path) else ""
        raise UnsupportedCheckpoint(
            f"{path} is not valid JSON ({error}).{hint} Download it again."
        ) from error
    if not isinstance(content, dict):
        raise UnsupportedCheckpoint(
            f"{path} holds a JSON {type(content).__name__}, expected an object. Download it again."
        )
    return content


def is_snapshot(path: Path) -> bool:
    """True for the root folder of a published model: transformer/, vae/, text_encoder/ side by side."""
    return path.is_dir() and (
        (path / "model_index.json").is_file() or sum((path / name).is_dir() for name in COMPONENTS) >= 2
    )


def component_folder(root: Path, name: str) -> Path:
    """The folder of one part of a model.

    Args:
        root: of the model.
        name: "transformer", "vae", "text_encoder" or "tokenizer".
    Returns:
        root/name; if there is none, that of the folder which "allegro_shared" of model_index.json names, so that
        two models need not each have a copy; root/name again, which is not there, if that has none either.
    Raises:
        UnsupportedCheckpoint: "allegro_shared" is not the name of a folder beside or inside `root`.
        CheckpointError: there is no such folder.
    """
    index = root / "model_index.json"
    if (root / name).is_dir() or name not in _SHARED_COMPONENTS or not index.is_file():
        return root / name
    shared = read_json(index).get("allegro_shared")
    if shared is None:
        return root / name
    # A model may come from anywhere: it must not make us look at other places than its own neighbourhood.
    if not isinstance(shared, str) or not re.fullmatch(r"(\.\./)?\w[\w\-.+ ]*", shared):
        raise UnsupportedCheckpoint(
            f"{index}: allegro_shared is {shared!r}, expected the name of a folder beside this one, such as "
            '"../tiny". Correct the file or download it again.'
        )
    folder = (root.resolve() / shared).resolve()
    if not folder.is_dir():
        raise CheckpointError(
            f"{root} takes its {name} from {folder}, which does not exist. Put the model {folder.name} there, or "
            f"the folder {name}/ into {root}."
        )
    # One step only: what is missing there as well is missing.
    return folder / name if (folder / name).is_dir() else root / name


# Which files


def _locate(path: Path, subfolder: str | None) -> tuple[tuple[Path, ...], dict[str, Path]]:
    """(safetensors files in the order of their names, {tensor: file} as an index lists them)."""
    if not path.exists():
        raise CheckpointError(
            f"{path} does not exist. Give a .safetensors or .gguf file, or the folder of a model. The released ones are fetched "
            f"with: {COMMAND}"
        )
    if path.is_file() and path.name.endswith(INDEX_SUFFIX):
        return _from_index(path)
    if path.is_file():
        part = _SHARD.fullmatch(path.name)  # one file of several stands for all of them
        return (_all_parts(path.parent, part["stem"], part["total"]) if part else (path,)), {}
    if subfolder is not None and component_folder(path, subfolder).is_dir():
        path = component_folder(path, subfolder)
    elif subfolder is not None and is_snapshot(path):
        raise CheckpointError(
            f"{path} has no folder {subfolder}/, so this part of the model is missing. "
            f"{fetch_part(path, subfolder)}"
        )
    return _from_folder(path)


def _from_folder(folder: Path) -> tuple[tuple[Path, ...], dict[str, Path]]:
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_file())
    indexes = [name for name in names if name.endswith(".safetensors" + INDEX_SUFFIX)]
    singles = [name for name in names if name.endswith(WEIGHTS) and not _SHARD.fullmatch(name)]
    groups = {match["stem"]: match["total"] for match in map(_SHARD.fullmatch, names) if match}
    for stem in _PUBLISHED:
        if f"{stem}.safetensors{INDEX_SUFFIX}" in indexes:
            return _from_index(folder / f"{stem}.safetensors{INDEX_SUFFIX}")
        for name in (stem + suffix for suffix in WEIGHTS):
            if name in singles:
                return (folder / name,), {}
    if len(indexes) == 1:
        return _from_index(folder / indexes[0])
    if len(singles) == 1 and not groups:
        return (folder / singles[0],), {}
    if len(groups) == 1 and not singles:
        ((stem, total),) = groups.items()
        return _all_parts(folder, stem, total), {}
    raise UnsupportedCheckpoint(_explain_folder(folder, names, indexes + singles + list(groups)))


def _explain_folder(folder: Path, names: list[str], candidates: list[str]) -> str:
    if candidates:
        return (
            f"{folder} holds several models ({', '.join(candidates[:8])}), expected one. "
            "Give the file you mean."
        )
    if is_snapshot(folder):
        return (
            f"{folder} is a whole model, expected the weights of one part. "
            f"Give one of its folders: {', '.join(name for name in COMPONENTS if (folder / name).is_dir())}."
        )
    pickles = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    if pickles:
        return (
            f"{folder} holds pickled weights only ({', '.join(pickles[:4])}), expected safetensors. "
            "Pickles can run code when they are opened and are never read here; download the safetensors files."
        )
    return (
        f"{folder} holds no .safetensors or .gguf file. Give the folder that has the weights, or download them into it."
    )


def _from_index(path: Path) -> tuple[tuple[Path, ...], dict[str, Path]]:
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UnsupportedCheckpoint(
            f"{path} has no weight_map, so it is not the index of a sharded model. "
            "Download it again, or give the file of weights."
        )
    for name in weight_map.values():
        # Shards lie beside their index; anything else could make us read a file nobody chose.
        if not isinstance(name, str) or not re.fullmatch(r"[\w\-.+ ]+\.safetensors", name):
            raise UnsupportedCheckpoint(
                f"{path} lists the file {name!r}, expected the name of a .safetensors file in "
                "the same folder. Download the safetensors version of the model."
            )
    files = _complete(path.parent, sorted(set(weight_map.values())))
    return files, {tensor: path.parent / name for tensor, name in weight_map.items()}


def _all_parts(folder: Path, stem: str, total: str) -> tuple[Path, ...]:
    return _complete(
        folder, [f"{stem}-{part:05d}-of-{total}.safetensors" for part in range(1, int(total) + 1)]
    )


def _complete(folder: Path, names: Iterable[str]) -> tuple[Path, ...]:
    files = tuple(folder / name for name in names)
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        shown = ", ".join(missing[:16]) + (", ..." if len(missing) > 16 else "")
        raise CheckpointError(
            f"{len(missing)} of {len(files)} files of the model in {folder} are missing: {shown}. "
            "Download them into this folder."
        )
    return files


def _find_config(files: tuple[Path, ...], metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """The description of these weights; a config.json that may belong to another file is not taken."""
    folder = files[0].parent
    own = files[0].with_suffix(".config.json")  # where several models share a folder
    if own.is_file():
        return read_json(own)
    beside = folder / "config.json"
    if beside.is_file():
        others = [entry for suffix in WEIGHTS for entry in folder.glob("*" + suffix) if entry not in files]
        if not others or files[0].name.startswith(tuple(stem + end for stem in _PUBLISHED for end in ".-")):
            return read_json(beside)
    if "config" in metadata:
        try:
            config = json.loads(metadata["config"])
        except (ValueError, RecursionError):
            return None  # other programs use the key for other things
        return config if isinstance(config, dict) else None
    return None


def cache_file(path: str | Path) -> Path:
    """Where the calibration of a transformer's step cache lies: NAME.cache.json beside a file, cache.json in a folder, also
    in that of an index."""
    place = Path(path)
    if place.suffix in WEIGHTS:
        return place.with_suffix(".cache.json")
    if place.name.endswith(INDEX_SUFFIX):
        return place.with_name("cache.json")
    inner = place / "transformer"
    return (inner if inner.is_dir() else place) / "cache.json"


def _looks_foreign(path: Path) -> bool:
    start = path.read_bytes()[:64].lstrip().lower()
    return start.startswith((b"version https://git-lfs", b"<"))
