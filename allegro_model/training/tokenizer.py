"""A hand-made unigram vocabulary in the format of a T5 tokenizer: whole words, and characters for the rest."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import MissingDependency
from ..text.prompts import DEFAULT_NEGATIVE, format_negative, format_prompt
from .captions import write_caption
from .data import draw_attributes

_WORD_SCORE, _CHARACTER_SCORE = -5.0, -12.0
_SPECIAL = ("<pad>", "</s>", "<unk>")
_CAPTIONS_SCANNED = 12000


def vocabulary_words() -> list[str]:
    """Return every word that captions, the positive template and the default negative can contain, sorted."""
    rng = np.random.default_rng(0)
    texts = [write_caption(draw_attributes(rng), rng) for _ in range(_CAPTIONS_SCANNED)]
    texts += [format_prompt("", template=True, clean=True), format_negative(DEFAULT_NEGATIVE, clean=True)]
    words: set[str] = set()
    for text in texts:
        words.update(word.strip(string.punctuation) for word in text.split())
    return sorted(word for word in words if word)


def build_vocabulary() -> list[tuple[str, float]]:
    """Return (piece, log score) pairs; pad, eos and unk have the ids 0, 1 and 2."""
    characters = ["▁", *string.ascii_lowercase, *string.digits, *string.punctuation]
    words = [f"▁{word}" for word in vocabulary_words()]
    vocabulary = [(piece, 0.0) for piece in _SPECIAL]
    vocabulary += [(piece, _CHARACTER_SCORE) for piece in characters]
    vocabulary += [(word, _WORD_SCORE) for word in words if word not in characters]
    return vocabulary


def _library() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise MissingDependency("training needs the tokenizers package; "
                                'install it with: pip install "allegro-video[standalone]"') from error
    return tokenizers


def load_tokenizer(folder: str | Path) -> Any:
    """Return the `tokenizers.Tokenizer` that ``save_tokenizer`` wrote to a folder."""
    return _library().Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))


def _pipeline(vocabulary: list[tuple[str, float]]) -> Any:
    """Return a `tokenizers.Tokenizer` with the steps of the T5 fast tokenizer."""
    library = _library()
    tokenizer = library.Tokenizer(library.models.Unigram(vocabulary, unk_id=2, byte_fallback=False))
    before, prefix = library.pre_tokenizers, {"replacement": "▁", "prepend_scheme": "always"}
    tokenizer.pre_tokenizer = before.Sequence([before.WhitespaceSplit(), before.Metaspace(**prefix)])
    tokenizer.decoder = library.decoders.Metaspace(**prefix)
    tokenizer.post_processor = library.processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)])
    tokenizer.add_special_tokens([library.AddedToken(piece, special=True, normalized=False) for piece in _SPECIAL])
    return tokenizer


def save_tokenizer(folder: str | Path) -> Path:
    """Write `tokenizer.json`, `tokenizer_config.json` and `special_tokens_map.json`; returns the folder.

    The folder loads with `T5TokenizerFast.from_pretrained` without sentencepiece.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _pipeline(build_vocabulary()).save(str(folder / "tokenizer.json"))
    names = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    config = {"tokenizer_class": "T5TokenizerFast", "extra_ids": 0, "additional_special_tokens": [],
              "model_max_length": 512, "legacy": False, "clean_up_tokenization_spaces": False, **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / "special_tokens_map.json").write_text(json.dumps(names, indent=2) + "\n", encoding="utf-8")
    return folder
