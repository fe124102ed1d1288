"""Running the command line inside the test's own process."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from allegro_model import cli


def run_command(capsys: pytest.CaptureFixture[str], words: Sequence[str]) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of `allegro` with these arguments."""
    capsys.readouterr()
    try:
        code = cli.main(words)
    except SystemExit as stop:
        code = int(stop.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err
