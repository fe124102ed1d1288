"""What a model was made for, and the models that come with the package."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from ..config import PRESETS, SAMPLING_88X720P, TI2V_GUIDANCE_SCALE, SamplingConfig
from ..errors import CheckpointError, UnsupportedCheckpoint
from .dimensions import dit_config_from_shapes, preset_name
from .files import read_json
from .source import config_of, open_source

ASSETS = Path(__file__).resolve().parents[1] / "assets"


def load_sampling_defaults(path: str | Path, transformer: str | Path | None = None) -> SamplingConfig:
    """The settings a model was made for.

    Args:
        path: the root of a model snapshot, or a transformer.
        transformer: the one that takes the place of the snapshot's own.
    Returns:
        "allegro_sampling" of the model_index.json of the snapshot that the transformer belongs to, else of
        `path`; else the settings of the released model with the same transformer config; else the released ones
        at the size the transformer was trained for.
    Raises:
        CheckpointError, UnsupportedCheckpoint, CheckpointMismatch: as in `load_dit`, or a setting has a
            wrong type.
    """
    stated = (None if transformer is None else _stated_nearby(Path(transformer))) or _stated(Path(path))
    if stated is not None:
        return stated
    source = open_source(transformer or path, "allegro-dit", subfolder="transformer")
    config = config_of(source, dit_config_from_shapes)
    name = preset_name(config)
    released = PRESETS[name].sampling if name else SAMPLING_88X720P
    if source.info.variant == "ti2v":
        released = replace(released, guidance_scale=TI2V_GUIDANCE_SCALE)
    if name:
        return released
    # 8 pixels and 4 frames per latent cell
    return replace(
        released,
        width=config.sample_size[1] * 8,
        height=config.sample_size[0] * 8,
        num_frames=config.sample_size_t * 4,
    )


def stated_text_length(path: Path) -> int | None:
    """Tokens per text of the model that a path belongs to, root or part; None if it does not say."""
    found = _stated_nearby(path)
    return found.text_length if found is not None else None


def bundled_models() -> list[str]:
    """Names of the whole models that come with the package."""
    return sorted(index.parent.name for index in ASSETS.glob("*/model_index.json"))


def bundled_model(name: str) -> Path:
    """The folder of a model that comes with the package, e.g. `bundled_model("tiny")`.

    Raises:
        CheckpointError: there is no such model.
    """
    present = sorted(entry.name for entry in ASSETS.iterdir() if entry.is_dir()) if ASSETS.is_dir() else []
    if name not in present:
        raise CheckpointError(
            f"there is no bundled model {name!r}, expected one of: {', '.join(present) or 'none'}. "
            "Give one of these, or the folder of a downloaded model."
        )
    return ASSETS / name


def bundled_loras() -> dict[str, Path]:
    """The LoRAs that come with the package: {"MODEL/NAME": file}, e.g. "tiny/orange" for the model "tiny"."""
    files = sorted(ASSETS.glob("*/loras/*.safetensors"))
    return {f"{file.parents[1].name}/{file.stem}": file for file in files}


def bundled_interpolator() -> Path:
    """The frame interpolator that comes with the package, a .safetensors file.

    Raises:
        CheckpointError: this copy of the package has none.
    """
    path = ASSETS / "tiny-vfi" / "model.safetensors"
    if not path.is_file():
        raise CheckpointError(
            f"there is no bundled frame interpolator: {path} does not exist. Give the file of a downloaded "
            "EMA-VFI model, converted with: python -m allegro_model convert-vfi IN.pkl OUT.safetensors"
        )
    return path


def _stated_nearby(path: Path) -> SamplingConfig | None:
    """What the snapshot says that a path is the root or a part of."""
    roots = (path, path.parent, path.parent.parent) if path.is_file() else (path, path.parent)
    return next((stated for stated in map(_stated, roots) if stated is not None), None)


def _stated(root: Path) -> SamplingConfig | None:
    """ "allegro_sampling" of model_index.json, None if there is none."""
    path = root / "model_index.json"
    stated: Any = read_json(path).get("allegro_sampling") if path.is_file() else None
    if stated is None:
        return None
    if not isinstance(stated, dict):
        raise UnsupportedCheckpoint(
            f"{path}: allegro_sampling is {stated!r}, expected a table. Download the file again."
        )
    values: dict[str, Any] = {}
    for name, released in SAMPLING_88X720P.to_dict().items():
        value = values[name] = stated.get(name, released)
        if isinstance(released, float) and type(value) is int:
            values[name] = float(value)  # JSON writers drop the ".0"
        elif type(value) is not type(released):
            raise UnsupportedCheckpoint(
                f"{path}: {name} is {value!r}, expected a value of type {type(released).__name__}. "
                "Correct the file or download it again."
            )
    return SamplingConfig.from_dict(values)
