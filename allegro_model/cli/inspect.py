"""`allegro inspect`: what is this file?"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..errors import AllegroError
from ..geometry import SPATIAL_FACTOR, TEMPORAL_FACTOR
from ..loading import Header, bundled_loras, bundled_model, describe, read_header
from ..media import probe_clip, read_metadata
from .base import Job, check_report_output
from .console import size
from .job import LATENTS_SUFFIX

_CLIP_SUFFIXES = (".mp4", ".webm", ".gif", ".png", ".mkv", ".mov", ".avi", ".m4v")
# Tensor that marks a file of latents -> what the file is.
_LATENTS = {"noisy_latents": "an unfinished run, for generate --resume",
            "latent_tensor": "latents, for decode"}


def inspect(job: Job) -> None:
    """Runs the command.

    Raises:
        AllegroError: see the exit codes.
    """
    job.report.stage = "reading"
    check_report_output(job)
    facts = inspect_path(Path(job.args.path))
    job.report.facts["file"] = facts
    job.say_result("\n".join(_lines(facts)))


def inspect_path(path: Path) -> dict[str, Any]:
    """What a file or folder, or a bundled model or LoRA, is, as JSON-able values with at least "path", "family" and "title".

    Raises:
        AllegroError: it is missing, damaged, or of no known kind.
    """
    if not path.exists():
        path = _bundled(path.as_posix()) or path
    if not path.exists():
        raise AllegroError(f"There is nothing at {path}. Check the path.")
    if path.is_file() and path.suffix.lower() in _CLIP_SUFFIXES:
        return _clip(path)
    if path.is_file() and path.suffix.lower() == LATENTS_SUFFIX:
        header = read_header(path)
        for name, title in _LATENTS.items():
            if name in header.tensors:
                return _latents(path, header, name, title)
    return describe(path)


def _bundled(name: str) -> Path | None:
    """What `--model`, `--lora` or `--interpolator` would take for this name."""
    with suppress(AllegroError):
        return bundled_model(name)
    return bundled_loras().get(name)


def _clip(path: Path) -> dict[str, Any]:
    info = probe_clip(path)
    title = f"a clip of {info.width}x{info.height} at {info.fps:g} per second"
    return {"path": str(path), "family": "clip", "title": title, "width": info.width, "height": info.height,
            "fps": info.fps, "bytes": path.stat().st_size, "made_with": read_metadata(path)}


def _latents(path: Path, header: Header, name: str, title: str) -> dict[str, Any]:
    shape = header.tensors[name].shape
    made_with: Any = {}
    with suppress(ValueError):
        made_with = json.loads(header.metadata.get("allegro", "{}"))
    facts = {"path": str(path), "family": "latents", "title": title, "shape": list(shape),
             "bytes": header.num_bytes, "made_with": made_with if isinstance(made_with, dict) else {}}
    if len(shape) == 5:
        t, h, w = shape[2:]
        facts |= {"num_frames": TEMPORAL_FACTOR * t, "height": SPATIAL_FACTOR * h,
                  "width": SPATIAL_FACTOR * w}
    return facts


# For people


def _lines(facts: dict[str, Any], indent: str = "") -> Iterator[str]:
    """The facts as lines; nested facts indented."""
    yield f"{indent}{facts['path']}: {facts['title']}" if not indent else f"{indent}{facts['title']}"
    indent += "  "
    if "error" in facts:
        yield f"{indent}cannot be read: {facts['error']}"
    if "config_error" in facts:
        yield f"{indent}cannot be used: {facts['config_error']}"
    if facts.get("parameters"):
        yield f"{indent}{facts['parameters']:,} parameters in {', '.join(facts['dtypes'])}"
    if facts.get("bytes") is not None:
        count = len(facts.get("files", []))
        yield f"{indent}{size(facts['bytes'])}" + (f" in {count} file{'s' * (count > 1)}" if count else "")
    is_latents = facts["family"] == "latents" and "width" in facts
    trained = facts if is_latents else facts.get("trained_size")
    if trained:
        yield f"{indent}{trained['num_frames']} frames of {trained['width']}x{trained['height']}"
    for title in ("made_with", "sampling"):
        if facts.get(title):
            yield f"{indent}{title.replace('_', ' ')}:"
            yield from (f"{indent}  {name}: {json.dumps(value, ensure_ascii=False)}"
                        for name, value in facts[title].items())
    for part in facts.get("parts", []):
        yield from _lines(part, indent)
    for name, component in facts.get("components", {}).items():
        title = f"{name}: {component.get('title', 'damaged')}"
        if "shared_from" in component:
            title += f", from {component['shared_from']}"
        yield from _lines({"family": name, **component, "title": title}, indent)
