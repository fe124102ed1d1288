"""What there is to do, known before the first byte is fetched."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import DownloadError, MissingDependency, OutputError
from ..loading.released import ReleasedFile, about
from .hub import RemoteFile, ask, link
from .targets import Target, find_present

_SPARE_BYTES = 64 * 2**20  # a disk should not be filled to the last byte


@dataclass(frozen=True)
class Item:
    """One file.

    Attributes:
        target: its place.
        present: the file that is there already, or None.
        remote: what the hub offers; None if nothing is to be fetched, or nobody asked.
    """

    target: Target
    present: Path | None = None
    remote: RemoteFile | None = None

    @property
    def num_bytes(self) -> int:
        """Of the whole file."""
        return self.remote.size if self.remote else self.target.file.num_bytes

    @property
    def part_path(self) -> Path:
        """Where it grows. The checksum in the name keeps what belongs to another version apart."""
        assert self.remote is not None
        return self.target.path.with_name(f"{part_prefix(self.target.path)}{self.remote.etag[:16]}.part")

    @property
    def done_bytes(self) -> int:
        """Already there from an earlier attempt."""
        return min(self.part_path.stat().st_size, self.num_bytes) if self.part_path.is_file() else 0

    def describe(self) -> str:
        """A line for people."""
        file, path = self.target.file, self.target.path
        if self.present is not None:
            kept = "" if self.present == path else f" (in place of {path.name})"
            return f"have   {self.present}{kept}"
        size = about(self.num_bytes) if self.remote else f"about {about(self.num_bytes)}"
        begun = f", {about(self.done_bytes)} of it are there" if self.remote and self.done_bytes else ""
        return f"fetch  {path}\n       {size}{begun}, from {self.remote.url if self.remote else _source(file)}"


@dataclass(frozen=True)
class Plan:
    """All files of a download."""

    items: tuple[Item, ...]

    @property
    def missing(self) -> list[Item]:
        return [item for item in self.items if item.present is None]

    @property
    def bytes_to_fetch(self) -> int:
        return sum(item.num_bytes - (item.done_bytes if item.remote else 0) for item in self.missing)

    def describe(self) -> str:
        """Lines for people."""
        lines = [item.describe() for item in self.items]
        end = (f"{about(self.bytes_to_fetch)} to fetch, {len(self.missing)} of {len(self.items)} files"
               if self.missing else "nothing to fetch")
        return "\n".join([*lines, end])

    def check_space(self) -> None:
        """Raises when a disk has no room for what is missing.

        Raises:
            OutputError: names both numbers.
        """
        needed: dict[int, int] = {}
        folders: dict[int, Path] = {}
        for item in self.missing:
            folder = next(parent for parent in item.target.path.absolute().parents if parent.is_dir())
            disk = folder.stat().st_dev
            needed[disk] = needed.get(disk, 0) + item.num_bytes - (item.done_bytes if item.remote else 0)
            folders[disk] = folder
        for disk, num_bytes in needed.items():
            free = shutil.disk_usage(folders[disk]).free
            if free < num_bytes + _SPARE_BYTES:
                raise OutputError(f"The disk of {folders[disk]} has {about(free)} left, and {about(num_bytes)} are to be "
                                  "fetched. Free some space or choose another folder; nothing was fetched.")


def make_plan(targets: Iterable[Target], *, force: bool = False, tick: Callable[[], None] = lambda: None) -> Plan:
    """Looks what is there, and asks the hub about what is not.

    Args:
        targets: files and places.
        force: what is there and cannot be used may be replaced.
        tick: called while waiting for the hub; it may raise to cancel.

    Raises:
        DownloadError: see `find_present` and `ask`; or the hub offers another file than the known one.
        MissingDependency: something is missing, and huggingface_hub is not installed.
    """
    items = []
    commits: dict[tuple[str, str], str] = {}  # all files of a repository come from one commit
    for target in targets:
        file = target.file
        present = find_present(target, force=force)
        if present is not None:
            items.append(Item(target, present))
            continue
        remote = ask(file, commits.get((file.repository, file.revision)), tick=tick)
        if remote is None:
            continue
        commits[file.repository, file.revision] = remote.commit
        if file.sha256 is not None and (remote.size != file.num_bytes or remote.sha256 not in (None, file.sha256)):
            raise DownloadError(f"{remote.url} is not the file this program knows: it has {remote.size:,} bytes and the "
                                f"checksum {remote.etag}, expected {file.num_bytes:,} and {file.sha256}. Use another mirror "
                                "(HF_ENDPOINT), or fetch the file by hand.")
        items.append(Item(target, remote=remote))
    return Plan(tuple(items))


def unasked(targets: Sequence[Target], *, force: bool = False) -> Plan:
    """The plan as far as it is known without a hub: sizes are those of the table."""
    return Plan(tuple(Item(target, find_present(target, force=force)) for target in targets))


def by_hand(plan: Plan) -> str:
    """How to get what is missing without this program."""
    lines = [f"  {_source(item.target.file)} (about {about(item.num_bytes)}) -> {item.target.path}"
             for item in plan.missing if not item.target.file.optional]
    return "\n".join(["To fetch by hand:", *lines]) if lines else ""


def _source(file: ReleasedFile) -> str:
    """The address of a file; its name where huggingface_hub, which knows the addresses, is not installed."""
    try:
        return link(file)
    except MissingDependency:
        return f"{file.path} of {file.repository}"


def part_prefix(path: Path) -> str:
    """How the names of unfinished files of `path` begin; hidden, and with an ending that no model list shows."""
    return f".{path.name}."
