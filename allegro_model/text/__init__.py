"""Prompt text: cleaning, templates and the T5 encoder."""

from .cleaning import MAX_CHARACTERS, clean_caption
from .prompts import DEFAULT_NEGATIVE, POSITIVE_TEMPLATE, format_negative, format_prompt

__all__ = [
    "DEFAULT_NEGATIVE",
    "MAX_CHARACTERS",
    "POSITIVE_TEMPLATE",
    "clean_caption",
    "format_negative",
    "format_prompt",
]
