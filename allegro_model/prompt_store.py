"""Encoded prompts on disk, so that the same prompt never needs the text encoder again.

A folder of safetensors files named by a hash of everything that determines their content. The one that has not been
used for longest goes first when they take more than their limit. Nothing here is precious: whatever cannot be read is
encoded again, and whatever cannot be written is left out with a warning.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from .atomic import atomic_file, writing
from .errors import OutputError

logger = logging.getLogger(__name__)

MAX_BYTES = 2**30
"""What the files of a folder may take together: about 130 prompts of the released models in float32."""

_SUFFIX = ".safetensors"
_SAMPLES, _SAMPLE_BYTES = 64, 65536


def files_identity(files: Iterable[Path]) -> str:
    """A hash that tells the content of weight files apart without reading gigabytes: their sizes and, evenly spread
    over each, 64 samples of 64 KiB, the header among them. Names and dates do not count.

    Args:
        files: in an order that is always the same.
    Raises:
        OSError: one cannot be read.
    """
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(size.to_bytes(8, "little"))
        with path.open("rb") as file:
            for i in range(_SAMPLES):
                file.seek(i * max(0, size - _SAMPLE_BYTES) // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def prompt_key(*parts: Any) -> str | None:
    """The name of an entry: a hash of JSON values; None if a part is none, so that nothing can be kept under it."""
    try:
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    except (TypeError, ValueError):
        return None


class PromptStore:
    """A folder of encoded prompts. Several processes may share it.

    Args:
        folder: need not exist.
        max_bytes: what all entries may take together.
    """

    def __init__(self, folder: str | os.PathLike[str], max_bytes: int = MAX_BYTES) -> None:
        self.folder = Path(folder)
        self.max_bytes = max_bytes

    def get(self, key: str, **axes: int) -> dict[str, Tensor] | None:
        """The tensors of an entry, or None.

        Args:
            key: of the entry.
            **axes: the tensors that it must have, and how many axes each.
        """
        path = self._path(key)
        try:
            tensors = load(path.read_bytes())
            found = {name: tensors[name].ndim for name in axes if name in tensors}
            if found != axes:
                raise ValueError(f"it holds {sorted(tensors)}, expected tensors and axes {axes}")
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError, ValueError) as error:
            logger.warning("The stored prompt %s cannot be read (%s); the prompt is encoded again.", path.name, error)
            with suppress(OSError):
                path.unlink()
            return None
        with suppress(OSError):  # a folder that may only be read
            os.utime(path)  # the entries used last stay
        return tensors

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Keeps tensors, in place of what was there."""
        path = self._path(key)
        content = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
        if len(content) > self.max_bytes:
            return
        try:
            with writing(path):
                self.folder.mkdir(parents=True, exist_ok=True)
            with atomic_file(path, force=True) as temporary, writing(path):
                temporary.write_bytes(content)
        except OutputError as error:
            logger.warning("The encoded prompt is not kept: %s", error)
            return
        self._shrink()

    def clear(self) -> int:
        """Removes every entry; how many there were."""
        return sum(_remove(path) for _, _, path in self._entries())

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}{_SUFFIX}"

    def _entries(self) -> list[tuple[float, int, Path]]:
        """(time of last use, bytes, file) of every entry, the one unused for longest first."""
        found = []
        with suppress(OSError):
            for entry in os.scandir(self.folder):
                with suppress(OSError):  # another process may have removed it
                    if entry.name.endswith(_SUFFIX) and entry.is_file(follow_symlinks=False):
                        state = entry.stat()
                        found.append((state.st_mtime, state.st_size, Path(entry.path)))
        return sorted(found)

    def _shrink(self) -> None:
        entries = self._entries()
        total = sum(size for _, size, _ in entries)
        for _, size, path in entries:
            if total <= self.max_bytes:
                return
            if _remove(path):
                total -= size


def _remove(path: Path) -> bool:
    with suppress(OSError):
        path.unlink()
        return True
    return False
