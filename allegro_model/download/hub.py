"""What is asked of a model hub, through huggingface_hub: its addresses, mirrors, tokens, proxies and offline switch.

Nothing is asked at import, and the package itself is imported by the first question.
"""

from __future__ import annotations

import inspect
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYet
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from queue import Empty, Full, Queue
from threading import Event, Thread
from types import ModuleType
from typing import Any, TypeVar

from ..errors import DownloadError, MissingDependency
from ..loading.released import ReleasedFile

Result = TypeVar("Result")

ATTEMPTS = 6  # in a row, without a byte in between
FIRST_WAIT = 1.0  # seconds; doubled each time
MAX_WAIT = 60.0
_TICK = 0.25  # seconds between looks whether somebody cancelled
_BLOCK = 2**16  # bytes
_QUEUED = 64  # blocks
_TRANSIENT = (408, 429, 500, 502, 503, 504)
_RANGE_REFUSED = 416


@dataclass(frozen=True)
class RemoteFile:
    """A file as the hub announces it.

    Attributes:
        url: where it is read from; it names the commit.
        commit: of the repository.
        size: bytes.
        etag: SHA-256 of large files, git's hash of small ones; something else on some mirrors.
    """

    url: str
    commit: str
    size: int
    etag: str

    @property
    def sha256(self) -> str | None:
        return self.etag if re.fullmatch(r"[0-9a-f]{64}", self.etag) else None

    @property
    def git_hash(self) -> str | None:
        return self.etag if re.fullmatch(r"[0-9a-f]{40}", self.etag) else None


def import_hub() -> ModuleType:
    """The package huggingface_hub.

    Raises:
        MissingDependency: it is not installed.
    """
    try:
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.utils
    except ImportError as error:
        raise MissingDependency(
            "Downloading needs the package huggingface_hub, which is not installed. Install it (pip install "
            'huggingface_hub, or the extra: pip install "allegro-video[standalone]"), or fetch the files by hand.'
        ) from error
    return huggingface_hub


def is_offline() -> bool:
    """True when the user has switched the network off (HF_HUB_OFFLINE)."""
    return bool(import_hub().constants.HF_HUB_OFFLINE)


def link(file: ReleasedFile, revision: str | None = None) -> str:
    """The address of a file, on the hub or the mirror (HF_ENDPOINT) that the user has chosen."""
    return str(import_hub().hf_hub_url(file.repository, file.path, revision=revision or file.revision))


def ask(file: ReleasedFile, revision: str | None = None, *, tick: Callable[[], None] = lambda: None) -> RemoteFile | None:
    """What the hub says about a file, without fetching it.

    Args:
        file: of the table.
        revision: commit to look at; default the file's own.
        tick: called while waiting; it may raise to cancel.
    Returns:
        None if it is not there and need not be.
    Raises:
        DownloadError: offline, unknown to the hub, or not to be reached.
        MissingDependency: huggingface_hub is not installed.
    """
    hub = import_hub()
    if is_offline():
        raise DownloadError(f"{file.path} of {file.repository} is missing, and HF_HUB_OFFLINE is set: nothing is "
                            "fetched. Unset it, or fetch the file by hand.")
    url = link(file, revision)
    # Versions without this option try again by themselves, for half a minute.
    alone = "retry_on_errors" in inspect.signature(hub.get_hf_file_metadata).parameters
    try:
        timeout = hub.constants.HF_HUB_ETAG_TIMEOUT
        found = patiently(file, lambda: _aside(lambda: hub.get_hf_file_metadata(url, timeout=timeout), tick), tick=tick,
                          attempts=ATTEMPTS if alone else 2)
    except MissingFile as error:
        if file.optional:
            return None
        raise DownloadError(str(error)) from error
    if not found.commit_hash or not found.etag or found.size is None:
        raise DownloadError(f"{url} does not answer as a model hub does (no commit, checksum or size). Check HF_ENDPOINT "
                            "and the proxy settings.")
    return RemoteFile(link(file, found.commit_hash), found.commit_hash, int(found.size), found.etag)


def read_on(url: str, start: int, tick: Callable[[], None]) -> Iterator[tuple[int, bytes]]:
    """A file from a byte on. The network is waited for in a thread, so that cancelling need not wait for it.

    Args:
        url: of the file.
        start: bytes that are there already.
        tick: called while waiting; it may raise to cancel.
    Returns:
        (position in the file, block); the first block is empty, its position 0 where the server cannot resume.
    """
    received: Queue[tuple[int, bytes] | BaseException | None] = Queue(_QUEUED)
    stopped = Event()

    def hand_over(found: tuple[int, bytes] | BaseException | None) -> None:
        while not stopped.is_set():
            with suppress(Full):
                received.put(found, timeout=_TICK)
                return

    def receive() -> None:
        try:
            with _open(url, start) as (position, blocks):
                hand_over((position, b""))
                for block in blocks:
                    if stopped.is_set():
                        return
                    hand_over((position, block))
                    position += len(block)
            hand_over(None)
        except BaseException as error:  # noqa: BLE001 (raised again where somebody waits for it)
            hand_over(error)

    Thread(target=receive, daemon=True).start()
    try:
        while True:
            try:
                found = received.get(timeout=_TICK)
            except Empty:
                tick()
                continue
            if found is None:
                return
            if isinstance(found, BaseException):
                raise found
            yield found
    finally:
        stopped.set()


