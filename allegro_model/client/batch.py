"""Many jobs, one or several servers: nothing is lost when a server dies, and nothing is done twice.

Each server has a thread that takes one job after the other. A job that was given to a server belongs to it: when the
connection breaks, the thread asks again and again, and goes on with the same run once the server answers. After a while
the job is anybody's; if the server comes back later, its copy of the run is cancelled.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ..atomic import exists_error, writing
from ..errors import (
    AllegroError,
    Cancelled,
    OutputError,
    RunFailed,
    RunInterrupted,
    ServerError,
    ServerUnreachable,
)
from .events import Event
from .jobs import Job
from .journal import Journal
from .server import ComfyServer, RemoteFile

GRACE_SECONDS = 20.0  # how long the jobs of a server that is gone are kept for it
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 10.0  # seconds between attempts to reach a server
_TICK_SECONDS = 0.2
_MOST_BREAKS = 20  # of one job: its server is there, but not for what the job needs


@dataclass(frozen=True)
class Limits:
    """When to give up.

    Attributes:
        retries: how often a job is submitted again after it failed or its server died.
        timeout: seconds a run may take, or None.
        patience: seconds during which no server answers.
    """

    retries: int = 2
    timeout: float | None = None
    patience: float = 300.0


class Watcher:
    """Is told what happens, from the threads of the servers. Does nothing by itself."""

    def begun(self, job: Job) -> None:
        """A job was given to `job.server`, or found there."""

    def event(self, job: Job, event: Event) -> None:
        """It makes progress."""

    def given_back(self, job: Job) -> None:
        """It waits for a server again: its own is gone, or it failed and is tried once more."""

    def ended(self, job: Job) -> None:
        """It is done, with `job.files`, or has failed for good, with `job.error`."""

    def remark(self, text: str) -> None:
        """Something that a person may want to know."""


class _Lane:
    """A server, and whether it can be reached."""

    def __init__(self, server: ComfyServer) -> None:
        self.server = server
        self.down_since: float | None = None

    @property
    def url(self) -> str:
        return self.server.url


class Batch:
    """Jobs that are to be done.

    Args:
        jobs: equal ones are done once.
        servers: at least one.
        folder: for the results and the journal; it is made if need be.
        limits: when to give up.
        force: existing files may be replaced.
        again: do finished jobs again.
        watcher: is told what happens.
    """

    def __init__(self, jobs: Sequence[Job], servers: Sequence[ComfyServer], folder: Path, *, limits: Limits | None = None,
                 force: bool = False, again: bool = False, watcher: Watcher | None = None) -> None:
        self.jobs = list({job.key: job for job in jobs}.values())
        self.folder = Path(folder)
        self._limits = limits or Limits()
        self._force = force
        self._again = again
        self._watcher = watcher or Watcher()
        self._lanes = list({server.url: _Lane(server) for server in servers}.values())
        self._changed = threading.Condition()
        self._open: list[Job] = []  # waiting for a server
        self._running: dict[str, Job] = {}  # {url: job}
        self._stop = threading.Event()
        self._all_ended = threading.Event()
        self._threads = len(self._lanes)  # that have not ended
        self._cancel = False
        self._fatal: BaseException | None = None
        names: dict[str, str] = {}
        for job in self.jobs:
            if names.setdefault(job.name.lower(), job.key) != job.key:
                raise AllegroError(f"Two different jobs would both be called {job.name!r}. Give them other names.")

    def run(self) -> list[Job]:
        """Does the jobs; each result is written as soon as it is there.

        Returns:
            all jobs, those that failed with `error`.
        Raises:
            ServerError: no server could be reached at the start, or for too long.
            OutputError: a result cannot be written. What the servers have done is not lost: run the same again.
            KeyboardInterrupt: after the runs at the servers were cancelled.
        """
        with self._journal() as journal:
            self._reach()
            threads = [threading.Thread(target=self._serve, args=(lane, journal), daemon=True) for lane in self._lanes]
            for thread in threads:
                thread.start()
            try:
                # Not Thread.join: interrupted by Ctrl-C, it takes a thread for ended that is not.
                while not self._all_ended.wait(_TICK_SECONDS) and not self._stop.is_set():
                    self._check_patience()
            except BaseException:
                self._cancel = True
                raise
            finally:
                self._end(threads)
            if self._fatal is not None:
                raise self._fatal
        return self.jobs

    def submit(self) -> list[Job]:
        """Only gives the jobs to the servers, in turn; `run` with the same jobs fetches the results, today or later.

        Raises:
            PromptRefused, ServerError: the rest was not submitted.
        """
        with self._journal() as journal:
            self._reach()
            lanes = [lane for lane in self._lanes if lane.down_since is None]
            for index, job in enumerate(list(self._open)):
                if not any(self._at(lane.server, job) for lane in lanes):
                    self._submit(lanes[index % len(lanes)].server, job, journal)
                self._watcher.begun(job)
        return self.jobs

    # The queue

    @contextmanager
    def _journal(self) -> Iterator[Journal]:
        """Opens the journal, and sorts out what is done already."""
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        journal = Journal(self.folder)
        try:
            for job in self.jobs:
                known = journal.of(job.key)
                paths = [self.folder / name for name in known.files]
                if known.done and not self._again and all(path.is_file() for path in paths):
                    job.files = paths
                    self._watcher.ended(job)
                    continue
                self._check_free(job, known.files)
                job.runs = {} if self._again else dict(known.runs)
                self._open.append(job)
            yield journal
        finally:
            journal.close()

    def _check_free(self, job: Job, own: Sequence[str]) -> None:
        """Raises when a file that is not this job's has the name of its results."""
        if self._force:
            return
        for path in self.folder.iterdir():
            if path.suffix and path.stem == job.name and path.name not in own:
                raise exists_error(path)

    def _reach(self) -> None:
        """Looks which servers are there; one is enough."""
        errors: list[ServerUnreachable] = []
        for lane in self._lanes if self._open else ():
            try:
                lane.server.check()
            except ServerUnreachable as error:
                errors.append(error)
                lane.down_since = time.monotonic() - GRACE_SECONDS  # nothing is kept for it
        if errors and len(errors) == len(self._lanes):
            raise errors[0]
        for unreachable in errors:
            self._watcher.remark(str(unreachable))

    def _check_patience(self) -> None:
        downs = [lane.down_since for lane in self._lanes]
        since = [down for down in downs if down is not None]
        if len(since) == len(downs) and time.monotonic() - max(since) > self._limits.patience:
            self._stop.set()
            self._fatal = ServerUnreachable(f"No server has answered for {self._limits.patience:g} s. What is done is kept: "
                                            "run the same again when one is there.")

    def _end(self, threads: Sequence[threading.Thread]) -> None:
        self._stop.set()
        with self._changed:
            self._changed.notify_all()
        for thread in threads:
            thread.join()

    def _take(self, lane: _Lane) -> Job | None:
        """The next job for a server; waits while others might still give one back. None when all is done."""
        with self._changed:
            while not self._stop.is_set():
                if not self._open and not self._running:
                    self._changed.notify_all()
                    return None
                for job in sorted(self._open, key=lambda job: lane.url not in job.runs):
                    if lane.url in job.runs or not self._is_kept(job):
                        self._open.remove(job)
                        self._running[lane.url] = job
                        job.server = lane.url
                        return job
                self._changed.wait(_TICK_SECONDS)
        return None

    def _is_kept(self, job: Job) -> bool:
        """Whether a job has a run at a server that is there, or has not been gone for long."""
        now = time.monotonic()
        return any(lane.url in job.runs and (lane.down_since is None or now - lane.down_since < GRACE_SECONDS)
                   for lane in self._lanes)

    def _give_back(self, lane: _Lane, job: Job, *, first: bool) -> None:
        self._watcher.given_back(job)
        with self._changed:
            del self._running[lane.url]
            self._open.insert(0 if first else len(self._open), job)
            self._changed.notify_all()

    def _close(self, lane: _Lane, job: Job) -> None:
        with self._changed:
            del self._running[lane.url]
            self._changed.notify_all()
        self._watcher.ended(job)

    # One server

    def _serve(self, lane: _Lane, journal: Journal) -> None:
        """What the thread of a server does."""
        try:
            while not self._stop.is_set():
                if lane.down_since is not None and not self._revive(lane, journal):
                    return
                job = self._take(lane)
                if job is None:
                    return
                self._do(lane, job, journal)
        except BaseException as error:  # noqa: BLE001 - raised again by `run`, in the caller's thread
            self._fatal = self._fatal or error
            self._stop.set()
        finally:
            with self._changed:
                self._threads -= 1
                if not self._threads:
                    self._all_ended.set()

    def _revive(self, lane: _Lane, journal: Journal) -> bool:
        """Asks a server again and again, more and more rarely; False when there is nothing left to do."""
        wait = _FIRST_WAIT
        while not self._stop.wait(wait):
            with self._changed:
                if not self._open and not self._running:
                    return False
            down_since = lane.down_since
            try:
                lane.server.check()
                lane.down_since = None  # first, so that no other takes a job of this server from here on
                self._drop_copies(lane, journal)
                self._watcher.remark(f"{lane.url} answers again.")
                return True
            except ServerError:
                lane.down_since = down_since
            wait = min(2 * wait, _LONGEST_WAIT)
        return False

    def _drop_copies(self, lane: _Lane, journal: Journal) -> None:
        """Cancels runs that were left at this server and that another has taken over."""
        with self._changed:
            left = [job for job in self.jobs if lane.url in job.runs and job not in self._open]
        for job in left:
            lane.server.cancel(job.runs[lane.url])
            del job.runs[lane.url]
            if not job.files:
                journal.failed(job.key, lane.url, "taken over by another server")

    def _do(self, lane: _Lane, job: Job, journal: Journal) -> None:
        """Runs a job at a server, and decides what becomes of it when that fails."""
        started = time.monotonic()
        try:
            job.files = self._fetched(lane.server, job, journal)
        except ServerUnreachable as error:
            job.breaks += 1
            if job.breaks > _MOST_BREAKS:
                self._failed(lane, job, journal, error)
                return
            lane.down_since, job.error = time.monotonic(), error
            self._watcher.remark(str(error))
            self._give_back(lane, job, first=True)
        except Cancelled:
            self._leave(lane, job, journal)
        except OutputError:
            raise
        except AllegroError as error:
            self._failed(lane, job, journal, error)
        else:
            job.error, job.seconds = None, time.monotonic() - started
            self._close(lane, job)

    def _failed(self, lane: _Lane, job: Job, journal: Journal, error: AllegroError) -> None:
        job.error = error
        job.runs.pop(lane.url, None)
        journal.failed(job.key, lane.url, str(error))
        again = isinstance(error, ServerError) and not isinstance(error, RunInterrupted)
        if again and job.submissions <= self._limits.retries:
            self._watcher.remark(f"{job.name} is tried again: {error}")
            self._give_back(lane, job, first=False)
        else:
            self._close(lane, job)

    def _leave(self, lane: _Lane, job: Job, journal: Journal) -> None:
        """The end of a job that is stopped from here: cancelled at the server if the user wants an end."""
        if self._cancel and lane.url in job.runs:
            with suppress(ServerError):
                lane.server.cancel(job.runs[lane.url])
                journal.failed(job.key, lane.url, "cancelled")
        with self._changed:
            del self._running[lane.url]

    # One run

    def _at(self, server: ComfyServer, job: Job) -> bool:
        """Whether a run of the job is at the server, or was finished there."""
        prompt_id = job.runs.get(server.url)
        return prompt_id is not None and server.state(prompt_id).status != "unknown"

    def _submit(self, server: ComfyServer, job: Job, journal: Journal) -> None:
        job.submissions += 1
        for path in job.uploads.values():
            server.upload(path)
        prompt_id = str(uuid.uuid4())
        # First the journal: a run that nobody knows of would be done twice, one that does not exist is found missing.
        journal.submitting(job.key, server.url, prompt_id)
        job.runs[server.url] = prompt_id
        server.submit(job.graph, prompt_id)

    def _fetched(self, server: ComfyServer, job: Job, journal: Journal) -> list[Path]:
        """Runs a job, or goes on with its run, and fetches what it saved."""
        if not self._at(server, job):
            if job.submissions > self._limits.retries:
                raise RunFailed(f"{server.url}: the run was lost {job.submissions} times. Last: {job.error}")
            self._submit(server, job, journal)
        self._watcher.begun(job)
        files = server.wait(job.runs[server.url], lambda event: self._watcher.event(job, event), stop=self._stop,
                            timeout=self._limits.timeout)
        names = result_names(job.name, files)
        if not self._force:
            for name in names:
                if (self.folder / name).exists() and name not in journal.of(job.key).files:
                    raise exists_error(self.folder / name)
        journal.saving(job.key, names)
        paths = [server.download(file, self.folder / name, force=True) for file, name in zip(files, names, strict=True)]
        journal.done(job.key, server.url)
        return paths


def result_names(name: str, files: Sequence[RemoteFile]) -> list[str]:
    """What the results are called here. Of the server's names, which may be anything, only the extension is taken.

    Further files have a number after a plus, with which no name of a job ends: they are never called as those of another job.
    """
    names: list[str] = []
    for file in files:
        suffix = Path(file.filename.replace("\\", "/")).suffix.lower()
        suffix = suffix if suffix[1:].isalnum() and suffix.isascii() and len(suffix) <= 12 else ".bin"
        count = sum(existing.endswith(suffix) for existing in names)
        names.append(f"{name}{f'+{count + 1}' if count else ''}{suffix}")
    return names
