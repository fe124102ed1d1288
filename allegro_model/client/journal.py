"""What was done, in a file beside the results, so that nothing is done twice after a crash."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO

from ..atomic import writing
from ..errors import OutputError

JOURNAL = "allegro-jobs.jsonl"
# Of Windows' lock, which bars reading what it covers: far behind the end, and within what msvcrt can count to.
_LOCKED_BYTE = 2**30


@dataclass
class Known:
    """What the journal says about a job.

    Attributes:
        runs: {url of a server: prompt_id}, of runs that may still be there.
        files: names of results that were written, or were about to be.
        done: whether all of them were.
    """

    runs: dict[str, str] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)
    done: bool = False


class Journal:
    """The journal of a folder. Every line is on the disk before the work goes on.

    Args:
        folder: of the results.
    Raises:
        OutputError: it cannot be written, or another process is at work there.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / JOURNAL
        self.known: dict[str, Known] = {}
        self._lock = threading.Lock()
        with writing(self.path):
            self._file: BinaryIO = self.path.open("a+b")
            try:
                self._read()
            except BaseException:
                self._file.close()
                raise

    def close(self) -> None:
        """Lets others work in the folder."""
        self._file.close()

    def of(self, key: str) -> Known:
        """What is known about a job."""
        return self.known.get(key, Known())

    def submitting(self, key: str, url: str, prompt_id: str) -> None:
        """A job is about to be given to a server."""
        self._write(key, "submitting", server=url, prompt_id=prompt_id)

    def saving(self, key: str, files: Sequence[str]) -> None:
        """Results are about to be written under these names."""
        self._write(key, "saving", files=list(files))

    def done(self, key: str, url: str) -> None:
        """All results are written."""
        self._write(key, "done", server=url)

    def failed(self, key: str, url: str, error: str) -> None:
        """A run has failed, or was cancelled: it is not to be asked for any more."""
        self._write(key, "failed", server=url, error=error)

    def _read(self) -> None:
        if not _lock_file(self._file):
            raise OutputError(f"Another process is working in {self.path.parent}. Wait until it has ended, or choose another "
                              "folder.")
        self._file.seek(0)
        content = self._file.read()
        for line in content.splitlines():
            with suppress(ValueError, KeyError, TypeError):  # a line that was being written during a crash
                self._apply(json.loads(line))
        if content and not content.endswith(b"\n"):
            self._file.write(b"\n")

    def _apply(self, entry: dict[str, Any]) -> None:
        known = self.known.setdefault(entry["job"], Known())
        kind = entry["event"]
        if kind == "submitting":
            known.runs[entry["server"]] = entry["prompt_id"]
        elif kind == "saving":
            known.files = list(entry["files"])
        elif kind == "done":
            known.done = True
        elif kind == "failed":
            known.runs.pop(entry["server"], None)

    def _write(self, key: str, kind: str, **about: Any) -> None:
        entry = {"job": key, "event": kind, "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **about}
        with self._lock, writing(self.path):
            self._file.write(json.dumps(entry).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
            self._apply(entry)


def _lock_file(file: BinaryIO) -> bool:
    """Whether this process alone has the file; the lock ends when the file is closed."""
    try:
        try:
            import fcntl
        except ImportError:
            _lock_on_windows(file)
        else:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # the latter on Windows
        return False
    except OSError:  # some network file systems have no locks
        return True
    return True


def _lock_on_windows(file: BinaryIO) -> None:
    msvcrt: Any = import_module("msvcrt")  # of which type checkers know nothing elsewhere
    file.seek(_LOCKED_BYTE)
    msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
