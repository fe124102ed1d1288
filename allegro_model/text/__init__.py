"""Prompt text: cleaning, templates, tokenizers and the T5 encoder."""

from .cleaning import MAX_CHARACTERS, clean_caption
from .encoder import TextEncoder, build_text_encoder
from .prompts import DEFAULT_NEGATIVE, POSITIVE_TEMPLATE, format_negative, format_prompt
from .storyboard import read_storyboard
from .tokenizer import has_tokenizer, load_tokenizer

__all__ = [
    "DEFAULT_NEGATIVE",
    "MAX_CHARACTERS",
    "POSITIVE_TEMPLATE",
    "TextEncoder",
    "build_text_encoder",
    "clean_caption",
    "format_negative",
    "format_prompt",
    "has_tokenizer",
    "load_tokenizer",
    "read_storyboard",
]
