"""What a run did, in numbers: the --json report and the exit codes."""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..atomic import atomic_file, writing
from ..errors import (
    AllegroError,
    Cancelled,
    CheckpointError,
    DownloadError,
    MissingDependency,
    NonFiniteError,
    NotEnoughMemory,
    OutputError,
    ServerError,
)
from ..memory import is_out_of_memory, peak_ram, reset_peak

if TYPE_CHECKING:
    import torch


class UsageError(AllegroError):
    """Options that do not go together."""


# Exit codes: (code, meaning, errors that lead to it). The first entry whose errors match wins.
EXIT_OK, EXIT_BUG, EXIT_USAGE, EXIT_INPUT, EXIT_MEMORY, EXIT_MISSING, EXIT_CANCELLED = 0, 1, 2, 3, 6, 7, 130
EXIT_CODES: list[tuple[int, str, tuple[type[BaseException], ...]]] = [
    (EXIT_OK, "done", ()),
    (EXIT_BUG, "an error this program did not expect; please report it", ()),
    (EXIT_USAGE, "the command line cannot be understood", (UsageError,)),
    (4, "the model files are missing, damaged or of the wrong kind", (CheckpointError,)),
    (5, "the result cannot be written: existing file, full disk, no permission", (OutputError,)),
    (EXIT_MEMORY, "not enough memory", (NotEnoughMemory,)),
    (EXIT_MISSING, "a package is missing", (MissingDependency,)),
    (8, "NaN or Inf appeared in the latents or frames", (NonFiniteError,)),
    (9, "a download failed: no network, refused, or not what was announced", (DownloadError,)),
    (10, "a ComfyUI server cannot be reached, or a run failed there", (ServerError,)),
    (EXIT_CANCELLED, "cancelled with Ctrl-C", (Cancelled, KeyboardInterrupt)),
    (EXIT_INPUT, "an illegal size, setting, prompt or input file", (AllegroError,)),
]


def exit_code(error: BaseException) -> int:
    """The exit code an exception leads to."""
    if is_out_of_memory(error):
        return EXIT_MEMORY
    return next((code for code, _, errors in EXIT_CODES if isinstance(error, errors)), EXIT_BUG)


def exit_code_table() -> str:
    """The codes and their meaning, for --help."""
    rows = sorted((code, meaning) for code, meaning, _ in EXIT_CODES)
    return "\n".join(f"  {code:>3}  {meaning}" for code, meaning in rows)


def versions() -> dict[str, str | None]:
    """Versions of everything that can change a result."""
    torch: Any = sys.modules.get("torch")  # what does not need it is run without it
    found: dict[str, str | None] = {"allegro-video": __version__, "python": platform.python_version(),
                                    "torch": torch and torch.__version__, "cuda": torch and torch.version.cuda}
    for package in ("transformers", "safetensors", "imageio-ffmpeg"):
        found[package] = None
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def _peak_gpu(device: torch.device | None) -> int | None:
    if device is None or device.type != "cuda":
        return None
    import torch
    return int(torch.cuda.max_memory_allocated(device))


@dataclass
class Report:
    """Collects what --json writes.

    Attributes:
        command: the sub-command.
        facts: "settings", "model", "output", "latents", ... as the command learns them.
        stages: one entry per stage: name, seconds, peak memory in bytes.
        stage: the stage that runs, or ran last.
    """

    command: str
    facts: dict[str, Any] = field(default_factory=dict)
    stages: list[dict[str, Any]] = field(default_factory=list)
    stage: str = "start"
    started: float = field(default_factory=time.monotonic)

    @contextmanager
    def measure(self, name: str, device: torch.device | None = None) -> Iterator[None]:
        """Times the block and takes its peak memory, also when it fails.

        Args:
            name: of the stage.
            device: where it computes; None when it does not.
        """
        self.stage = name
        reset_peak(device)
        start = time.monotonic()
        try:
            yield
        finally:
            gpu = _peak_gpu(device)
            self.stages.append({"name": name, "seconds": round(time.monotonic() - start, 3),
                                "peak_ram_bytes": peak_ram(), "peak_gpu_bytes": gpu})

    def to_dict(self, code: int, error: BaseException | None) -> dict[str, Any]:
        """The report as JSON-able values.

        Args:
            code: the exit code.
            error: what ended the run, if anything did.
        """
        status = {EXIT_OK: "ok", EXIT_CANCELLED: "cancelled"}.get(code, "failed")
        failure = error and {"type": type(error).__name__, "message": str(error), "stage": self.stage}
        return {"command": self.command, "status": status, "exit_code": code, "error": failure,
                "seconds": round(time.monotonic() - self.started, 3), "stages": self.stages, **self.facts,
                "versions": versions()}

    def write(self, target: str, code: int, error: BaseException | None, *, force: bool) -> None:
        """Writes the report to a file, or to standard output when `target` is "-".

        Raises:
            OutputError: the file cannot be written.
        """
        text = json.dumps(self.to_dict(code, error), indent=2)
        if target == "-":
            sys.stdout.write(text + "\n")
            sys.stdout.flush()
            return
        with atomic_file(target, force=force) as temporary, writing(Path(target)):
            temporary.write_text(text + "\n", encoding="utf-8")
