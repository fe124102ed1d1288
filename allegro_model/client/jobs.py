"""What is to be done: one job for each prompt, row or line, known by its content."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import AllegroError
from .graphs import OPTIONS, apply_options, base_graph, copy_graph, override
from .server import Graph

NAME = "name"  # the one column that does not concern the graph: what the results are called
_SLUG_LENGTH = 40
_KEY_LENGTH = 8  # digits of the key in a file name
# What some system refuses or changes, the devices of Windows among it, and the ends that number further results.
_ILLEGAL = re.compile(r'[<>:"/\\|?*\x00-\x1f]|^[. ]|[. ]$|^(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9¹²³]) *(\.|$)|\+[0-9]+$',
                      re.IGNORECASE)


@dataclass
class Job:
    """One run of a graph, wherever and however often it takes place.

    Attributes:
        graph: in API form.
        key: a hash of the graph: equal jobs are done once.
        name: of the results, without extension.
        uploads: files that the graph needs: {name at the server: file here}.
        runs: the last run at each server: {url: prompt_id}.
        submissions: how often it was given to a server, or was about to be.
        breaks: how often a server did not answer while it had the job.
        files: the results, once it is done.
        error: why it failed, or last failed.
        seconds: that the last attempt took, with waiting in the queue.
        server: where it runs or was done.
    """

    graph: Graph
    key: str
    name: str
    uploads: dict[str, Path] = field(default_factory=dict)
    runs: dict[str, str] = field(default_factory=dict)
    submissions: int = 0
    breaks: int = 0
    files: list[Path] = field(default_factory=list)
    error: AllegroError | None = None
    seconds: float = 0.0
    server: str = ""


def make_job(graph: Graph, uploads: Mapping[str, Path] | None = None, *, name: str = "", title: str = "") -> Job:
    """A job.

    Args:
        graph: in API form.
        uploads: files that it needs: {name at the server: file here}.
        name: of the results, without extension; default the title and some digits of the key.
        title: e.g. the prompt.
    Raises:
        AllegroError: the name is no name of a file.
    """
    key = hashlib.sha256(json.dumps(graph, sort_keys=True).encode()).hexdigest()
    if not name:
        slug = re.sub(r"[^\w]+", "-", title.lower()).strip("-_")[:_SLUG_LENGTH].strip("-_")
        name = f"{slug or 'job'}-{key[:_KEY_LENGTH]}"
    elif _ILLEGAL.search(name) or len(name.encode()) > 200:
        raise AllegroError(f"{name!r} is no name for a result: expected a file name without folder and extension, that no system "
                           "reserves (as Windows does NUL), and that does not end in + and a number.")
    return Job(graph, key, name, dict(uploads or {}))


def build_job(base: Graph | str, options: Mapping[str, Any], overrides: Mapping[str, Any], *, title: str = "",
              folder: Path = Path()) -> Job:
    """A job from options.

    Args:
        base: a workflow, or the name of a model for `base_graph`.
        options: see `graphs.OPTIONS`, and "name".
        overrides: NODE.INPUT -> value.
        title: what the results are called if there is no prompt and no name.
        folder: that paths count from.
    Raises:
        AllegroError: something cannot be used.
    """
    given = {key: value for key, value in options.items() if key != NAME and value is not None}
    for frame in ("first_frame", "last_frame"):
        if frame in given:
            if not isinstance(given[frame], str | Path):
                raise AllegroError(f"{frame}: {given[frame]!r} is no path of a picture.")
            given[frame] = folder / given[frame]
    if isinstance(base, str):
        if not given.get("prompt"):
            raise AllegroError("There is no prompt. Give one, or a workflow that has one.")
        graph = base_graph(base, given_frames=bool(given.keys() & {"first_frame", "last_frame"}))
    else:
        graph = copy_graph(base)
    uploads = apply_options(graph, given)
    for target, value in overrides.items():
        uploads |= override(graph, target, value, folder)
    return make_job(graph, uploads, name=str(options.get(NAME) or ""), title=str(given.get("prompt") or title))


# Lists


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a list of jobs: (where it stands, {option or NODE.INPUT: value}).

    Args:
        path: .txt: a prompt on each line; .csv: a column for each option; .jsonl: an object on each line.
    Raises:
        AllegroError: it cannot be read, or a line makes no sense.
    """
    readers = {".txt": _text_rows, ".csv": _csv_rows, ".jsonl": _jsonl_rows}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise AllegroError(f"{path}: expected a list that ends in {', '.join(readers)}.")
    try:
        lines = list(io.StringIO(path.read_text(encoding="utf-8-sig")))
    except OSError as error:
        raise AllegroError(f"Cannot read {path}: {error.strerror or error}. Check the path.") from error
    except ValueError:
        raise AllegroError(f"{path} is not written in UTF-8. Save it so.") from None
    for number, row in reader(lines, path):
        where = f"{path.name}, line {number}"
        unknown = [key for key in row if key not in (*OPTIONS, NAME) and "." not in key]
        if unknown:
            raise AllegroError(f"{where}: {unknown[0]!r} is no option: expected {', '.join((*OPTIONS, NAME))}, or NODE.INPUT.")
        yield where, row


def _text_rows(lines: Sequence[str], path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if text and not text.startswith("#"):
            yield number, {"prompt": text}


def _csv_rows(lines: Sequence[str], path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(lines)
    try:
        for row in reader:
            if row.pop(None, None) is not None:  # where DictReader puts cells without a column
                raise AllegroError(f"{path.name}, line {reader.line_num}: more cells than columns. Put texts with a comma in quotes.")
            cells = {_option(key): value for key, value in row.items() if value}
            if cells:
                yield reader.line_num, cells
    except csv.Error as error:
        raise AllegroError(f"{path.name}, line {reader.line_num}: {error}. Is a quote open?") from error


def _jsonl_rows(lines: Sequence[str], path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise AllegroError(f"{path.name}, line {number} is no JSON: {error}.") from error
        if not isinstance(row, dict):
            raise AllegroError(f"{path.name}, line {number}: expected an object, such as {{\"prompt\": \"...\"}}.")
        yield number, {_option(key): value for key, value in row.items()}


def _option(name: str) -> str:
    return name.strip() if "." in name else name.strip().replace("-", "_")
