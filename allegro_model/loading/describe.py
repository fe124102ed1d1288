"""What a file or folder is, as plain data for `inspect` and for people."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from . import keymaps
from .detect import CheckpointInfo, identify
from .dimensions import dit_config_from_shapes, preset_name
from .files import COMPONENTS, Header, component_folder, is_snapshot, read_header, read_json


def describe(path: str | Path) -> dict[str, Any]:
    """Describes a checkpoint or a whole model without reading a tensor.

    Args:
        path: a file, an index, a folder of weights, or the root of a model snapshot.
    Returns:
        JSON-able. Of a checkpoint: path, family, variant, title, dtypes, parameters, bytes, tensors, files,
        metadata, config (None where there is none), parts (of a bundle); of a transformer with a config also
        preset and trained_size ({"num_frames", "height", "width"}), or config_error if the config is not that of
        the weights. Of a snapshot: path, family "snapshot", title, bytes, sampling (its "allegro_sampling" or None)
        and components {name: description}; one that another model's folder lends has shared_from, the name of that
        folder; one that cannot be read has a single entry, "error".
    Raises:
        CheckpointError, UnsupportedCheckpoint, CheckpointMismatch: as `files.read_header`.
    """
    path = Path(path)
    return _describe_snapshot(path) if is_snapshot(path) else _describe_checkpoint(path)


def _describe_checkpoint(path: Path) -> dict[str, Any]:
    header = read_header(path)
    info = identify(header.shapes, tensors=header.tensors, metadata=header.metadata, config=header.config)
    return {
        "path": str(path),
        **_describe_info(info),
        "tensors": len(header.tensors),
        "files": [file.name for file in header.files],
        "metadata": header.metadata,
        "config": header.config,
        **_trained_size(header, info),
    }


def _describe_info(info: CheckpointInfo) -> dict[str, Any]:
    return {
        "family": info.family,
        "variant": info.variant,
        "title": info.title,
        "dtypes": list(info.dtypes),
        "parameters": info.num_parameters,
        "bytes": info.num_bytes,
        "parts": [_describe_info(part) for part in info.parts],
    }


def _trained_size(header: Header, info: CheckpointInfo) -> dict[str, Any]:
    """For a transformer: the clip it was trained for, which only its config tells."""
    if info.family != "allegro-dit" or header.config is None:
        return {}
    names = keymaps.native_names(keymaps.split_prefixes(header.shapes)[info.prefix], info.family)
    try:
        config = dit_config_from_shapes(
            {ours: header.shapes[name] for ours, name in names.items()}, header.config
        )
    except CheckpointError as error:  # all else about the file is true nevertheless
        return {"config_error": str(error)}
    height, width = config.sample_size
    # 8 pixels and 4 frames per latent cell
    return {
        "preset": preset_name(config),
        "trained_size": {"num_frames": config.sample_size_t * 4, "height": height * 8, "width": width * 8},
    }


def _describe_component(folder: Path, name: str) -> dict[str, Any]:
    if name in COMPONENTS:
        return _describe_checkpoint(folder)
    files = sorted(file for file in folder.iterdir() if file.is_file())
    return {
        "path": str(folder),
        "family": name,
        "title": name,
        "bytes": sum(file.stat().st_size for file in files),
        "files": [file.name for file in files],
    }


def _describe_snapshot(root: Path) -> dict[str, Any]:
    components: dict[str, Any] = {}
    for name in (*COMPONENTS, "tokenizer", "scheduler"):
        try:
            folder = component_folder(root, name)
            if folder.is_dir():
                components[name] = _describe_component(folder, name)
                if folder.parent != root:
                    components[name]["shared_from"] = folder.parent.name
        except CheckpointError as error:  # one broken component must not hide the others
            components[name] = {"error": str(error)}
    index = read_json(root / "model_index.json") if (root / "model_index.json").is_file() else {}
    missing = [name for name in (*COMPONENTS, "tokenizer") if name not in components]
    transformer = components.get("transformer", {}).get("title", "a model without a transformer")
    return {
        "path": str(root),
        "family": "snapshot",
        "title": f"a whole model: {transformer}" + (f"; missing: {', '.join(missing)}" if missing else ""),
        "bytes": sum(part.get("bytes") or 0 for part in components.values()),
        "sampling": index.get("allegro_sampling"),
        "components": components,
    }
