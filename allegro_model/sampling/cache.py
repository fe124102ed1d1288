"""Step caches: where a run may use an earlier prediction instead of the network, and how far that goes.

Three things can be left out. A prediction of the clean latents is used again while the run has moved less than a
threshold; fresh noise of an ancestral sampler changes the noise that a network predicts at every step, but the clean
latents slowly, so these are what is kept. Guidance is used in an interval of timesteps only (arXiv 2404.07724).
Pyramid attention broadcast (arXiv 2408.12588) uses the output of an attention again, inside the network.

All state is in a `StepCache`, which serves one run. Nothing of it is saved: a run that is resumed starts with an
empty one, so it computes its first step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..dit.blocks import Reuse
from ..errors import ScheduleError, UnsupportedCheckpoint

# Attention broadcast as published for Allegro: timesteps, and every how many steps which attention is computed.
# Source: VideoSys, AllegroPABConfig.
BROADCAST_TIMESTEPS = (100.0, 850.0)
BROADCAST_STEPS = {"self": 2, "cross": 6}


@dataclass(frozen=True)
class CacheLevel:
    """What a level leaves out.

    Attributes:
        threshold: a prediction is used again while the distance to where it was made is below this; 0 = never.
        guidance: lowest and highest timestep with guidance.
        broadcast: whether attentions are used again as published for Allegro.
    """

    threshold: float = 0.0
    guidance: tuple[float, float] = (0.0, 1000.0)
    broadcast: bool = False


@dataclass(frozen=True)
class CacheCalibration:
    """How fast the prediction of a model moves, and what its levels leave out.

    Attributes:
        name: the model it was measured on.
        timesteps: ascending, 0 .. 999.
        travelled: how far from its end the prediction of a run is at each of them: the sum over the steps of the square root
            of the relative change (root mean square), which spreads what is left out better over a run than the change itself.
        levels: by name.
    """

    name: str
    timesteps: tuple[float, ...]
    travelled: tuple[float, ...]
    levels: Mapping[str, CacheLevel]

    def distance(self, first: float, second: float) -> float:
        """How far a prediction moves between two timesteps, in units of `CacheLevel.threshold`."""
        start, end = np.interp((first, second), self.timesteps, self.travelled)
        return float(abs(end - start))

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        levels = {name: {"threshold": level.threshold, "guidance": list(level.guidance)} for name, level in self.levels.items()}
        return {"name": self.name, "timesteps": list(self.timesteps), "travelled": list(self.travelled), "levels": levels}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], where: str) -> CacheCalibration:
        """Reads `to_dict`, and ignores what else is there.

        Args:
            content: of a file.
            where: the file, for the message.
        Raises:
            UnsupportedCheckpoint: it is something else.
        """
        try:
            timesteps, travelled = (tuple(float(x) for x in content[key]) for key in ("timesteps", "travelled"))
            levels = {str(name): CacheLevel(float(level["threshold"]), _pair(level["guidance"]))
                      for name, level in content["levels"].items() if name in BUNDLED.levels}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UnsupportedCheckpoint(f"{where} is no calibration of a step cache ({error!r}). Make it with: allegro calibrate; or "
                                        "remove it.") from error
        sound = len(timesteps) == len(travelled) > 1 and all(a < b for a, b in pairwise(timesteps))
        if not sound or not np.isfinite((*timesteps, *travelled, *(level.threshold for level in levels.values()))).all():
            raise UnsupportedCheckpoint(f"{where} is damaged: expected as many distances as timesteps, which ascend. Make it with: "
                                        "allegro calibrate; or remove it.")
        return cls(str(content.get("name", where)), timesteps, travelled, {**BUNDLED.levels, **levels})


def _pair(values: Sequence[float]) -> tuple[float, float]:
    low, high = values
    return float(low), float(high)


# 30 steps of euler_ancestral; docs/benchmarks.md has the measurements, tests/bench/bench_cache.py makes them.
BUNDLED = CacheCalibration(
    "allegro-tiny",
    (0, 50, 100, 150, 200, 300, 400, 500, 600, 700, 800, 900, 950, 999),
    (0, 0.19, 0.50, 0.83, 1.16, 1.87, 2.70, 3.70, 4.99, 6.52, 8.20, 9.91, 10.67, 11.53),
    {
        "safe": CacheLevel(0.5, (0.0, 900.0)),
        "fast": CacheLevel(0.9, (0.0, 900.0)),
        "draft": CacheLevel(1.5, (200.0, 850.0)),
        "broadcast": CacheLevel(broadcast=True),
    },
)
CACHE_LEVELS = ("off", *BUNDLED.levels)


def check_cache(level: str) -> None:
    """Raises unless there is such a level.

    Raises:
        ScheduleError: names all levels.
    """
    if level not in CACHE_LEVELS:
        raise ScheduleError(f"cache={level!r}: must be one of {', '.join(CACHE_LEVELS)}.")


class _Held(NamedTuple):
    """A prediction, and the timestep it was made at."""

    denoised: Tensor
    timestep: float


class StepCache:
    """The cache of one run.

    Args:
        level: one of `CACHE_LEVELS` besides "off".
        calibration: of the model.
    """

    def __init__(self, level: str, calibration: CacheCalibration = BUNDLED) -> None:
        check_cache(level)
        self.name = level
        self.calibration = calibration
        self.level = calibration.levels[level]
        self._held: dict[Hashable, _Held] = {}
        self._guided = False
        self._attended: dict[Hashable, Tensor] = {}
        self._evaluations: Counter[Hashable] = Counter()  # of each group of keys
        self._counts: Counter[str] = Counter()

    def guided(self, timestep: float) -> bool:
        """Whether guidance is used at a timestep; ask once for each prediction that depends on it."""
        low, high = self.level.guidance
        inside = low <= timestep <= high
        if inside and not self._guided:
            self._held.clear()  # both prompts start anew, and so together, whether they are evaluated in one batch or not
        self._guided = inside
        self._counts["unguided"] += not inside
        return inside

    def predict(self, keys: Sequence[Hashable], timestep: float, compute: Callable[[], Tensor]) -> Tensor:
        """Predictions of the clean latents, computed or those of an earlier step.

        Each depends on the history of its own key alone, not on what is evaluated together with it: a batch of which one
        part has to be computed is computed as a whole, and the other parts stay what they were.

        Args:
            keys: what tells apart the parts of the batch that are evaluated together: the conditioning, and whatever
                else is not the same at every step. A prediction is only ever used for its own key.
            timestep: 0 .. 999.
            compute: gives [B, 4, t, h, w], B a multiple of the number of keys.
        Returns:
            [B, 4, t, h, w].
        """
        due = [key for key in keys if not self._may_stay(key, timestep)]
        if due:
            parts = compute().chunk(len(keys))
            self._evaluations[tuple(keys)] += 1
            self._held |= {key: _Held(part, timestep) for key, part in zip(keys, parts, strict=True) if key in due}
        self._counts["computed" if due else "reused"] += len(keys)
        return torch.cat([self._held[key].denoised for key in keys])  # a copy, which hosts may change

    def _may_stay(self, key: Hashable, timestep: float) -> bool:
        held = self._held.get(key)
        return held is not None and self.calibration.distance(held.timestep, timestep) < self.level.threshold

    def reuse(self, keys: Sequence[Hashable], timestep: float) -> Callable[[int], Reuse] | None:
        """For `AllegroDiT.denoise`, called inside `compute` of `predict`; None when every attention is computed."""
        if not self.level.broadcast:
            return None
        return lambda block: partial(self._attend, (tuple(keys), block), timestep)

    def _attend(self, place: tuple[Hashable, int], timestep: float, name: str, compute: Callable[[], Tensor]) -> Tensor:
        """The output of an attention: that of an earlier step where broadcasting allows it."""
        low, high = BROADCAST_TIMESTEPS
        key = (*place, name)
        turn = self._evaluations[place[0]] % BROADCAST_STEPS[name]  # counted from the first step, as published
        if turn and low < timestep < high and key in self._attended:
            self._counts["attended"] += 1
            return self._attended[key]
        self._attended.pop(key, None)
        output = compute()
        self._counts["attention"] += 1
        if timestep > low:  # nothing is used again below: the memory is free
            self._attended[key] = output
        return output

    @property
    def idle(self) -> bool:
        """Whether everything was computed so far."""
        return not any(self._counts[what] for what in ("reused", "unguided", "attended"))

    def summary(self) -> str:
        """One line about what was left out, for the log."""
        c = self._counts
        parts = [f"{c['computed']} of {c['computed'] + c['reused']} predictions computed"]
        if c["unguided"]:
            parts.append(f"{c['unguided']} more for the negative prompt left out")
        if c["attended"]:
            parts.append(f"{c['attended']} of {c['attended'] + c['attention']} attentions used again")
        if self.level.threshold:
            parts.append(f"calibrated on {self.calibration.name}")
        return f"step cache {self.name}: {', '.join(parts)}"


IDLE = "The step cache left nothing out: in so few steps each prediction differs too much. Take more steps or a higher level."
"""What is logged after a run whose cache was `StepCache.idle`."""


class Work(NamedTuple):
    """What a run has to compute.

    Attributes:
        predictions: evaluations of the network, each for one prompt.
        attended: those of them that also compute self-attention.
    """

    predictions: int
    attended: int


def count_work(level: str, timesteps: Sequence[float], *, guided: bool, calibration: CacheCalibration = BUNDLED) -> Work:
    """What a run will compute, known beforehand: a cache decides by the timesteps alone.

    Args:
        level: one of `CACHE_LEVELS`.
        timesteps: of the steps, in their order.
        guided: whether there is a negative prompt.
        calibration: of the model.
    """
    check_cache(level)
    if level == "off":
        return Work(*[len(timesteps) * (1 + guided)] * 2)
    cache, nothing, attended = StepCache(level, calibration), torch.zeros(1), 0

    def attend() -> Tensor:
        nonlocal attended
        attended += 1
        return nothing

    def compute(key: str, timestep: float) -> Tensor:
        reuse = cache.reuse([key], timestep)
        return attend() if reuse is None else reuse(0)("self", attend)

    for timestep in timesteps:
        for key in ["negative", "positive"] if guided and cache.guided(timestep) else ["positive"]:
            cache.predict([key], timestep, partial(compute, key, timestep))
    return Work(sum(cache._evaluations.values()), attended)
