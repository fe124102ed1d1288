"""Workflows in API form: built from a prompt, or read from a file and changed."""

from __future__ import annotations

import copy
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..config import SAMPLING_88X720P, TI2V_GUIDANCE_SCALE, SamplingConfig
from ..errors import AllegroError
from .server import Graph, upload_name

RELEASED = "released"
BUNDLED = "tiny"
_ASSETS = Path(__file__).resolve().parents[1] / "assets"
# The released files have no name that all users share; these are what the README tells to call them.
_RELEASED_FILES = {"transformer": "allegro_dit.safetensors", "transformer_ti2v": "allegro_ti2v.safetensors",
                   "text_encoder": "t5xxl_fp16.safetensors", "vae": "allegro_vae.safetensors"}
_BUNDLED_FILES = {"transformer": "allegro-tiny (bundled)", "transformer_ti2v": "allegro-tiny-ti2v (bundled)",
                  "text_encoder": "allegro-tiny (bundled)", "vae": "allegro-tiny (bundled)"}

# Option -> (type, names of the inputs it sets wherever a node has one, other inputs that such a node has).
_CLIP = ("width", "height", "length")
NUMBERS: dict[str, tuple[type, tuple[str, ...], tuple[str, ...]]] = {
    "seed": (int, ("seed", "noise_seed"), ()),
    "steps": (int, ("steps",), ()),
    "cfg": (float, ("cfg",), ()),
    "width": (int, ("width",), _CLIP),
    "height": (int, ("height",), _CLIP),
    "frames": (int, ("length",), _CLIP),
    "transformer": (str, ("model_name",), ("weight_dtype",)),
    "text_encoder": (str, ("clip_name",), ()),
    "vae": (str, ("vae_name",), ()),
}
FRAMES = {"first_frame": "start_image", "last_frame": "end_image"}
TEXTS = {"prompt": "positive", "negative": "negative"}
OPTIONS = (*TEXTS, *NUMBERS, *FRAMES)
# Inputs that name a file in the server's input folder.
_UPLOADS = {("LoadImage", "image"), ("LoadImageMask", "image"), ("LoadImageOutput", "image"), ("LoadVideo", "file"),
            ("LoadAudio", "audio")}


def text_to_video(prompt: str, *, model: str = BUNDLED, **options: Any) -> Graph:
    """The graph of a video from a prompt.

    Args:
        prompt: what it shows.
        model: "tiny", "released" (the files as the README names them), or the name of a folder in the server's
            models/allegro. Settings that are not given are what the model was made for, or the released one.
        options: see `OPTIONS`: negative, seed, steps, cfg, width, height, frames, transformer, text_encoder, vae.
    Raises:
        AllegroError: an option cannot be used.
    """
    graph = base_graph(model, given_frames=False)
    apply_options(graph, {"prompt": prompt, **options})
    return graph


def base_graph(model: str = BUNDLED, *, given_frames: bool) -> Graph:
    """The graph of a model, with an empty prompt.

    Args:
        model: as in `text_to_video`.
        given_frames: for the image-to-video model.
    """
    s, files = _sampling(model, given_frames), _files(model)
    size = {"width": s.width, "height": s.height, "length": s.num_frames, "batch_size": 1}
    cleaning = {"clean_caption": True, "prompt_weighting": False}
    tiles = {"tile_size": 0, "overlap": 0, "temporal_size": 0, "temporal_overlap": 0}
    graph = {
        "transformer": _node("LoadAllegroDiT", model_name=files["transformer_ti2v" if given_frames else "transformer"],
                             weight_dtype="default"),
        "text_encoder": _node("LoadAllegroT5", clip_name=files["text_encoder"], device="default"),
        "vae": _node("LoadAllegroVAE", vae_name=files["vae"], dtype="default"),
        "prompt": _node("AllegroT5Encode", clip=["text_encoder", 0], text="", role="positive", **cleaning),
        "negative": _node("AllegroT5Encode", clip=["text_encoder", 0], text=s.negative_prompt.strip(), role="negative",
                          **cleaning),
        "size": _node("EmptyAllegroLatentVideo", **size),
        "sampler": _node("AllegroSampler", model=["transformer", 0], positive=["prompt", 0], negative=["negative", 0],
                         latent_image=["size", 0], seed=42, steps=s.num_steps, cfg=s.guidance_scale, denoise=1.0,
                         noise_source="reference"),
        "decode": _node("AllegroVideoVAEDecode", samples=["sampler", 0], vae=["vae", 0], **tiles),
        "video": _node("CreateVideo", images=["decode", 0], fps=s.fps),
        "save": _node("SaveVideo", video=["video", 0], filename_prefix="video/allegro", format="auto", codec="auto"),
    }
    if given_frames:
        graph["size"] = _node("AllegroImageToVideo", positive=["prompt", 0], negative=["negative", 0], vae=["vae", 0],
                              **size, fit="crop")
        graph["sampler"]["inputs"] |= {"positive": ["size", 0], "negative": ["size", 1], "latent_image": ["size", 2]}
    return graph


