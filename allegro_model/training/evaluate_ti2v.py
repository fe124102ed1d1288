"""Measures the image-to-video model: do given pictures come back, and does the caption move them?"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..conditioning import GivenFrames, build_condition
from ..config import SamplingConfig
from ..loading import load_sampling_defaults
from ..vae.scaling import denormalise, normalise
from .analyse import analyse
from .captions import Attributes, write_caption, write_motion
from .data import draw_attributes, render
from .evaluate import Case, Encode, load_models, sample_latents, to_frames
from .palette import combinations
from .recipe import CANVAS
from .ti2v_cache import keep
from .vae_stage import to_tensor

#: Frames that are given, by name of the task.
TASKS = {"first": (0,), "both": (0, CANVAS.num_frames - 1), "last": (CANVAS.num_frames - 1,), "continue": tuple(range(8))}


@dataclass(frozen=True)
class GivenCase:
    """A drawn clip of which some frames are given, and the caption for the rest.

    Attributes:
        case: caption, seed and attributes.
        frames: the drawn clip, uint8 ``[T, H, W, 3]``.
        positions: which of its frames are given.
    """

    case: Case
    frames: np.ndarray
    positions: tuple[int, ...]


def _given(attributes: Attributes, caption: str, seed: int, task: str) -> GivenCase:
    rng = np.random.default_rng(seed)
    if attributes["kind"] in ("shape", "sea"):  # begin near the middle, from where only the caption knows the way
        frames = render(attributes, rng, replace(CANVAS, num_frames=2 * CANVAS.num_frames))[CANVAS.num_frames :]
    else:
        frames = render(attributes, rng, CANVAS)
    return GivenCase(Case(caption, seed, attributes), frames, TASKS[task])


def shape_cases(task: str, count: int, *, named: bool = True) -> list[GivenCase]:
    """Return fixed cases of held-out combinations of colours, shape and direction.

    Args:
        task: of ``TASKS``.
        count: of cases.
        named: whether the caption names the colours and the shape, or the motion alone.
    """
    rng = np.random.default_rng(30_000 + list(TASKS).index(task) + (10 if named else 0))
    pool = combinations(held_out=True)
    order = rng.permutation(len(pool))
    cases = []
    for number in range(count):
        values = pool[int(order[number % len(pool)])]
        attributes = {"kind": "shape", **dict(zip(("object", "background", "shape", "direction"), values, strict=True))}
        caption = write_caption(attributes, rng) if named else write_motion(attributes, rng)
        cases.append(_given(attributes, caption, 40_000 + number, task))
    return cases


def scene_cases(kind: str, count: int) -> list[GivenCase]:
    """Return fixed cases of the sea, the clouds or the ball with their first frame given; the wordings are held out."""
    rng = np.random.default_rng(31_000)
    cases: list[GivenCase] = []
    while len(cases) < count:
        attributes = draw_attributes(rng)
        if attributes["kind"] != kind:
            continue
        try:
            caption = write_caption(attributes, rng, held_out=True)
        except LookupError:  # every wording of these attributes is in the training part
            continue
        cases.append(_given(attributes, caption, 41_000 + len(cases), "first"))
    return cases


def canvas_latents(vae: Any, cases: Sequence[GivenCase]) -> list[Tensor]:
    """Encode what the model is given of each case, its pictures in a grey clip: means ``[1, 4, t, h, w]``."""
    return [vae.encode(_kept(each).canvas())[0] for each in cases]


def _kept(each: GivenCase) -> GivenFrames:
    return keep(to_tensor(each.frames), each.positions)


def generate_given(models: tuple[Any, Encode, Any], cases: Sequence[GivenCase], canvases: Sequence[Tensor],
                   sampling: SamplingConfig, *, batch: int = 16) -> list[np.ndarray]:
    """Generate the clips of all cases.

    Args:
        models: DiT, text encoding function, VideoVAE.
        cases: given frames, prompts and seeds.
        canvases: the ``canvas_latents`` of these.
        sampling: size, steps, guidance.
        batch: clips sampled together.

    Returns:
        uint8 ``[T, H, W, 3]`` per case.
    """
    dit, encode, vae = models
    scale = vae.config.scale_factor
    clips = []
    for first in range(0, len(cases), batch):
        part, means = cases[first : first + batch], canvases[first : first + batch]
        condition = torch.cat([build_condition(normalise(mean, scale), _kept(each))
                               for each, mean in zip(part, means, strict=True)])
        latents = sample_latents(dit, encode, [each.case for each in part], sampling, condition=condition)
        for item in denormalise(latents, scale).split(1):
            clips.append(to_frames(vae.decode(item)[0]))
    return clips


def frame_psnr(a: np.ndarray, b: np.ndarray) -> float:
    """PSNR in dB of uint8 pictures."""
    return float(-10 * np.log10(((a.astype(np.float64) - b) ** 2).mean() / 255**2))


class Reproduction(NamedTuple):
    """How well one given picture came back, PSNR in dB against the picture.

    Attributes:
        generated: of the generated frame.
        in_clip: of the VAE's reconstruction of the drawn clip that the picture is from: the best that can be hoped for.
        on_canvas: of the VAE's reconstruction of what the model is given, the picture in a grey clip.
    """

    generated: float
    in_clip: float
    on_canvas: float


def reproduction(vae: Any, cases: Sequence[GivenCase], canvases: Sequence[Tensor],
                 clips: Sequence[np.ndarray]) -> list[Reproduction]:
    """Compare given pictures with the generated frames; of a continuation the first and the last given one."""
    found = []
    for each, canvas, clip in zip(cases, canvases, clips, strict=True):
        in_clip, on_canvas = (to_frames(vae.decode(mean)[0])
                              for mean in (vae.encode(to_tensor(each.frames)[None])[0], canvas))
        for position in sorted({each.positions[0], each.positions[-1]}):
            picture = each.frames[position]
            found.append(Reproduction(*(frame_psnr(other[position], picture) for other in (clip, in_clip, on_canvas))))
    return found


def join_jump(clip: np.ndarray, position: int) -> float:
    """Mean change from frame ``position - 1`` to ``position``, in units of the median change between frames."""
    changes = np.abs(np.diff(clip.astype(np.float32), axis=0)).mean(axis=(1, 2, 3))
    return float(changes[position - 1] / max(1e-6, float(np.median(changes))))


def score_given(cases: Sequence[GivenCase], clips: Sequence[np.ndarray]) -> dict[str, tuple[int, int]]:
    """Return (right, total) per ``kind.attribute``, whether the caption names it or only the picture shows it."""
    results: dict[str, list[bool]] = defaultdict(list)
    for each, clip in zip(cases, clips, strict=True):
        kind = each.case.attributes["kind"]
        found = analyse(clip, kind)
        for name, value in each.case.attributes.items():
            if name != "kind":
                results[f"{kind}.{name}"].append(found[name] == value)
    return {name: (sum(values), len(values)) for name, values in sorted(results.items())}


def _summary(found: Sequence[Reproduction]) -> dict[str, float]:
    loss = [each.in_clip - each.generated for each in found]
    gain = [each.generated - each.on_canvas for each in found]
    return {"median PSNR": float(np.median([each.generated for each in found])),
            "median loss against the clip": float(np.median(loss)), "worst loss against the clip": max(loss),
            "median gain on the canvas": float(np.median(gain)), "worst gain on the canvas": min(gain)}


def evaluate_ti2v_folder(folder: Path) -> dict[str, Any]:
    """Return per task what is right (right, total), and in dB how well given pictures came back."""
    models, sampling = load_models(folder), load_sampling_defaults(folder)
    groups = {"first": shape_cases("first", 32), "motion only": shape_cases("first", 32, named=False),
              **{task: shape_cases(task, 16) for task in TASKS if task != "first"},
              **{kind: scene_cases(kind, 8) for kind in ("sea", "clouds", "ball")}}
    report: dict[str, Any] = {}
    for name, cases in groups.items():
        canvases = canvas_latents(models[2], cases)
        clips = generate_given(models, cases, canvases, sampling)
        report[name] = {**score_given(cases, clips), **_summary(reproduction(models[2], cases, canvases, clips))}
        if name == "continue":
            report[name]["worst jump at the join"] = max(join_jump(clip, len(TASKS[name])) for clip in clips)
    return report
