"""`allegro submit`: videos from ComfyUI servers."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

from ..atomic import atomic_file, check_output, writing
from ..client import (
    OPTIONS,
    Batch,
    ComfyServer,
    Event,
    Graph,
    Limits,
    Watcher,
    build_job,
    read_graph,
    read_rows,
    title_of,
)
from ..client.graphs import BUNDLED
from ..client.jobs import Job as Run
from ..errors import AllegroError, ServerError
from .base import Job, check_report_output
from .console import StatusLine, duration
from .report import UsageError
from .submit_options import SERVER


def submit(job: Job) -> None:
    """Runs the command.

    Raises:
        AllegroError: see the exit codes.
    """
    args = job.args
    job.report.stage = "checking"
    check_report_output(job)
    if args.preview is not None:
        check_output(args.preview, force=job.force)
    runs = _runs(job)
    servers = [ComfyServer(url) for url in args.server or [SERVER]]
    with StatusLine(job.console) as line:
        watcher = _Console(job, line, len(runs))
        batch = Batch(runs, servers, Path(args.output), force=job.force, again=args.again, watcher=watcher,
                      limits=Limits(args.retries, args.timeout, args.patience))
        if len(batch.jobs) < len(runs):
            job.console.say(f"{len(runs) - len(batch.jobs)} jobs are equal to others and are not done again.")
            watcher.total = len(batch.jobs)
        job.report.stage = "waiting for the results" if args.wait else "submitting"
        try:
            batch.run() if args.wait else batch.submit()
        except KeyboardInterrupt:
            job.remarks.append("What is done is kept: the same command does the rest.")
            raise
        finally:
            job.report.facts["jobs"] = [_facts(run) for run in batch.jobs]
    _raise_failures([run for run in batch.jobs if run.error is not None], len(batch.jobs))


def _runs(job: Job) -> list[Run]:
    """What is to be done, from the options and the list."""
    args = job.args
    if args.workflow is not None and args.model is not None:
        raise UsageError("--model builds a workflow, and --workflow brings one: give one of them. --transformer, --text-encoder "
                         "and --vae name other files in a workflow.")
    base: Graph | str = read_graph(args.workflow) if args.workflow is not None else args.model or BUNDLED
    options = {name: getattr(args, name) for name in (*OPTIONS, "name")}
    title = Path(args.workflow).stem if args.workflow is not None else ""
    if args.list is None:
        if args.prompt is None and args.workflow is None:
            raise UsageError("Say what to make: a PROMPT, --workflow FILE or --list FILE.")
        return [build_job(base, options, dict(args.set), title=title)]
    if args.prompt is not None or args.name is not None:
        raise UsageError("PROMPT and --name are for one video: with --list, put them into the list.")
    rows = list(read_rows(Path(args.list)))
    if not rows:
        raise AllegroError(f"{args.list} lists nothing. Put a prompt on each line.")
    return [_row(base, options, row, where, job) for where, row in rows]


def _row(base: Graph | str, options: dict[str, Any], row: dict[str, Any], where: str, job: Job) -> Run:
    given = {name: str(Path(value).absolute()) if name.endswith("_frame") and value else value
             for name, value in options.items()}
    overrides = {target: value for target, value in row.items() if "." in target}
    chosen = {**given, **{name: value for name, value in row.items() if "." not in name}}
    try:
        # Paths in a list count from its folder, those of options from the current one.
        return build_job(base, chosen, {**_absolute(dict(job.args.set)), **overrides}, folder=Path(job.args.list).parent)
    except AllegroError as error:
        raise type(error)(f"{where}: {error}") from error


def _absolute(overrides: dict[str, str]) -> dict[str, str]:
    return {target: str(Path(value).absolute()) if Path(value).is_file() else value for target, value in overrides.items()}


def _raise_failures(failed: list[Run], total: int) -> None:
    if failed and total == 1:
        assert failed[0].error is not None
        raise failed[0].error
    if failed:
        raise ServerError(f"{len(failed)} of {total} jobs failed: {', '.join(run.name for run in failed[:10])}"
                          f"{', ...' if len(failed) > 10 else ''}. The others are done; the same command tries these again.")


def _facts(run: Run) -> dict[str, Any]:
    return {"name": run.name, "key": run.key, "server": run.server or None, "prompt_ids": run.runs,
            "submissions": run.submissions, "seconds": round(run.seconds, 3), "files": [str(path) for path in run.files],
            "error": run.error and {"type": type(run.error).__name__, "message": str(run.error)}}


class _Console(Watcher):
    """Tells the user what the servers do: one line that changes, results one by one."""

    def __init__(self, job: Job, line: StatusLine, total: int) -> None:
        self.total = total
        self._job = job
        self._line = line
        self._ended = 0
        self._lock = threading.Lock()
        self._now: dict[str, str] = {}  # {url: what it does}
        self._counted: dict[str, tuple[str, float, int]] = {}  # {url: node that counts, since when, from which step}

    def begun(self, job: Run) -> None:
        with self._lock:
            if not self._job.args.wait:
                self._line.say(f"{job.name}: submitted to {', '.join(job.runs)}")
                return
            self._counted.pop(job.server, None)
            self._now[job.server] = f"{job.name} at {job.server}"
            self._show()

    def event(self, job: Run, event: Event) -> None:
        with self._lock:
            if event.preview is not None:
                self._preview(event.preview)
                return
            if event.ahead is not None:
                text = "waiting" + (f" for {event.ahead} other run{'s' * (event.ahead != 1)}" if event.ahead else "")
            else:
                text = title_of(job.graph, event.node) + self._count(job.server, event)
            self._now[job.server] = f"{job.name}: {text}"
            self._show()

    def given_back(self, job: Run) -> None:
        with self._lock:
            self._now.pop(job.server, None)
            self._show()

    def ended(self, job: Run) -> None:
        with self._lock:
            self._ended += 1
            self._now.pop(job.server, None)
            self._show()
            count = f" ({self._ended} of {self.total})" if self.total > 1 else ""
            if job.error is not None:
                if self.total > 1:  # a single one is explained at the end
                    self._line.error(f"{job.name}: failed{count}: {job.error}")
            elif not job.server:
                self._line.say(f"{job.name}: was done before{count}; --again does it again")
            else:
                self._line.say(f"{job.name}: done in {duration(job.seconds)} at {job.server}{count}")
            if job.error is None and not job.files:
                self._line.error(f"{job.name}: the workflow saved no file. Add a node such as SaveVideo.")
            with self._line.hidden():
                for path in job.files:
                    self._job.say_result(str(path))

    def remark(self, text: str) -> None:
        with self._lock:
            self._line.say(text)

    def _count(self, url: str, event: Event) -> str:
        """How far a node is, and how long it will take from here; the first step is not timed: it pays for warming up."""
        now = time.monotonic()
        node, since, first = self._counted.get(url, ("", now, 0))
        if node != event.node or event.done < first or not event.total:
            self._counted[url] = (event.node, now, event.done)
            since, first = now, event.done
        if not event.total:
            return ""
        steps = event.done - first
        left = f", {duration((now - since) / steps * (event.total - event.done))} left" if steps > 0 and since < now else ""
        return f" {event.done} of {event.total}{left}"

    def _show(self) -> None:
        done = f"{self._ended} of {self.total} done | " if self.total > 1 else ""
        self._line.show(done + " | ".join(self._now.values()) if self._now else "")

    def _preview(self, picture: bytes) -> None:
        if self._job.args.preview is not None:
            path = Path(self._job.args.preview)
            with atomic_file(path, force=True) as temporary, writing(path):
                temporary.write_bytes(picture)
