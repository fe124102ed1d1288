"""Files that appear complete or not at all.

A result is written under a hidden temporary name in its own folder, flushed to the disk and renamed. Whatever
goes wrong before that, the temporary is removed and a file that was there before stays as it was.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import OutputError

# What an operating system says, and what the user should hear. Lower case: it follows "Cannot write X: ".
_CAUSES = {
    errno.ENOSPC: "the disk is full. Free some space or choose another folder.",
    errno.EDQUOT: "your disk quota is used up. Free some space or choose another folder.",
    errno.EFBIG: "the file grew larger than this disk or account allows. Choose another folder.",
    errno.EROFS: "the disk is read-only. Choose another folder.",
    errno.EACCES: "you have no permission to write there. Choose another folder.",
    errno.EPERM: "you have no permission to write there. Choose another folder.",
    errno.ENAMETOOLONG: "the file name is too long. Choose a shorter one.",
}


def write_error(path: Path, error: OSError) -> OutputError:
    """The error to raise when the operating system refused to write `path`."""
    cause = _CAUSES.get(error.errno or 0, f"{error.strerror or error}. Choose another folder.")
    return OutputError(f"Cannot write {path}: {cause}")


def exists_error(path: Path) -> OutputError:
    """The error to raise when `path` is there and may not be replaced."""
    return OutputError(f"{path} already exists and was left as it is. Add --force to replace it, "
                       "or choose another name.")


def temporary_name(path: Path) -> Path:
    """A hidden name in the folder of `path` that no other process uses."""
    return path.with_name(f".allegro-{os.getpid()}-{secrets.token_hex(4)}.part")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns what the operating system refuses inside the block into an error about `path`.

    Raises:
        OutputError: in place of an OSError.
    """
    try:
        yield
    except FileExistsError as error:
        raise exists_error(path) from error
    except OSError as error:
        raise write_error(path, error) from error


def check_output(path: str | os.PathLike[str], *, force: bool) -> Path:
    """Raises unless a file could be created at `path` now, so that a long job need not end in a refusal.

    Args:
        path: the file to be written.
        force: an existing file may be replaced.
    Returns:
        `path` as a Path.
    Raises:
        OutputError: the folder is missing or read-only, or the file exists and `force` is off.
    """
    path = Path(path)
    folder = path.parent
    with writing(path):
        if not folder.exists():
            raise OutputError(f"Cannot write {path}: the folder {folder} does not exist. Create it first.")
        if not folder.is_dir():
            raise OutputError(f"Cannot write {path}: {folder} is a file, not a folder. Choose another "
                              "folder.")
        with suppress(FileNotFoundError):
            _check_existing(path, path.lstat().st_mode, force=force)
        probe = temporary_name(path)  # permission bits alone do not tell the truth
        try:
            probe.touch(exist_ok=False)
        finally:
            probe.unlink(missing_ok=True)
    return path


def _check_existing(path: Path, mode: int, *, force: bool) -> None:
    if stat.S_ISDIR(mode):
        raise OutputError(f"Cannot write {path}: a folder has that name. Choose another name.")
    if not stat.S_ISREG(mode) and not stat.S_ISLNK(mode):
        raise OutputError(f"Cannot write {path}: it is a device, not a file. Choose another name.")
    if not force:
        raise exists_error(path)


def check_free_space(path: Path, needed: int) -> None:
    """Raises when the disk that would hold `path` has less than `needed` bytes left.

    Raises:
        OutputError: names both numbers.
    """
    free = shutil.disk_usage(path.parent).free
    if free < needed:
        raise OutputError(f"Cannot write {path}: about {needed / 2**20:.1f} MiB are needed and the disk has "
                          f"{free / 2**20:.1f} MiB left. Free some space or choose another folder.")


def publish(temporary: Path, path: Path, *, force: bool) -> None:
    """Flushes a finished temporary to the disk and gives it its name.

    Raises:
        OutputError: the disk refused, or somebody else created `path` meanwhile and `force` is off.
    """
    with writing(path):
        _sync(temporary)
        if force:
            os.replace(temporary, path)
        else:
            rename_exclusive(temporary, path)
        _sync_folder(path.parent)


def rename_exclusive(temporary: Path, path: Path) -> None:
    """Renames without ever replacing a file that is there."""
    try:
        os.link(temporary, path)  # the one rename that fails when the name is taken, on every POSIX system
    except FileExistsError:
        raise
    except OSError:  # this file system has no hard links: FAT, some network mounts
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None
        os.replace(temporary, path)
    else:
        temporary.unlink()


def _sync(path: Path) -> None:
    with open(path, "r+b") as file:
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Makes the rename itself durable, where folders can be opened (not on Windows)."""
    if os.name == "nt":
        return
    # Some network file systems refuse this; the file itself is already on the disk.
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextmanager
def atomic_file(path: str | os.PathLike[str], *, force: bool) -> Iterator[Path]:
    """Gives a temporary path to write to; it becomes `path` when the block ends well, and vanishes otherwise.

    Args:
        path: the final name.
        force: an existing file may be replaced.
    Raises:
        OutputError: see `check_output` and `publish`.
    """
    path = check_output(path, force=force)
    temporary = temporary_name(path)
    try:
        yield temporary
        publish(temporary, path, force=force)
    finally:
        temporary.unlink(missing_ok=True)
