"""Which model files there are: the choices of the loader nodes, and what stands behind a choice.

A choice is a file, or the folder of a sharded model, below the folders that ComfyUI knows. At execution the
list is built again and the choice looked up in it, so that no request can name anything else.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import folder_paths

from ...allegro_model.errors import CheckpointError
from ...allegro_model.loading import bundled_interpolator, bundled_loras, bundled_model, is_snapshot
from ...allegro_model.loading.released import INTERPOLATOR_SOURCE, MODELS, how_to_get

# Part of a model snapshot -> ComfyUI's key for the folder such files go to.
FOLDER_KEYS = {"transformer": "diffusion_models", "text_encoder": "text_encoders", "vae": "vae"}
# Frame interpolators belong to no snapshot. Newer versions know the folder by themselves.
INTERPOLATORS = "frame_interpolation"
BUNDLED_INTERPOLATOR = "allegro-tiny-vfi (bundled)"
# Whole snapshots as they are published, with transformer/, vae/, text_encoder/ and tokenizer/ side by side.
SNAPSHOTS = "allegro"
BUNDLED = {"allegro-tiny (bundled)": "tiny", "allegro-tiny-ti2v (bundled)": "tiny-ti2v"}
LORAS = "loras"

_SHARD = re.compile(r"(?P<stem>.+)-(?P<part>\d{5})-of-(?P<total>\d{5})\.safetensors")


def register_folders() -> None:
    """Makes our folders below models known, so that extra_model_paths.yaml can add to them. Creates nothing."""
    for key in (SNAPSHOTS, INTERPOLATORS):
        if key not in folder_paths.folder_names_and_paths:
            folder_paths.add_model_folder_path(key, os.path.join(folder_paths.models_dir, key))


def choices(part: str) -> list[str]:
    """What the dropdown for a part of the model shows.

    Args:
        part: "transformer", "text_encoder" or "vae".
    """
    return list(_listing(part))


def resolve(part: str, choice: str) -> str:
    """The file or folder behind a choice.

    Args:
        part: as in `choices`.
        choice: one of them.
    Raises:
        CheckpointError: it is not in the list (any more).
    """
    path = _listing(part).get(choice)
    if path is None:
        raise CheckpointError(f"{choice!r} is not among the models that ComfyUI lists. Put the file into "
                              f"models/{FOLDER_KEYS[part]} (or a whole model folder into models/{SNAPSHOTS}), press R "
                              f"in the browser to refresh the list, and choose it again. {how_to_get(part, _meant(choice))}")
    return path


def download_folders() -> dict[str, list[Path]]:
    """{key: folders} where released files may lie and go, those of extra_model_paths.yaml among them."""
    return {key: [Path(path) for path in folder_paths.get_folder_paths(key)] for key in (*FOLDER_KEYS.values(), SNAPSHOTS)}


def _meant(choice: str) -> str:
    """The released model that the name of an absent file speaks of."""
    return next((model for model in MODELS if model.removeprefix("t2v-") in choice.lower()), "t2v")


def prompt_folder() -> Path:
    """Where encoded prompts are kept: in ComfyUI's user folder, where its server hands out nothing that begins so."""
    return Path(folder_paths.get_user_directory()) / "__allegro" / "prompts"


def lora_choices() -> list[str]:
    """What the dropdown for LoRAs shows."""
    return list(_loras())


def resolve_lora(choice: str) -> str:
    """The file behind a choice of `lora_choices`.

    Raises:
        CheckpointError: it is not in the list (any more).
    """
    path = _loras().get(choice)
    if path is None:
        raise CheckpointError(f"{choice!r} is not among the LoRAs that ComfyUI lists. Put the .safetensors file into "
                              f"models/{LORAS}, press R in the browser to refresh the list, and choose it again.")
    return path


def interpolator_choices() -> list[str]:
    """What the dropdown for frame interpolators shows."""
    return list(_interpolators())


