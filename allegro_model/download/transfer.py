"""One file from the hub to its place: resumed, checked, and renamed at the end."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from io import FileIO
from pathlib import Path
from typing import Any

from ..atomic import atomic_file, publish, write_error, writing
from ..errors import DownloadError, OutputError
from .hub import RemoteFile, import_hub, patiently, read_on
from .plan import Item, part_prefix
from .targets import problem_of

RECORD = "allegro-download.json"
_HASH_BLOCK = 2**23

Progress = Callable[[int, int], None]  # (bytes done, bytes in all); it may raise to cancel
# What is being done -> a context that gives the callback for it.
Watch = Callable[[str], AbstractContextManager[Progress]]


def fetch(item: Item, watch: Watch, *, force: bool = False) -> str:
    """Fetches a file. What was fetched before an error or a cancel is kept, and gone on with the next time.

    Args:
        item: with `remote`.
        watch: makes a progress display for each stage.
        force: an existing file may be replaced.
    Returns:
        how the content was checked, for people.
    Raises:
        DownloadError: the network, or content that is not what was announced.
        OutputError: the disk is full or does not let us write.
    """
    import_hub()
    from filelock import FileLock, Timeout  # huggingface_hub requires it

    path, part = item.target.path, item.part_path
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(part.with_suffix(".lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise DownloadError(f"{path} is being fetched by another program already. Wait for it, or end it.") from error
    except OSError as error:
        raise write_error(path, error) from error
    try:
        _remove_other_parts(path, keep=part)
        checked = _fetch_checked(item, part, watch)
        publish(part, path, force=force)
    finally:
        lock.release()
        with suppress(OSError):
            part.with_suffix(".lock").unlink()
    _record(item, checked)
    return checked


def _fetch_checked(item: Item, part: Path, watch: Watch) -> str:
    """Fetches until the content is right; what was resumed and turns out wrong is fetched once more from the start."""
    remote = item.remote
    assert remote is not None
    resumed = item.done_bytes > 0
    with watch(f"Fetching {item.target.path.name}") as progress:
        _fill(item, part, remote, progress)
    with watch(f"Checking {item.target.path.name}") as progress:
        problem, checked = _check(item, part, remote, progress)
    if problem is None:
        return checked
    part.unlink()
    if resumed:
        return _fetch_checked(item, part, watch)
    raise DownloadError(f"{remote.url} did not give what it announced: {problem} What was fetched is deleted. Try again, "
                        "or use another mirror (HF_ENDPOINT).")


def _fill(item: Item, part: Path, remote: RemoteFile, progress: Progress) -> None:
    def done() -> int:
        return file.tell()

    try:
        file = part.open("ab", buffering=0)
    except OSError as error:
        raise write_error(item.target.path, error) from error
    with file:
        if done() > remote.size:
            file.truncate(0)
            file.seek(0)
        progress(done(), remote.size)
        while done() < remote.size:
            patiently(item.target.file, lambda: _read_on(item, file, remote, progress),
                      tick=lambda: progress(done(), remote.size), progress=done)


def _read_on(item: Item, file: FileIO, remote: RemoteFile, progress: Progress) -> None:
    """Appends what the server still has to send.

    Raises:
        OSError: the connection ended early.
    """
    for position, block in read_on(remote.url, file.tell(), lambda: progress(file.tell(), remote.size)):
        if position != file.tell():  # the server does not resume, or not where it was asked to
            file.truncate(0)
            file.seek(0)
        if position != file.tell():
            raise OSError("the server answered with another part of the file")
        _write(item, file, block)
        if file.tell() > remote.size:
            file.truncate(0)
            raise DownloadError(f"{remote.url} sent more than the {remote.size:,} bytes it announced. Try again, or "
                                "use another mirror (HF_ENDPOINT).")
        progress(file.tell(), remote.size)
    if file.tell() < remote.size:
        raise OSError(f"the connection ended after {file.tell():,} of {remote.size:,} bytes")


def _write(item: Item, file: FileIO, block: bytes) -> None:
    try:
        while block:
            block = block[file.write(block):]
    except OSError as error:
        refused = write_error(item.target.path, error)
        raise OutputError(f"{refused} What was fetched so far is kept: run the same again to go on.") from error


def _check(item: Item, part: Path, remote: RemoteFile, progress: Progress) -> tuple[str | None, str]:
    """(what is wrong or None, how it was checked)."""
    file = item.target.file
    expected, kind = file.sha256 or remote.sha256, "SHA-256"
    digest = hashlib.sha256()
    if expected is None and remote.git_hash is not None:
        expected, kind = remote.git_hash, "git hash"
        # Git hashes a file with its length in front; a checksum against accidents, nothing is signed with it.
        digest = hashlib.sha1(f"blob {remote.size}\0".encode(), usedforsecurity=False)
    found = _digest(part, digest, remote.size, progress) if expected else None
    if found != expected:
        return f"its {kind} is {found}, expected {expected}.", kind
    problem = problem_of(file, part)
    source = "known to this program" if file.sha256 else "stated by the hub"
    return problem, f"{kind} {source}" if expected else "size and header; the server states no checksum"


def _digest(part: Path, digest: Any, size: int, progress: Progress) -> str:
    done = 0
    with part.open("rb") as file:
        while block := file.read(_HASH_BLOCK):
            digest.update(block)
            done += len(block)
            progress(done, size)
    return str(digest.hexdigest())


def _remove_other_parts(path: Path, keep: Path) -> None:
    """Unfinished files of other versions: nobody will go on with them."""
    for other in path.parent.iterdir():
        if other.name.startswith(part_prefix(path)) and other.suffix == ".part" and other != keep:
            with suppress(OSError):
                other.unlink()


def _record(item: Item, checked: str) -> None:
    """Notes beside the files where they came from, since the branch of a repository moves."""
    remote, file = item.remote, item.target.file
    assert remote is not None
    path = item.target.path.with_name(RECORD)
    entries: dict[str, Any] = {}
    with suppress(OSError, ValueError):
        read = json.loads(path.read_text(encoding="utf-8"))
        entries = read if isinstance(read, dict) else {}
    entries[item.target.path.name] = {
        "repository": file.repository, "path": file.path, "revision": file.revision, "commit": remote.commit,
        "bytes": remote.size, "checksum": file.sha256 or remote.etag, "checked": checked,
    }
    with atomic_file(path, force=True) as temporary:
        temporary.write_text(json.dumps(entries, indent=2) + os.linesep, encoding="utf-8")
