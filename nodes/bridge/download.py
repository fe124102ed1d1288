"""Downloads with ComfyUI's model folders, progress bar and cancel button."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ...allegro_model.download import Plan, by_hand, comfyui_targets, fetch, make_plan, unasked
from ...allegro_model.errors import DownloadError, MissingDependency
from ...allegro_model.loading.released import released_files
from . import paths
from .progress import check_cancelled, tile_progress

logger = logging.getLogger(__name__)
_STEPS = 200  # of the bar; a message to the browser for each block would be a hundred thousand


def download(model: str, text_encoder: str | None, *, fetch: bool) -> str:
    """Fetches the files of a model that are missing, or only lists them.

    Args:
        model: one of `MODELS`.
        text_encoder: one of `TEXT_ENCODERS`, or None for none.
        fetch: list only, if False.
    Returns:
        lines for people.
    Raises:
        DownloadError, OutputError, MissingDependency: with what to fetch by hand.
    """
    files = [file for file in released_files(model, text_encoder or "fp16") if text_encoder or file.part != "text_encoder"]
    targets = comfyui_targets(files, paths.download_folders())
    try:
        plan = make_plan(targets, tick=check_cancelled)
    except (DownloadError, MissingDependency) as error:
        known = unasked(targets)
        if fetch:
            raise type(error)(f"{error}\n{by_hand(known)}") from error
        return f"The hub could not be asked, sizes are rounded. {error}\n{known.describe()}"
    return _fetch_all(plan) if fetch else f"{plan.describe()}\nTurn on download to fetch."


def _fetch_all(plan: Plan) -> str:
    plan.check_space()
    lines = [item.describe() for item in plan.items if item.present]
    for item in plan.missing:
        checked = fetch(item, _watch)
        lines.append(f"fetched {item.target.path} ({checked})")
    lines.append("Press R in the browser to refresh the lists of the loaders." if plan.missing else "nothing to fetch")
    return "\n".join(lines)


@contextmanager
def _watch(title: str) -> Iterator[Callable[[int, int], None]]:
    """A bar of its own for each stage; cancels."""
    logger.info("Allegro: %s", title)
    report, shown = tile_progress(), -1

    def progress(done: int, total: int) -> None:
        nonlocal shown
        check_cancelled()
        step = done * _STEPS // max(total, 1)
        if step != shown:
            shown = step
            report(step, _STEPS)

    yield progress
