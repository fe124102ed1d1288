"""What every command is given. Needs no PyTorch, as not every command does."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field

from ..atomic import check_output
from .console import Console
from .report import Report


@dataclass
class Job:
    """One run of the command line.

    Attributes:
        args: the parsed arguments.
        console: speaks to the user.
        report: what --json writes.
        remarks: lines to show after an error, e.g. where the latents were kept.
    """

    args: argparse.Namespace
    console: Console
    report: Report
    remarks: list[str] = field(default_factory=list)

    @property
    def force(self) -> bool:
        """Whether existing files may be replaced."""
        return bool(getattr(self.args, "force", False))

    def say_result(self, text: str) -> None:
        """The result on standard output, unless the report goes there."""
        if self.args.json != "-" and not self.args.quiet:
            self.console.result(text)


def check_report_output(job: Job) -> None:
    """Raises when the --json file could not be written at the end."""
    if job.args.json not in (None, "-"):
        check_output(job.args.json, force=job.force)
