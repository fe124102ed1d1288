"""What a run took, as text and as a chart."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .progress import GIB, Stage, last_run

_WIDTH, _ROW, _TOP, _LEFT, _BAR = 640, 34, 42, 170, 330
_PAPER, _INK, _TIME, _MEMORY = (24, 26, 32), (226, 228, 233), (79, 140, 255), (240, 160, 75)


def report() -> tuple[str, Tensor]:
    """Text, and a chart [1, H, 640, 3] in [0, 1], of the stages of this run."""
    stages, current = last_run()
    title = "Seconds and peak memory" + ("" if current else " of the run before: nothing had to be computed in this one")
    if not stages:
        title = "No stage of Allegro has run yet"
    return _text(title, stages), _chart(title, stages)


def _text(title: str, stages: list[Stage]) -> str:
    """A table for people and scripts."""
    header = f"{'stage':<20} {'seconds':>9} {'GPU allocated':>14} {'GPU reserved':>14} {'main memory':>14}"
    rows = [f"{s.name:<20} {s.seconds:>9.1f} {_gib(s.allocated):>14} {_gib(s.reserved):>14} {_gib(s.ram):>14}" for s in stages]
    total = f"{'total':<20} {sum(s.seconds for s in stages):>9.1f}"
    return "\n".join([title, header, *rows, total] if stages else [title])


def _gib(number: int | None) -> str:
    return "-" if number is None else f"{number / GIB:.2f} GiB"


def _peak(stage: Stage) -> int:
    """Of the device that the stage ran on."""
    return (stage.ram if stage.allocated is None else stage.allocated) or 0


def _chart(title: str, stages: list[Stage]) -> Tensor:
    """Two bars for each stage: its time and its memory, each against the largest."""
    image = Image.new("RGB", (_WIDTH, _TOP + _ROW * max(1, len(stages)) + 8), _PAPER)
    draw, font = ImageDraw.Draw(image), ImageFont.load_default()
    draw.text((12, 8), title, _INK, font)
    draw.text((_LEFT, 24), "seconds", _TIME, font)
    draw.text((_LEFT + 60, 24), "peak memory", _MEMORY, font)
    longest = max((s.seconds for s in stages), default=0) or 1
    largest = max((_peak(s) for s in stages), default=0) or 1
    for i, stage in enumerate(stages):
        y = _TOP + _ROW * i
        draw.text((12, y + 8), stage.name, _INK, font)
        for row, (share, colour, label) in enumerate((
                (stage.seconds / longest, _TIME, f"{stage.seconds:.1f} s"),
                (_peak(stage) / largest, _MEMORY, _gib(_peak(stage))))):
            end = _LEFT + max(1, round(_BAR * share))
            draw.rectangle((_LEFT, y + 2 + 14 * row, end, y + 12 + 14 * row), colour)
            draw.text((end + 6, y + 1 + 14 * row), label, _INK, font)
    return torch.from_numpy(np.asarray(image, dtype=np.float32) / 255)[None]