def _node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


def _sampling(model: str, given_frames: bool) -> SamplingConfig:
    """The settings a model was made for."""
    name = f"{BUNDLED}-ti2v" if given_frames else BUNDLED
    if model == BUNDLED:
        index = json.loads((_ASSETS / name / "model_index.json").read_text(encoding="utf-8"))
        return SamplingConfig.from_dict(index["allegro_sampling"])
    guidance = {"guidance_scale": TI2V_GUIDANCE_SCALE} if given_frames else {}
    return SamplingConfig.from_dict({**SAMPLING_88X720P.to_dict(), **guidance})


def _files(model: str) -> dict[str, str]:
    """What the loaders are asked for: {part: choice}."""
    if model in (BUNDLED, RELEASED):
        return _BUNDLED_FILES if model == BUNDLED else _RELEASED_FILES
    return {part: f"{model}/{part.removesuffix('_ti2v')}" for part in _RELEASED_FILES}


def read_graph(path: str | os.PathLike[str]) -> Graph:
    """A workflow from a file.

    Args:
        path: a JSON file in API form.
    Raises:
        AllegroError: it cannot be read, or is something else.
    """
    try:
        graph = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise AllegroError(f"Cannot read {path}: {error.strerror or error}. Check the path.") from error
    except ValueError as error:
        raise AllegroError(f"{path} is no JSON file: {error}. Expected a workflow in API form.") from error
    if isinstance(graph, dict) and "nodes" in graph and "links" in graph:
        raise AllegroError(f"{path} is a workflow for the editor, and its API form is needed. Open it in ComfyUI and choose "
                           "Workflow > Export (API); those of this project lie in workflows/api.")
    if not isinstance(graph, dict) or not graph or not all(
            isinstance(node, dict) and isinstance(node.get("class_type"), str) and isinstance(node.get("inputs"), dict)
            for node in graph.values()):
        raise AllegroError(f"{path} is no workflow in API form: expected an object of nodes, each with class_type and inputs.")
    return graph


# Changes


def apply_options(graph: Graph, options: Mapping[str, Any]) -> dict[str, Path]:
    """Sets what the options are called for, in every node it concerns. Changes `graph`.

    Args:
        graph: any workflow.
        options: name -> value, or None where nothing is asked for; see `OPTIONS`. Texts of numbers are understood.
    Returns:
        files to be uploaded: {name at the server: file here}.
    Raises:
        AllegroError: the graph has no place for an option, or more than one for a text.
    """
    uploads: dict[str, Path] = {}
    for name, value in options.items():
        if value is None:
            continue
        if name in TEXTS:
            _set_text(graph, name, _as_kind(name, value, str))
        elif name in NUMBERS:
            _set_number(graph, name, value)
        elif name in FRAMES:
            uploads |= _set_frame(graph, name, Path(value))
        else:
            raise AllegroError(f"There is no option {name!r}: expected one of {', '.join(OPTIONS)}, or NODE.INPUT.")
    return uploads


def _set_number(graph: Graph, name: str, value: Any) -> None:
    kind, inputs, beside = NUMBERS[name]
    converted = _as_kind(name, value, kind)
    found = False
    for node in graph.values():
        for key in inputs:
            if key in node["inputs"] and not isinstance(node["inputs"][key], list) and set(beside) <= node["inputs"].keys():
                node["inputs"][key] = converted
                found = True
    if not found:
        raise AllegroError(f"No node of the workflow takes {name}: none has {' or '.join(inputs)} as a value of its own. "
                           "Leave it out, or set the input meant with NODE.INPUT.")


def _as_kind(name: str, value: Any, kind: type) -> Any:
    """A value of an option, which may be a text or come from JSON; nothing is rounded."""
    if kind is str and isinstance(value, str):
        return value
    if kind is not str and isinstance(value, int | float | str) and not isinstance(value, bool):
        with suppress(ValueError, OverflowError):
            number = kind(value) if isinstance(value, str) else value
            if math.isfinite(number) and kind(number) == number:
                return kind(number)
    wanted = {int: "whole number", float: "number", str: "text"}[kind]
    raise AllegroError(f"{name}: {value!r} is no {wanted}.")