@contextmanager
def _open(url: str, start: int) -> Iterator[tuple[int, Iterator[bytes]]]:
    """The byte at which the server's answer begins, and the blocks of its content."""
    hub = import_hub()
    headers = {**hub.utils.build_hf_headers(), "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    session, timeout = hub.utils.get_session(), hub.constants.HF_HUB_DOWNLOAD_TIMEOUT
    # Versions from 1.0 on speak through httpx, older ones through requests.
    opened = (session.stream("GET", url, headers=headers, timeout=timeout) if callable(session.stream) else
              session.get(url, headers=headers, timeout=timeout, stream=True))
    with opened as response:
        if response.status_code == _RANGE_REFUSED:
            yield 0, iter(())
            return
        hub.utils.hf_raise_for_status(response)
        blocks = response.iter_raw() if hasattr(response, "iter_raw") else response.iter_content(_BLOCK)
        yield _begins_at(response, start), blocks


def _aside(action: Callable[[], Result], tick: Callable[[], None]) -> Result:
    """Does something in a thread of its own, and gives what it returns or raises."""
    done: Future[Result] = Future()

    def work() -> None:
        try:
            done.set_result(action())
        except BaseException as error:  # noqa: BLE001 (raised again below)
            done.set_exception(error)

    Thread(target=work, daemon=True).start()
    while not done.done():
        tick()
        with suppress(NotYet):
            done.exception(timeout=_TICK)
    return done.result()


def patiently(file: ReleasedFile, action: Callable[[], Result], *, tick: Callable[[], None] = lambda: None,
              progress: Callable[[], int] = lambda: 0, attempts: int = ATTEMPTS) -> Result:
    """Does something with the hub, again after a broken connection or when the server is busy.

    Args:
        file: for messages.
        action: what to do; it goes on where it stopped.
        tick: called while waiting; it may raise to cancel.
        progress: bytes so far; as long as they grow, no attempt counts as failed.
        attempts: that may fail in a row.
    Raises:
        MissingFile: the hub does not know the file.
        DownloadError: it refuses, or could not be reached several times in a row.
    """
    hub = import_hub()
    # The base of the errors of httpx, or requests: the hub's own are derived from it.
    broken = (OSError, hub.utils.HfHubHTTPError.__mro__[1])
    failed, before = 0, progress()
    while True:
        try:
            return action()
        except broken as error:
            _raise_if_final(hub, file, error)
            failed = 1 if progress() > before else failed + 1
            before = progress()
            if failed >= attempts:
                raise DownloadError(f"{file.path} of {file.repository} could not be fetched, {failed} attempts in a row "
                                    f"failed: {_reason(error)}. Check the network, and run the same again: it goes on where "
                                    "it stopped. A mirror can be named in HF_ENDPOINT.") from error
            _wait(_pause(error, failed), tick)


class MissingFile(DownloadError):
    """The hub does not have the file."""


def _raise_if_final(hub: ModuleType, file: ReleasedFile, error: BaseException) -> None:
    """Raises what another attempt would not change."""
    utils = hub.utils
    if isinstance(error, utils.OfflineModeIsEnabled):
        raise DownloadError("HF_HUB_OFFLINE is set: nothing is fetched. Unset it.") from error
    status = _status(error)
    if isinstance(error, utils.GatedRepoError):
        raise DownloadError(f"{file.repository} asks you to accept its terms first. Do so on its page, log in with "
                            "the token of your account (hf auth login), and try again.") from error
    if isinstance(error, utils.EntryNotFoundError | utils.RevisionNotFoundError | utils.RepositoryNotFoundError) or status == 404:
        raise MissingFile(f"{file.repository} has no file {file.path} at {file.revision}. It was renamed or removed, "
                          "or a mirror (HF_ENDPOINT) lacks it: look at its page, and please report it.") from error
    if status is not None and status not in _TRANSIENT:
        raise DownloadError(f"{file.path} of {file.repository} was refused: {_reason(error)}. Check the mirror "
                            "(HF_ENDPOINT), the proxy settings and your token.") from error


def _status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _reason(error: BaseException) -> str:
    status = _status(error)
    return f"HTTP status {status}" if status is not None else " ".join(str(error).split())[:200] or type(error).__name__


def _pause(error: BaseException, failed: int) -> float:
    """Seconds to wait: what the server asks for, else more each time."""
    headers: Any = getattr(getattr(error, "response", None), "headers", {})
    asked = str(headers.get("Retry-After", ""))
    return min(float(asked) if asked.isdigit() else FIRST_WAIT * 2 ** (failed - 1), MAX_WAIT)


def _wait(seconds: float, tick: Callable[[], None]) -> None:
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        tick()
        time.sleep(min(left, _TICK))


def _begins_at(response: Any, start: int) -> int:
    found = re.fullmatch(r"bytes (\d+)-.*", response.headers.get("Content-Range", ""))
    return int(found.group(1)) if found and start else 0
