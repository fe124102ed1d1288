"""Where files go, and whether they are there already."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import AllegroError, CheckpointError, DownloadError
from ..loading import check_tensors, open_source, t5_config_from_shapes
from ..loading.dimensions import t5_shapes
from ..loading.released import ReleasedFile
from ..loading.source import config_of

FAMILIES = {"transformer": "allegro-dit", "vae": "allegro-vae", "text_encoder": "t5-encoder"}
# ComfyUI still reads these folders, but new files belong elsewhere.
_OLD_NAMES = {"diffusion_models": "unet", "text_encoders": "clip"}
SNAPSHOTS = "allegro"  # whole model folders; the text encoder of one serves all

Folders = Mapping[str, Sequence[Path]]


@dataclass(frozen=True)
class Target:
    """A file and its place.

    Attributes:
        file: of the table.
        path: its final name.
        folders: where it may lie already, under its own name; text encoders under any name.
        name: below these folders.
    """

    file: ReleasedFile
    path: Path
    folders: tuple[Path, ...]
    name: str


def comfyui_folders(root: str | Path) -> dict[str, list[Path]]:
    """{key: folders} of a ComfyUI installation that has no extra_model_paths.yaml.

    Raises:
        DownloadError: it is none.
    """
    models = Path(root) / "models"
    if not models.is_dir():
        raise DownloadError(f"{root} is not the folder of a ComfyUI: it has no folder models/. Give the folder that has "
                            "main.py and models/ in it, or fetch a model folder of its own with --to DIR.")
    return {key: [models / name for name in (key, _OLD_NAMES.get(key)) if name]
            for key in ("diffusion_models", "vae", "text_encoders", SNAPSHOTS)}


def comfyui_targets(files: Iterable[ReleasedFile], folders: Folders) -> list[Target]:
    """Places in ComfyUI's model folders; files that ComfyUI does not need are left out."""
    targets = []
    for file in files:
        if file.comfyui is not None:
            key, name = file.comfyui
            known = tuple(folders[key])
            home = next((folder for folder in known if folder.name != _OLD_NAMES.get(key)), known[0])
            if not file.is_weights:  # it is read from beside the weights only
                weights = name.replace(".config.json", ".safetensors")
                home = next((folder for folder in known if (folder / weights).is_file()), home)
                known = (home,)
            elif file.part == "text_encoder":
                known += tuple(folders.get(SNAPSHOTS, ()))
            targets.append(Target(file, home / name, known, name))
    return targets


def snapshot_targets(files: Iterable[ReleasedFile], root: str | Path) -> list[Target]:
    """Places in a model folder as published."""
    root = Path(root)
    if root.exists() and not root.is_dir():
        raise DownloadError(f"{root} is a file. Give a folder, or a name that is not taken.")
    targets = []
    for file in files:
        path = root / file.snapshot
        targets.append(Target(file, path, (path.parent,), path.name))
    return targets


def find_present(target: Target, *, force: bool = False) -> Path | None:
    """The file that makes fetching unnecessary: whole, and of the right kind; None if there is none.

    Raises:
        DownloadError: something else has the name, and `force` is off.
    """
    for path in dict.fromkeys((target.path, *(folder / target.name for folder in target.folders))):
        if not path.exists():
            continue
        problem = problem_of(target.file, path)
        if problem is None:
            return path
        if path == target.path and not force:
            raise DownloadError(f"{path} is there, but cannot be used: {problem} It was left as it is. Remove or "
                                "rename it (on the command line --force replaces it), and try again.")
    return _any_text_encoder(target) if target.file.part == "text_encoder" else None


def problem_of(file: ReleasedFile, path: Path) -> str | None:
    """What is wrong with a file that is meant to be `file`, or None."""
    if not path.is_file() or path.stat().st_size == 0:
        return "it is empty, or no file."
    if not file.is_weights:
        return None
    try:
        source = open_source(path, FAMILIES[file.part])
        if file.part == "text_encoder":
            config = config_of(source, t5_config_from_shapes)
            check_tensors(t5_shapes(config), source.shapes, what=str(path))
    except AllegroError as error:
        return str(error)
    if file.part == "transformer":
        wanted = "ti2v" if file.repository.endswith("TI2V") else "t2v"
        if source.info.variant != wanted:
            return f"it is another model ({source.info.title})."
    return None


def _any_text_encoder(target: Target) -> Path | None:
    """A T5 v1.1 XXL encoder that is there for another model. Files of any other kind are passed over."""
    for folder in target.folders:
        for path in sorted(folder.rglob("*.safetensors")) if folder.is_dir() else ():
            try:
                is_large = open_source(path, "t5-encoder").info.variant == "xxl"
            except CheckpointError:
                continue
            if is_large and problem_of(target.file, path) is None:
                return path
    return None
