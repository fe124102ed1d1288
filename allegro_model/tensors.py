"""Are these the tensors that a module needs? The comparison behind every "does not fit"."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from .errors import CheckpointMismatch

_SHOWN = 8  # names per list in a message


def check_tensors(
    expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], *, what: str
) -> None:
    """Compares names and shapes strictly.

    Args:
        expected: of our module.
        found: of the checkpoint, under our names.
        what: begins the message, e.g. "FILE, an Allegro VideoVAE,".
    Raises:
        CheckpointMismatch: with sorted, shortened lists of what is missing, unexpected and of another shape.
    """
    missing = sorted(expected.keys() - found.keys())
    unexpected = sorted(found.keys() - expected.keys())
    reshaped = [
        f"{name} is {list(found[name])}, expected {list(expected[name])}"
        for name in sorted(expected.keys() & found.keys())
        if found[name] != expected[name]
    ]
    lists = [
        f"{label} ({len(names)}): {shorten(names)}."
        for label, names in (("Missing", missing), ("Unexpected", unexpected), ("Other shapes", reshaped))
        if names
    ]
    if lists:
        raise CheckpointMismatch(
            f"{what} does not fit: {len(found)} tensors found, {len(expected)} expected. "
            f"{' '.join(lists)} The file is damaged or was changed; download it again."
        )


def shorten(names: Iterable[str]) -> str:
    """The first few names, and how many more there are."""
    names = list(names)
    return ", ".join(names[:_SHOWN]) + (f", ... ({len(names) - _SHOWN} more)" if len(names) > _SHOWN else "")
