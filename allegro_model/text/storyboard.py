"""Storyboards: one prompt per clip of a longer video, as text that people write and read.

    # A line that begins with # is a remark.
    all: watercolour, soft morning light
    a small boat leaves the harbour
    the boat sails into a storm
    the storm is over, the boat drifts under the stars

Every other line is the prompt of one clip, in order; what follows `all:` is added to each of them.
"""

from __future__ import annotations

import re

from ..errors import TextError
from .cleaning import MAX_CHARACTERS

MAX_CLIPS = 100
_ALL = re.compile(r"all\s*[:\uff1a]", re.IGNORECASE)  # the full-width colon is that of Chinese keyboards


def read_storyboard(text: str) -> list[str]:
    """The prompts of a storyboard.

    Args:
        text: as above, at most `MAX_CHARACTERS` characters for each of `MAX_CLIPS` clips.
    Returns:
        one prompt per clip, at least one.
    Raises:
        TextError: no prompt is left, or there are too many.
    """
    if len(text) > MAX_CHARACTERS * MAX_CLIPS:
        raise TextError(f"The storyboard has {len(text)} characters, at most {MAX_CHARACTERS * MAX_CLIPS} are read. Split it.")
    lines = [line.strip() for line in text.lstrip("\ufeff").splitlines()]
    lines = [line for line in lines if line and not line.startswith("#")]
    shared = [line[found.end() :].strip() for line in lines if (found := _ALL.match(line))]
    prompts = [", ".join([line.rstrip(" ,"), *filter(None, shared)]) for line in lines if not _ALL.match(line)]
    if not prompts:
        raise TextError("The storyboard has no prompt: expected one line per clip, besides remarks (#) and all: lines.")
    if len(prompts) > MAX_CLIPS:
        raise TextError(f"The storyboard has {len(prompts)} clips, at most {MAX_CLIPS} are read. Split it.")
    return prompts
