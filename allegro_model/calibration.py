"""Calibrates the step caches on a model: how fast its prediction moves, and how much each level may leave out.

All of it happens on the schedule, the sampler and the noise that the model is used with. Runs with every step evaluated
give the distances; runs that leave out more and more give, against them, what each speed costs. The fastest that the gate
of a level lets through becomes that level. Finished runs are kept in files, so that a calibration can be stopped.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from .atomic import atomic_file, writing
from .conditioning import GivenFrames
from .pipeline import AllegroPipeline, PromptEmbeds, SampleSettings
from .sampling import StepCache, StepInfo, reference_timesteps
from .sampling.cache import CacheCalibration, CacheLevel

# Level -> (least PSNR in dB, least SSIM) against the exact clip, means over the clips.
GATES = {"safe": (28.0, 0.90), "fast": (23.0, 0.0), "draft": (20.0, 0.0)}
# How many times fewer evaluations are tried, in this order, until no gate is passed any more.
SPEEDS = (1.5, 1.8, 2.3, 3.0, 4.0, 5.0, 6.5, 8.5)
MIN_STEPS = 12  # of a run: the slowest of these speeds is possible from here on
GUIDANCE = (0.0, 900.0)  # timesteps with guidance; above, nothing of the clip is decided yet
PROMPTS = (
    "Waves roll onto a sandy beach at sunset, seen from a drone that flies along the coast.",
    "An old woman sits at the window of a train and looks at the passing fields.",
    "A red car drives along a mountain road, the camera follows it.",
)
_TIMESTEPS = (*tuple(range(0, 1000, 50)), 999)
# title -> what shows the progress of a run: called with (steps done, steps in all), raising in it cancels
Watch = Callable[[str], AbstractContextManager[Callable[[int, int], None]]]


@dataclass(frozen=True)
class Speed:
    """What a speed costs.

    Attributes:
        fewer: times fewer evaluations.
        threshold: of the step cache.
        psnr: dB against the exact clips, mean.
        ssim: likewise.
    """

    fewer: float
    threshold: float
    psnr: float
    ssim: float

    def passes(self, level: str) -> bool:
        """Whether the gate of a level lets it through."""
        psnr, ssim = GATES[level]
        return self.psnr >= psnr and self.ssim >= ssim


def cost(prompts: int) -> tuple[float, float]:
    """Least and most runs of full length that a calibration takes; all of `SPEEDS` are tried at most."""
    return prompts * (1 + 1 / SPEEDS[0]), prompts * (1 + sum(1 / speed for speed in SPEEDS))


class Calibrator:
    """A calibration that goes on.

    Args:
        pipeline: of the model.
        settings: of the runs; the seed is counted up from prompt to prompt.
        prompts: what the clips show.
        folder: where finished runs are kept; those of the same settings that are there are not made again.
        watch: shows progress.
    """

    def __init__(self, pipeline: AllegroPipeline, settings: SampleSettings, prompts: Sequence[str], folder: Path, watch: Watch) -> None:
        self.pipeline, self.settings, self.prompts = pipeline, settings, prompts
        self.folder, self.watch = folder, watch
        self._embeds: list[PromptEmbeds] = []
        self._condition: Tensor | None = None

    def run(self, name: str) -> tuple[CacheCalibration, list[Speed]]:
        """Everything.

        Args:
            name: of the model, for the file.
        Returns:
            the calibration, and what was measured for it.
        Raises:
            OutputError: the folder cannot be made, or not be written to.
            ValueError: the runs have so few steps that each is needed; see `MIN_STEPS`.
        """
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        exact = [self._sampled(i, None, 0.0) for i in range(len(self.prompts))]
        travelled = np.mean([self._travelled(changes) for _, changes in exact], axis=0)
        base = CacheCalibration(name, _TIMESTEPS, tuple(round(float(x), 4) for x in travelled), {})
        speeds: list[Speed] = []
        for wanted in SPEEDS:
            threshold = threshold_for(base, wanted, self.settings)
            if threshold is None:
                break  # so few steps that each is needed
            if speeds and threshold == speeds[-1].threshold:
                continue  # with few steps the next speed that is possible may be faster than both
            clips = [self._sampled(i, base, threshold)[0] for i in range(len(self.prompts))]
            likeness = [self._compare(a, b) for (a, _), b in zip(exact, clips, strict=True)]
            psnr, ssim = (float(np.mean(values)) for values in zip(*likeness, strict=True))
            speeds.append(Speed(evaluations(base, 0.0, self.settings) / evaluations(base, threshold, self.settings), threshold, psnr, ssim))
            if not any(speeds[-1].passes(level) for level in GATES):
                break
        return replace(base, levels=choose(speeds)), speeds

    def _sampled(self, number: int, base: CacheCalibration | None, threshold: float) -> tuple[Tensor, Tensor]:
        """(raw latents [1, 4, t, h, w], relative changes of the prediction from step to step [num_steps - 1]) of a run."""
        settings = replace(self.settings, seed=self.settings.seed + number, cache="off" if base is None else "safe")
        key = json.dumps([settings.to_dict(), self.prompts[number], threshold, None if base is None else base.to_dict()])
        path = self.folder / f"{number + 1}-{'exact' if base is None else f'{threshold:.4f}'}.safetensors"
        known = _read(path, key)
        if known is not None:
            return known
        before = self.pipeline.calibration
        if base is not None:
            self.pipeline.calibration = replace(base, levels={"safe": CacheLevel(threshold, GUIDANCE)})
        try:
            result = self._drawn(number, settings, "every step" if base is None else f"threshold {threshold:.2f}")
        finally:
            self.pipeline.calibration = before
        _write(path, key, result)
        return result

    def _drawn(self, number: int, settings: SampleSettings, how: str) -> tuple[Tensor, Tensor]:
        changes: list[Tensor] = []
        last: Tensor | None = None
        embeds, condition = self._inputs(number)
        with self.watch(f"Clip {number + 1}, {how}") as show:

            def after_step(info: StepInfo) -> None:
                nonlocal last
                if last is not None:
                    changes.append((info.denoised - last).square().mean().sqrt().cpu())
                last = info.denoised
                show(info.step, info.num_steps)

            state = self.pipeline.sample(embeds, self.pipeline.start(settings, condition=condition), callback=after_step)
        assert last is not None
        relative = torch.stack(changes) / last.square().mean().sqrt().cpu()
        return self.pipeline.raw_latents(state), relative

    def _inputs(self, number: int) -> tuple[PromptEmbeds, Tensor | None]:
        s = self.settings
        if not self._embeds:
            self._embeds = [self.pipeline.encode_prompt(prompt, guidance_scale=s.guidance_scale) for prompt in self.prompts]
            if self.pipeline.image_to_video:
                self._condition = self.pipeline.condition(GivenFrames.fitted({}, s.width, s.height, s.num_frames))
        return self._embeds[number], self._condition

    def _travelled(self, changes: Tensor) -> np.ndarray:
        """The distance to the end at `_TIMESTEPS`."""
        clock = reference_timesteps(self.settings.num_steps).numpy()
        left = np.append(np.cumsum(changes.sqrt().numpy()[::-1])[::-1], 0.0)
        return np.interp(_TIMESTEPS, clock[::-1], left[::-1])

    def _compare(self, exact: Tensor, other: Tensor) -> tuple[float, float]:
        """(PSNR in dB, SSIM) of the clips of two latents, decoded side by side."""
        error, likeness, count = 0.0, 0.0, 0
        for a, b in zip(self._frames(exact), self._frames(other), strict=True):
            error += float((a - b).square().mean()) * a.shape[1]
            likeness += ssim(a, b) * a.shape[1]
            count += a.shape[1]
        return float(-10 * np.log10(max(error / count, 1e-10))), likeness / count

    def _frames(self, latents: Tensor) -> Iterator[Tensor]:
        """[3, k, H, W] in 0 .. 1, a few at a time."""
        for frames in self.pipeline.decode_stream(latents):
            yield frames[0] / 2 + 0.5


def evaluations(base: CacheCalibration, threshold: float, settings: SampleSettings) -> int:
    """How many prompts a run evaluates, all steps together; threshold 0 and no limit of guidance is the exact run."""
    level = CacheLevel(threshold, GUIDANCE) if threshold else CacheLevel()
    cache = StepCache("safe", replace(base, levels={"safe": level}))
    computed = 0

    def compute() -> Tensor:
        nonlocal computed
        computed += 1
        return torch.zeros(1)

    for timestep in reference_timesteps(settings.num_steps).tolist():
        guided = settings.guidance_scale != 1.0 and cache.guided(timestep)
        for key in ("negative", "positive") if guided else ("positive",):
            cache.predict([key], timestep, compute)
    return computed


def threshold_for(base: CacheCalibration, fewer: float, settings: SampleSettings) -> float | None:
    """The smallest threshold with so many times fewer evaluations; None if there is none."""
    most = evaluations(base, 0.0, settings) / fewer
    low, high = 0.0, base.travelled[-1]
    if evaluations(base, high, settings) > most:
        return None
    while high - low > 1e-3:
        middle = (low + high) / 2
        low, high = (low, middle) if evaluations(base, middle, settings) <= most else (middle, high)
    return round(high, 4)


def choose(speeds: Sequence[Speed]) -> dict[str, CacheLevel]:
    """For each level the fastest that its gate lets through, or else the slowest that was tried.

    Raises:
        ValueError: no speed was tried.
    """
    if not speeds:
        raise ValueError(f"There is no speed to choose from: expected at least one. Calibrate runs of {MIN_STEPS} steps or more.")
    levels = {}
    for level in GATES:
        passed = [speed for speed in speeds if speed.passes(level)] or list(speeds[:1])
        levels[level] = CacheLevel(max(passed, key=lambda speed: speed.fewer).threshold, GUIDANCE)
    return levels


def describe(calibration: CacheCalibration, speeds: Sequence[Speed]) -> list[str]:
    """Lines for the user: what each level leaves out, what it costs, and whether it passes its gate."""
    lines = []
    for name, level in calibration.levels.items():
        (speed,) = [speed for speed in speeds if speed.threshold == level.threshold]
        psnr, least = GATES[name]
        gate = f"{psnr:g} dB" + (f" and {least:g}" if least else "")
        lines.append(f"{name}: {speed.fewer:.2f} times fewer evaluations, {speed.psnr:.1f} dB, SSIM {speed.ssim:.3f}"
                     + ("" if speed.passes(name) else f"; this does not reach {gate}, and nothing that was tried does"))
    return lines


def to_json(calibration: CacheCalibration, speeds: Sequence[Speed], about: dict[str, Any]) -> bytes:
    """The file of a calibration, with what was measured for it."""
    return (json.dumps({**calibration.to_dict(), "measured": {**about, "speeds": [asdict(s) for s in speeds]}}, indent=2) + "\n").encode()


def ssim(a: Tensor, b: Tensor) -> float:
    """Structural similarity of brightness, mean over the frames; windows of 7x7. Source: Wang et al. 2004.

    Args:
        a, b: [3, T, H, W] in 0 .. 1.
    """
    x, y = (clip.mean(dim=0)[:, None] for clip in (a, b))  # [T, 1, H, W]

    def mean(z: Tensor) -> Tensor:
        return F.avg_pool2d(z, 7, stride=1)

    mx, my = mean(x), mean(y)
    vx, vy, cov = mean(x * x) - mx * mx, mean(y * y) - my * my, mean(x * y) - mx * my
    c1, c2 = 0.01**2, 0.03**2
    return float(((2 * mx * my + c1) * (2 * cov + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))).mean())


def _read(path: Path, key: str) -> tuple[Tensor, Tensor] | None:
    try:
        with safe_open(str(path), framework="pt") as file:
            if (file.metadata() or {}).get("run") == key:
                return file.get_tensor("latents"), file.get_tensor("changes")
    except (OSError, SafetensorError):
        pass  # not there yet, or cut off: it is made again
    return None


def _write(path: Path, key: str, result: tuple[Tensor, Tensor]) -> None:
    with atomic_file(path, force=True) as temporary, writing(path):
        temporary.write_bytes(save({"latents": result[0].contiguous(), "changes": result[1].contiguous()}, {"run": key}))