def _set_text(graph: Graph, name: str, text: str) -> None:
    nodes = sorted({found for node in graph for found in _texts(graph, node, TEXTS[name], set())})
    if len(nodes) != 1:
        listed = ", ".join(f"{node} ({graph[node]['inputs']['text'][:30]!r})" for node in nodes)
        raise AllegroError(f"{name}: the workflow has {f'several: nodes {listed}' if nodes else 'no node for it'}. Set the "
                           "text meant with NODE.text.")
    graph[nodes[0]]["inputs"]["text"] = text


def _texts(graph: Graph, node: str, role: str, seen: set[str]) -> Iterator[str]:
    """The nodes that a sampler's `role` input gets its text from, directly or through others."""
    link = graph[node]["inputs"].get(role) if node in graph else None
    link = link or (graph[node]["inputs"].get("conditioning") if node in graph and seen else None)
    if not isinstance(link, list) or str(link[0]) not in graph or node in seen:
        return
    source = str(link[0])
    if isinstance(graph[source]["inputs"].get("text"), str):
        yield source
    else:
        yield from _texts(graph, source, role, seen | {node})


def _set_frame(graph: Graph, name: str, path: Path) -> dict[str, Path]:
    nodes = [node for node in graph.values() if node["class_type"] == "AllegroImageToVideo"]
    if not nodes:
        raise AllegroError(f"{name}: the workflow has no node AllegroImageToVideo. Take another, or none.")
    upload = upload_name(path)
    key = name
    while key in graph and graph[key]["class_type"] != "LoadImage":
        key += "_"
    graph[key] = _node("LoadImage", image=upload)
    for node in nodes:
        node["inputs"][FRAMES[name]] = [key, 0]
    return {upload: path}


def override(graph: Graph, target: str, value: Any, folder: Path = Path()) -> dict[str, Path]:
    """Sets one input. Changes `graph`.

    Args:
        graph: any workflow.
        target: NODE.INPUT, where NODE is the id, the title or the type of a node.
        value: of its type; or a text, which is read as a number, yes or no if the input holds such a value now. For
            LoadImage, LoadVideo and the like the path of a file here.
        folder: that such paths count from.
    Returns:
        files to be uploaded: {name at the server: file here}.
    Raises:
        AllegroError: there is no such node, or several, or the value does not fit.
    """
    name, _, key = target.rpartition(".")
    node = graph[find_node(graph, name)]
    if key not in node["inputs"] and isinstance(value, str):
        known = ", ".join(node["inputs"])
        raise AllegroError(f"{target}: node {name} has no input {key!r} in the workflow, but {known}.")
    if (node["class_type"], key) in _UPLOADS and isinstance(value, str) and (folder / value).is_file():
        upload = upload_name(folder / value)
        node["inputs"][key] = upload
        return {upload: folder / value}
    node["inputs"][key] = _converted(target, value, node["inputs"].get(key))
    return {}


def find_node(graph: Graph, name: str) -> str:
    """The id of the node that has this id, title or type.

    Raises:
        AllegroError: there is none, or there are several.
    """
    if name in graph:
        return name
    found = [key for key, node in graph.items() if name.lower() in (title_of(graph, key).lower(), node["class_type"].lower())]
    if len(found) == 1:
        return found[0]
    known = ", ".join(f"{key} ({title_of(graph, key)})" for key in found or graph)
    raise AllegroError(f"The workflow has {'several nodes' if found else 'no node'} {name!r}: expected the id of one of {known}.")


def title_of(graph: Graph, node: str) -> str:
    """What a node is called in the editor."""
    found = graph.get(node, {})
    return str((found.get("_meta") or {}).get("title") or found.get("class_type") or node)


def _converted(target: str, value: Any, current: Any) -> Any:
    """A text, as the kind of value that stands there now."""
    if not isinstance(value, str) or isinstance(current, str):
        return value
    try:
        found = json.loads(value.lower() if isinstance(current, bool) else value)
    except ValueError:
        found = value
    fits = isinstance(found, bool) if isinstance(current, bool) else isinstance(found, int | float | list)
    if not fits or (isinstance(current, int) and isinstance(found, float)):
        kind = "true or false" if isinstance(current, bool) else "a whole number" if isinstance(current, int) else (
            "a number" if isinstance(current, float) else 'a link such as ["3", 0]')
        raise AllegroError(f"{target}: {value!r} is not {kind}, which is expected there (now {current!r}).")
    return found


def copy_graph(graph: Graph) -> Graph:
    """A copy that can be changed."""
    return copy.deepcopy(graph)