def resolve_interpolator(choice: str) -> str:
    """The file behind a choice of `interpolator_choices`.

    Raises:
        CheckpointError: it is not in the list (any more).
    """
    path = _interpolators().get(choice)
    if path is None:
        raise CheckpointError(f"{choice!r} is not among the frame interpolators that ComfyUI lists. Put the file into "
                              f"models/{INTERPOLATORS}, press R in the browser to refresh the list, and choose it again. "
                              + INTERPOLATOR_SOURCE.format(target="ours_small_t.safetensors"))
    return path


def snapshot_root(path: str) -> Path | None:
    """The folder of the whole model that a transformer, text encoder or VAE belongs to, if it lies in one."""
    place = Path(path)
    folder = place if place.is_dir() else place.parent
    return folder.parent if folder.name in FOLDER_KEYS and is_snapshot(folder.parent) else None


def _listing(part: str) -> dict[str, str]:
    """{choice: path}, the bundled model first, since it always works."""
    found = _bundled(part)
    key = FOLDER_KEYS[part]
    for name in folder_paths.get_filename_list(key):
        label = next((label for label in _labels(name) if label not in found), None)
        if label is None:
            continue
        path = folder_paths.get_full_path(key, name)
        if path is not None:
            found[label] = path  # one file of several stands for all of them
    for label, path in _gguf(part).items():
        found.setdefault(label, path)
    for label, path in _snapshots(part).items():
        found.setdefault(label, path)
    return found


def _gguf(part: str) -> dict[str, str]:
    """{choice: path} of GGUF files, which ComfyUI does not list for any model. There are none of a VAE."""
    if part == "vae":
        return {}
    found: dict[str, str] = {}
    for base in folder_paths.get_folder_paths(FOLDER_KEYS[part]):
        names, _ = folder_paths.recursive_search(base, excluded_dir_names=[".git"])
        for name in sorted(names):
            if name.endswith(".gguf"):
                found.setdefault(name.replace(os.sep, "/"), os.path.join(base, name))
    return found


def _loras() -> dict[str, str]:
    """{choice: path}, those that come with the extension first."""
    return _files(LORAS, (".safetensors",), {f"{name} (bundled)": str(path) for name, path in bundled_loras().items()})


def _interpolators() -> dict[str, str]:
    """{choice: path}, the bundled one first. Pickles are listed, so that choosing one explains what to do with it."""
    try:
        bundled = {BUNDLED_INTERPOLATOR: str(bundled_interpolator())}
    except CheckpointError:  # a copy of the project without its assets
        bundled = {}
    return _files(INTERPOLATORS, (".safetensors", ".pkl"), bundled)


def _files(key: str, suffixes: tuple[str, ...], bundled: dict[str, str]) -> dict[str, str]:
    """`bundled`, then what ComfyUI lists under a key."""
    found = dict(bundled)
    for name in folder_paths.get_filename_list(key):
        path = folder_paths.get_full_path(key, name)
        if path is not None and name.endswith(suffixes):
            found.setdefault(name.replace(os.sep, "/"), path)
    return found


def _labels(name: str) -> list[str]:
    """The choices that a listed file can stand behind, the best first; empty if it is none."""
    name = name.replace(os.sep, "/")
    if not name.endswith(".safetensors"):
        return []
    shard = _SHARD.fullmatch(name)
    if shard is None:
        return [name]
    if int(shard["part"]) != 1:
        return []
    # The folder is what people know a model of several files by.
    folder, all_files = shard["stem"].rpartition("/")[0], f"{shard['stem']} ({int(shard['total'])} files)"
    return [folder, all_files] if folder else [all_files]


def _bundled(part: str) -> dict[str, str]:
    found = {}
    for label, name in BUNDLED.items():
        try:
            folder = bundled_model(name) / part
        except CheckpointError:  # a copy of the project without its assets
            continue
        if folder.is_dir():
            found[label] = str(folder)
    return found


def _snapshots(part: str) -> dict[str, str]:
    found = {}
    for base in folder_paths.get_folder_paths(SNAPSHOTS):
        root = Path(base)
        if not root.is_dir():
            continue
        for folder in sorted(entry for entry in root.iterdir() if is_snapshot(entry)):
            if (folder / part).is_dir():
                found.setdefault(f"{folder.name}/{part}", str(folder / part))
    return found
