"""The command line: `allegro`, or `python -m allegro_model`.

Commands only check their input, call the pipeline, and tell the user what happened.
"""

from __future__ import annotations

import argparse
import logging
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from types import FrameType

from ..errors import AllegroError
from ..memory import is_out_of_memory
from .base import Job
from .console import Console
from .options import prepare, start_parser
from .report import EXIT_BUG, EXIT_CANCELLED, EXIT_MISSING, EXIT_OK, Report, exit_code
from .shortage import explain_shortage
from .submit_options import add_submit

__all__ = ["main"]

_PACKAGE = __name__.split(".")[0]
# Command -> the module that has a function of its name. Imported when needed: `submit` works without PyTorch.
_COMMANDS = {
    "generate": "generate", "decode": "convert", "encode": "convert", "interpolate": "interpolate",
    "convert-vfi": "convert_vfi", "download": "download", "submit": "submit", "inspect": "inspect",
    "estimate": "estimate", "bench": "bench", "calibrate": "calibrate",
    "convert": "convert_weights",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: arguments without the program's name; default those of the process.
    Returns:
        the exit code; see `allegro --help`.
    """
    args = _parse(list(sys.argv[1:] if argv is None else argv))
    console = Console(quiet=args.quiet)
    job = Job(args, console, Report(args.command))
    error: BaseException | None = None
    with _own_logging(console, verbose=args.verbose), _terminate_like_ctrl_c():
        try:
            module = import_module(f".{_COMMANDS[args.command]}", __name__)
            getattr(module, args.command.replace("-", "_"))(job)
        # The last line of defence: whatever went wrong becomes a message and an exit code.
        except BaseException as caught:
            if isinstance(caught, SystemExit | GeneratorExit):
                raise
            error = caught
        return _finish(job, error)


def _parse(words: list[str]) -> argparse.Namespace:
    """The options; exits with a message when they cannot be understood."""
    if words[:1] == ["submit"]:
        parser, commands = start_parser("")
        add_submit(commands)
        return parser.parse_args(prepare(words))
    if find_spec("torch") is None:
        sys.stderr.write("PyTorch is missing. It is needed for all commands but `submit`; see https://pytorch.org.\n")
        raise SystemExit(EXIT_MISSING)
    from .parser import parse_arguments
    return parse_arguments(words)


def _finish(job: Job, error: BaseException | None) -> int:
    """Tells the user how it went and writes the report."""
    code = EXIT_OK if error is None else exit_code(error)
    if error is not None:
        _explain(job, error, code)
    if job.args.json is not None:
        try:
            job.report.write(job.args.json, code, error, force=job.force)
        except AllegroError as failure:
            if str(failure) != str(error):  # the check before the run has said the same
                job.console.error(f"Error: {failure}")
            return code or exit_code(failure)
    return code


def _explain(job: Job, error: BaseException, code: int) -> None:
    """Error messages in plain words; a traceback only for what nobody foresaw, or when asked for."""
    if job.args.verbose or code == EXIT_BUG:
        job.console.error("".join(traceback.format_exception(error)).rstrip())
    if code == EXIT_CANCELLED:
        job.console.error(f"Cancelled during: {job.report.stage}.")
    elif is_out_of_memory(error):
        job.console.error(f"Error: {explain_shortage(job.args, job.report.stage, error)}")
    elif isinstance(error, AllegroError):
        job.console.error(f"Error: {error}")
    else:
        job.console.error(f"Error: something unexpected happened during: {job.report.stage}. The lines above "
                          "say where; please report them.")
    for remark in job.remarks:
        job.console.error(remark)


@contextmanager
def _own_logging(console: Console, *, verbose: bool) -> Iterator[None]:
    """Shows this package's log messages on the console: warnings, or everything with --verbose."""
    logger = logging.getLogger(_PACKAGE)
    handler = logging.StreamHandler(console.stream)
    handler.setLevel(logging.DEBUG if verbose else logging.ERROR if console.quiet else logging.WARNING)
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    level, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG if verbose else logging.WARNING)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate


@contextmanager
def _terminate_like_ctrl_c() -> Iterator[None]:
    """Makes a request to end (SIGTERM) and a closed terminal (SIGHUP) clean up as Ctrl-C does."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    # What somebody else handles or ignores (nohup) stays with them.
    ours = [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]
    for number in ours:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)
