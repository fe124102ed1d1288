"""Tokenizer files of a model folder, read without transformers.

transformers 4 and 5 read the same `spiece.model` through different code with different requirements; the library that
wrote the file gives the reference's tokens with every version.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from ..errors import CheckpointError, MissingDependency, UnsupportedCheckpoint

END_TOKEN = 1  # of every T5

_SENTENCEPIECE = "spiece.model"
_JSON = "tokenizer.json"


class Tokenizer(Protocol):
    """What the encoder asks of a tokenizer. Those of transformers fit, too."""

    def __call__(self, text: list[str], /) -> Mapping[str, Any]:
        """{"input_ids": one list of numbers per text}; each list ends with the end token."""


class FileTokenizer:
    """A tokenizer that was read from a file.

    Attributes:
        vocabulary_size: token numbers are below it.
    """

    def __init__(self, token_ids: Callable[[str], Sequence[int]], vocabulary_size: int) -> None:
        self._token_ids = token_ids
        self.vocabulary_size = vocabulary_size

    def __call__(self, text: list[str], /) -> dict[str, list[list[int]]]:
        return {"input_ids": [[*self._token_ids(line), END_TOKEN] for line in text]}


def has_tokenizer(folder: str | Path) -> bool:
    """True if `load_tokenizer` finds its files there."""
    return any((Path(folder) / name).is_file() for name in (_SENTENCEPIECE, _JSON))


def load_tokenizer(folder: str | Path) -> FileTokenizer:
    """Reads a T5 tokenizer.

    Args:
        folder: with `spiece.model` (the published models; preferred) or `tokenizer.json`.
    Raises:
        CheckpointError: neither file is there.
        UnsupportedCheckpoint: the file is damaged.
        MissingDependency: the library that reads it is not installed.
    """
    folder = Path(folder)
    if (folder / _SENTENCEPIECE).is_file():
        return _read_sentencepiece(folder / _SENTENCEPIECE)
    if (folder / _JSON).is_file():
        return _read_json(folder / _JSON)
    raise CheckpointError(
        f"{folder} holds neither {_SENTENCEPIECE} nor {_JSON}; expected a T5 tokenizer. Download the folder tokenizer/ "
        "of the model and put it beside text_encoder/."
    )


def _read_sentencepiece(path: Path) -> FileTokenizer:
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError as error:
        raise _missing("sentencepiece", path) from error
    try:
        # By content, because the library cannot open every path on Windows.
        processor = SentencePieceProcessor(model_proto=path.read_bytes())
    except (RuntimeError, OSError) as error:
        raise _damaged(path, error) from error
    return FileTokenizer(processor.encode, processor.get_piece_size())


def _read_json(path: Path) -> FileTokenizer:
    try:
        from tokenizers import Tokenizer as FastTokenizer
    except ImportError as error:
        raise _missing("tokenizers", path) from error
    try:
        content = path.read_text(encoding="utf-8")
        json.loads(content)
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from error
    tokenizer = FastTokenizer.from_str(content)
    # The file may ask for both; length is the encoder's business.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return FileTokenizer(lambda text: tokenizer.encode(text, add_special_tokens=False).ids, tokenizer.get_vocab_size())


def _missing(package: str, path: Path) -> MissingDependency:
    return MissingDependency(
        f"{path.name} needs the package {package}, which is not installed. "
        'Install it with: pip install "allegro-video[standalone]"'
    )


def _damaged(path: Path, error: Exception) -> UnsupportedCheckpoint:
    return UnsupportedCheckpoint(f"{path} is not a readable tokenizer ({error}). Download it again.")
